//! Attention keeps nothing of the size of its scores: what it allocates grows with the rows, and not with their square.
#![allow(unsafe_code)]

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering};

use candle_core::{DType, Device, Tensor};
use incipit_kernels::{Attention, Segments, attention, attention_gradient};

/// The system's allocator, with a count of the bytes in use and of their peak.
struct Counting;

static USED: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);

// SAFETY: all work is done by the system's allocator, to which each call goes with the same arguments.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let used = USED.fetch_add(layout.size(), Ordering::SeqCst) + layout.size();
        PEAK.fetch_max(used, Ordering::SeqCst);
        // SAFETY: the caller's promise.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        USED.fetch_sub(layout.size(), Ordering::SeqCst);
        // SAFETY: the caller's promise.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Bytes that forward and backward of one example of `rows` rows need at once, beside their operands.
fn peak(rows: usize, dtype: DType) -> usize {
    let (heads, width) = (2, 16);
    let random = || Tensor::randn(0f32, 0.3, (rows, heads * width), &Device::Cpu)?.to_dtype(dtype);
    let [q, k, v, dy] = [0; 4].map(|_| random().expect("a tensor"));
    let segments = Segments::new([rows]);
    let spec = Attention {
        queries: &segments,
        keys: &segments,
        heads,
        bias: None,
        causal: false,
        prefix: 0,
        dropout: None,
    };
    let before = USED.load(Ordering::SeqCst);
    PEAK.store(before, Ordering::SeqCst);
    let attended = attention(&spec, &q, &k, &v).expect("attention");
    let gradients = attention_gradient(&spec, [&q, &k, &v], &attended, &dy).expect("its gradient");
    drop(gradients);
    PEAK.load(Ordering::SeqCst) - before
}

#[test]
fn attention_memory_grows_with_the_rows_and_not_with_their_square() {
    let pool = rayon::ThreadPoolBuilder::new().num_threads(1).build().expect("a pool");
    pool.install(|| {
        for dtype in [DType::BF16, DType::F32] {
            peak(64, dtype);
            let (once, twice) = (peak(2048, dtype), peak(4096, dtype));
            println!("{dtype:?}: {once} bytes for 2048 rows, {twice} for 4096");
            assert!(twice < 4096 * 4096 * 4 / 4, "{twice} bytes: a matrix of scores has 64 MiB");
            assert!(twice as f64 <= 2.1 * once as f64, "{once} bytes for 2048 rows and {twice} for 4096");
        }
    });
}
