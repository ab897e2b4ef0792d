//! What the emulator finds: a kernel in which a barrier or a wait is missing gives other numbers in some order of its threads.

use candle_core::{DType, Device};
use half::bf16;

use crate::Result;
use crate::gpu::{Address, Gpu, Launch, Params, emulated};
use crate::tests::numbers;

/// `FaultyParams` of `faulty.cuh`.
#[derive(Clone, Copy)]
#[repr(C)]
struct FaultyParams {
    input: Address,
    out: Address,
    fault: i32,
}
// SAFETY: the C++ struct has the same fields.
unsafe impl Params for FaultyParams {}

const THREADS: usize = 128;

/// The numbers of the kernel with a fault.
fn run(order: u64, fault: i32) -> Vec<f32> {
    emulated::on(order, || {
        let gpu = Gpu::at(&Device::Cpu).unwrap().unwrap();
        let values: Vec<f32> = (0..2 * THREADS).map(|i| (i * i) as f32).collect();
        let input = gpu.upload("test", &values).unwrap();
        let out = gpu.output("test", &[THREADS], DType::F32).unwrap();
        let params = FaultyParams { input: input.address, out: out.address, fault };
        let launch = Launch { shared_bytes: 4 * THREADS as u32, ..Launch::blocks(1, THREADS as u32) };
        // SAFETY: the parameters are the kernel's, and it gets as many numbers as it reads and writes.
        unsafe { gpu.launch("faulty", launch, &params) }.unwrap();
        numbers(&out.tensor())
    })
}

#[test]
fn a_missing_barrier_shows_in_some_order_of_threads() {
    let square = |i: usize| (i * i) as f32;
    let expected: Vec<f32> = (0..THREADS)
        .map(|i| {
            let next_lane = if i % 32 < 31 { i + 1 } else { i };
            let next_warp = if i + 32 < THREADS { i + 32 } else { i };
            square(i) + square(next_lane) + square(next_warp) + square(THREADS + next_warp)
        })
        .collect();
    for order in 0..8 {
        assert_eq!(run(order, 0), expected, "order {order}, without a fault");
    }
    // Ascending and descending; both with copies as late as they may come, and then at once.
    for (fault, what, shows) in [
        (1, "a wait for copies", [true, true, false, false]),
        (2, "a warp's barrier", [true, false, true, false]),
        (3, "a barrier before other warps' numbers are read", [true, false, true, false]),
        (4, "a barrier before numbers that other warps read are written", [false, true, false, true]),
        (5, "a copy that begins before others have read", [false, false, false, true]),
    ] {
        assert_eq!([0, 1, 2, 3].map(|order| run(order, fault) != expected), shows, "{what}");
    }
}

/// `FaultyGroupParams` of `faulty.cuh`.
#[derive(Clone, Copy)]
#[repr(C)]
struct FaultyGroupParams {
    input: Address,
    out: Address,
    fault: i32,
}
// SAFETY: the C++ struct has the same fields.
unsafe impl Params for FaultyGroupParams {}

/// The numbers of the kernel of a group with a fault.
fn run_group(order: u64, fault: i32) -> Result<Vec<f32>> {
    emulated::on(order, || {
        let gpu = Gpu::at(&Device::Cpu)?.unwrap();
        let values: Vec<u16> = (0..2 * 64 * 64).map(|i| bf16::from_f32((i % 13) as f32).to_bits()).collect();
        let words: Vec<u32> =
            values.chunks(2).map(|two| u32::from(two[0]) | u32::from(two[1]) << 16).collect();
        let input = gpu.upload("test", &words)?;
        let out = gpu.output("test", &[64 * 64], DType::F32)?;
        let params = FaultyGroupParams { input: input.address, out: out.address, fault };
        let launch = Launch { shared_bytes: 2 * 64 * 64 + 128, ..Launch::blocks(1, 128) };
        // SAFETY: the parameters are the kernel's, and it gets as many numbers as it reads and writes.
        unsafe { gpu.launch("faulty_group", launch, &params) }?;
        Ok(numbers(&out.tensor()))
    })
}

#[test]
fn a_fault_of_a_groups_product_is_refused_or_shows_in_some_order() {
    let number = |row: usize, column: usize| ((row * 64 + column) % 13) as f32;
    let product = |i: usize| (0..64).map(|k| number(i / 64, k) * number(i % 64, k)).sum();
    let expected: Vec<f32> = (0..64 * 64).map(product).collect();
    for order in 0..8 {
        assert_eq!(run_group(order, 0).unwrap(), expected, "order {order}, without a fault");
        for (fault, what) in [(1, "not shown"), (4, "multiple of 1024")] {
            let error = run_group(order, fault).unwrap_err().to_string();
            assert!(error.contains(what), "order {order}: {error}");
        }
    }
    // Products are made when they begin in orders 2 and 3, and else when they are waited for.
    for (order, late) in [(0, true), (1, true), (2, false), (3, false), (5, true)] {
        assert_eq!(run_group(order, 2).is_err(), late, "order {order}: not awaited");
        assert_eq!(run_group(order, 3).unwrap() != expected, late, "order {order}: read before it is there");
        assert_eq!(run_group(order, 5).unwrap() != expected, late, "order {order}: overwritten meanwhile");
    }
}
