//! What the emulator finds: a kernel in which a barrier or a wait is missing gives other numbers in some order of its threads.

use candle_core::{DType, Device};

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
