//! The emulator: kernels on the CPU, tensors in main memory, products by plain loops.

use std::cell::Cell;
use std::ffi::{c_char, c_int, c_void};
use std::sync::{Mutex, PoisonError};

use candle_core::{CpuStorage, DType};
use half::bf16;
use rayon::prelude::*;

use super::{Address, Launch, Product};
use crate::element::Element;
use crate::gemm::pack::Layout;
use crate::{Error, Result};

thread_local! {
    static ORDER: Cell<Option<u64>> = const { Cell::new(None) };
    static HAS_FAILED: Cell<bool> = const { Cell::new(false) };
    static ROOM: Cell<usize> = const { Cell::new(usize::MAX) };
}

/// Runs `f` with all operations of this thread on the emulated GPU. A kernel's threads run in the given order: in 0 to 3 each warp as
/// far as it can before the next one, ascending in 0 and 2 and descending in 1 and 3, where 2 and 3 copy into shared memory at once
/// and 0 and 1 as late as may be; every other number is a mixed order of its own, in which all warps go from wait to wait together.
pub fn on<R>(order: u64, f: impl FnOnce() -> R) -> R {
    let before = ORDER.replace(Some(order));
    let result = f();
    ORDER.set(before);
    HAS_FAILED.set(false);
    ROOM.set(usize::MAX);
    result
}

/// Until the function ends that [`on`] runs, this thread's emulated GPU is one that has failed: it launches nothing any more.
pub fn fail() {
    HAS_FAILED.set(true);
}

/// Until the function ends that [`on`] runs, this thread's emulated GPU has no room for a tensor of more bytes than these.
pub fn limit(bytes: usize) {
    ROOM.set(bytes);
}

pub(super) fn check() -> Result<()> {
    if HAS_FAILED.get() {
        return Err(Error::Gpu { op: "emulator".to_owned(), what: "the device has failed".to_owned() });
    }
    Ok(())
}

pub(super) fn is_on() -> bool {
    ORDER.get().is_some()
}

unsafe extern "C" {
    fn incipit_emulate(
        name: *const c_char,
        grid: *const u32,
        threads: u32,
        shared_bytes: u32,
        params: *const c_void,
        order: u64,
        message: *mut c_char,
        message_size: usize,
    ) -> c_int;
}

pub(super) fn address(op: &'static str, storage: &CpuStorage) -> Result<Address> {
    let address = match storage {
        CpuStorage::U8(v) => v.as_ptr().addr(),
        CpuStorage::U32(v) => v.as_ptr().addr(),
        CpuStorage::I64(v) => v.as_ptr().addr(),
        CpuStorage::BF16(v) => v.as_ptr().addr(),
        CpuStorage::F32(v) => v.as_ptr().addr(),
        _ => return Err(Error::Shape { op, what: "an operand of a type that no kernel takes".to_owned() }),
    };
    Ok(Address(address as u64))
}

/// Filled with what a kernel does not write: NaN.
pub(super) fn room(count: usize, dtype: DType) -> Result<CpuStorage> {
    let (needed, free) = (count * dtype.size_in_bytes(), ROOM.get());
    if needed > free {
        return Err(Error::GpuMemory { what: format!("{needed} bytes were asked for, and {free} are free") });
    }
    Ok(match dtype {
        DType::BF16 => CpuStorage::BF16(vec![bf16::NAN; count]),
        DType::I64 => CpuStorage::I64(vec![i64::MIN; count]),
        _ => CpuStorage::F32(vec![f32::NAN; count]),
    })
}

/// Bytes at an address of any number's alignment.
pub(super) fn copied(bytes: &[u8]) -> CpuStorage {
    let mut words = vec![0i64; bytes.len().div_ceil(8)];
    for (word, bytes) in words.iter_mut().zip(bytes.chunks(8)) {
        let mut all = [0; 8];
        all[..bytes.len()].copy_from_slice(bytes);
        *word = i64::from_le_bytes(all);
    }
    CpuStorage::I64(words)
}

/// # Safety
/// As for `Gpu::launch`.
pub(super) unsafe fn launch(kernel: &str, launch: Launch, params: *const c_void) -> Result<()> {
    check()?;
    // The emulator runs one kernel at a time.
    static TURN: Mutex<()> = Mutex::new(());
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    let name: Vec<u8> = kernel.bytes().chain([0]).collect();
    let grid = [launch.grid[0], launch.grid[1], 1];
    let mut message = [0u8; 256];
    // SAFETY: the name ends with 0, the message's length is given, and the parameters are the caller's promise.
    let failed = unsafe {
        incipit_emulate(
            name.as_ptr().cast(),
            grid.as_ptr(),
            launch.threads,
            launch.shared_bytes,
            params,
            ORDER.get().unwrap_or_default(),
            message.as_mut_ptr().cast(),
            message.len(),
        )
    };
    if failed == 0 {
        return Ok(());
    }
    let end = message.iter().position(|byte| *byte == 0).unwrap_or(message.len());
    let what = String::from_utf8_lossy(&message[..end]).into_owned();
    Err(Error::Gpu { op: "emulator".to_owned(), what })
}

/// # Safety
/// The addresses must be of as many numbers as the product has.
pub(super) unsafe fn multiply(product: &Product) {
    // SAFETY: the caller's promise.
    unsafe {
        match (product.dtype, product.out_dtype) {
            (DType::BF16, DType::BF16) => multiply_as::<bf16, bf16>(product),
            (DType::BF16, _) => multiply_as::<bf16, f32>(product),
            (_, DType::BF16) => unreachable!("cuBLASLt has no product of f32 numbers with a bf16 result"),
            _ => multiply_as::<f32, f32>(product),
        }
    }
}

/// # Safety
/// As for [`multiply`]; the types must be the product's.
unsafe fn multiply_as<A: Element, O: Element>(product: &Product) {
    for i in 0..product.count {
        let [a, w, out] = product.steps.map(|step| i * step);
        let place = |address: Address, numbers: usize, size: usize| match address {
            Address::NONE => address,
            address => address.plus(numbers * size),
        };
        let one = Product {
            a: place(product.a, a, size_of::<A>()),
            w: place(product.w, w, size_of::<A>()),
            out: place(product.out, out, size_of::<O>()),
            added: place(product.added, out, size_of::<O>()),
            ..*product
        };
        // SAFETY: the caller's promise.
        unsafe { multiply_one::<A, O>(&one) };
    }
}

/// # Safety
/// As for [`multiply_as`]; of the product's matrices it makes the first.
unsafe fn multiply_one<A: Element, O: Element>(product: &Product) {
    let Product { a, a_stride, w, w_stride, layout, out, out_stride, added, dims, .. } = *product;
    let [rows, columns, contracted] = dims;
    let [w_rows, w_columns] = match layout {
        Layout::ColumnsAsRows => [columns, contracted],
        Layout::Rows => [contracted, columns],
    };
    // SAFETY: the caller's promise.
    let (a, w) = unsafe {
        (
            std::slice::from_raw_parts(a.0 as *const A, (rows - 1) * a_stride + contracted),
            std::slice::from_raw_parts(w.0 as *const A, (w_rows - 1) * w_stride + w_columns),
        )
    };
    (0..rows).into_par_iter().for_each(|row| {
        // SAFETY: the caller's promise; rows do not overlap, and the result is not read through other names meanwhile.
        let out = unsafe { std::slice::from_raw_parts_mut((out.0 as *mut O).add(row * out_stride), columns) };
        let a = &a[row * a_stride..][..contracted];
        for (column, out) in out.iter_mut().enumerate() {
            let number = |k: usize| match layout {
                Layout::ColumnsAsRows => w[column * w_stride + k].widen(),
                Layout::Rows => w[k * w_stride + column].widen(),
            };
            let sum: f32 = a.iter().enumerate().map(|(k, a)| a.widen() * number(k)).sum();
            let place = row * out_stride + column;
            let added = match added {
                Address::NONE => 0.0,
                // SAFETY: as many numbers as the result has, and this one is not written before it is read.
                Address(address) => unsafe { *(address as *const O).add(place) }.widen(),
            };
            *out = O::narrow(sum + added);
        }
    });
}
