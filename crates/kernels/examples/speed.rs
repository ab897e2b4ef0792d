//! How fast each operation is at the shapes of T5-base: `cargo run -p incipit-kernels --example speed [filter]`.
//!
//! Products are given in GFLOP/s (useful operations), the others in GB/s (bytes that must be read or written once); each
//! figure is the best of several runs, which are short, so that one of them finds the core free. `INCIPIT_ISA` chooses the instructions, `RAYON_NUM_THREADS` the threads.

use std::hint::black_box;
use std::time::{Duration, Instant};

use candle_core::{DType, Device, Tensor};
use incipit_kernels::{
    Activation, Attention, Buckets, Dropout, Frozen, LossSlope, PositionBias, Result, Segments, Softmax,
    Targets, Vocabulary, attention, attention_gradient, cross_entropy_gradient, dropout, gated,
    gated_gradient, isa, linear, linear_gradient, rms_norm, rms_norm_gradient,
};

/// That of the program: it gives buffers that begin with a cache line, without which products in AMX tiles take three times as long.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Width of the model, and number and width of its heads.
const D: usize = 768;
const HEADS: usize = 12;
const HEAD: usize = 64;

fn main() -> Result<()> {
    let filter = std::env::args().nth(1).unwrap_or_default();
    println!("{} with {} threads", isa().name(), rayon::current_num_threads());
    for dtype in [DType::BF16, DType::F32] {
        let report =
            |name: &str, unit: &str, amount: f64, run: &mut dyn FnMut() -> Result<()>| -> Result<()> {
                let name = format!("{dtype:?} {name}");
                if name.contains(&filter) {
                    let best = best(run)?.as_secs_f64();
                    println!("{name:<44} {:>9.3} ms {:>8.1} {unit}", best * 1e3, amount / best / 1e9);
                }
                Ok(())
            };
        linears(dtype, &report)?;
        attentions(dtype, &report)?;
        elementwise(dtype, &report)?;
    }
    Ok(())
}

type Report<'a> = &'a dyn Fn(&str, &str, f64, &mut dyn FnMut() -> Result<()>) -> Result<()>;

/// The shortest of the runs that fit into a third of a second, of at least five.
fn best(run: &mut dyn FnMut() -> Result<()>) -> Result<Duration> {
    let begin = Instant::now();
    let mut best = Duration::MAX;
    for i in 0.. {
        let from = Instant::now();
        run()?;
        best = best.min(from.elapsed());
        if i >= 5 && begin.elapsed() > Duration::from_millis(330) {
            break;
        }
    }
    Ok(best)
}

fn random(dims: &[usize], dtype: DType) -> Result<Tensor> {
    Ok(Tensor::randn(0f32, 1.0, dims, &Device::Cpu)?.to_dtype(dtype)?)
}

fn weight(rows: usize, cols: usize, dtype: DType) -> Frozen {
    let values = (0..rows * cols).map(|i| (i % 97) as f32 * 0.01 - 0.5);
    match dtype {
        DType::BF16 => Frozen::from_bf16(values.map(half::bf16::from_f32).collect(), rows, cols),
        _ => Frozen::from_f32(values.collect(), rows, cols),
    }
}

fn linears(dtype: DType, report: Report<'_>) -> Result<()> {
    for (m, n, k) in [
        (2048, 2048, D),
        (2048, D, D),
        (2048, D, 2048),
        (512, 2048, D),
        (512, D, D),
        (512, D, 2048),
        (256, D, D),
        (32, D, D),
        (8, D, D),
        (1, D, D),
    ] {
        let (x, dy, w) = (random(&[m, k], dtype)?, random(&[m, n], dtype)?, weight(n, k, dtype));
        let flops = 2.0 * (m * n * k) as f64;
        report(&format!("linear {m} x {n} x {k}"), "GFLOP/s", flops, &mut || {
            linear(&x, &w, dtype).map(|y| drop(black_box(y)))
        })?;
        report(&format!("linear_gradient {m} x {n} x {k}"), "GFLOP/s", flops, &mut || {
            linear_gradient(&[(&dy, &w)], dtype).map(|y| drop(black_box(y)))
        })?;
    }
    Ok(())
}

fn attentions(dtype: DType, report: Report<'_>) -> Result<()> {
    let buckets = Buckets { count: 32, max_distance: 128, bidirectional: true };
    for (examples, rows, rate) in [(4, 122, 0.0), (2, 160, 0.0), (2, 192, 0.0), (2, 303, 0.0), (2, 303, 0.1)]
    {
        let segments = Segments::new(vec![rows; examples]);
        let bias = PositionBias::new(&weight(32, HEADS, DType::F32), buckets, rows)?;
        let masks = Dropout::new(rate, (0..examples as u64).collect())?;
        let spec = Attention {
            queries: &segments,
            keys: &segments,
            heads: HEADS,
            bias: Some(&bias),
            causal: false,
            prefix: 0,
            dropout: (rate > 0.0).then_some(&masks),
        };
        let dims = [segments.total(), HEADS * HEAD];
        let q = (random(&dims, DType::F32)? * 0.3)?.to_dtype(dtype)?;
        let (k, v, dy) = (random(&dims, dtype)?, random(&dims, dtype)?, random(&dims, dtype)?);
        let flops = 4.0 * (examples * HEADS * rows * rows * HEAD) as f64;
        let what = format!("{examples} x {rows}, dropout {rate}");
        report(&format!("attention {what}"), "GFLOP/s", flops, &mut || {
            attention(&spec, &q, &k, &v).map(|y| drop(black_box(y.output)))
        })?;
        let attended = attention(&spec, &q, &k, &v)?;
        report(&format!("attention_gradient {what}"), "GFLOP/s", 2.5 * flops, &mut || {
            attention_gradient(&spec, [&q, &k, &v], &attended, &dy).map(|y| drop(black_box(y)))
        })?;
    }
    Ok(())
}

fn elementwise(dtype: DType, report: Report<'_>) -> Result<()> {
    let rows = 2048;
    let bytes = |f32s: usize, others: usize, width: usize| {
        (rows * width * (4 * f32s + dtype.size_in_bytes() * others)) as f64
    };
    let (x, dy) = (random(&[rows, D], DType::F32)?, random(&[rows, D], DType::F32)?);
    let scale = random(&[D], DType::F32)?;
    report("rms_norm", "GB/s", bytes(1, 1, D), &mut || {
        rms_norm(&x, &scale, 1e-6, dtype).map(|y| drop(black_box(y)))
    })?;
    report("rms_norm_gradient", "GB/s", bytes(4, usize::from(dtype != DType::F32), D), &mut || {
        rms_norm_gradient(&dy, &x, &scale, 1e-6, Some(&x), dtype).map(|y| drop(black_box(y)))
    })?;
    let (gate, up) = (random(&[rows, 2048], dtype)?, random(&[rows, 2048], dtype)?);
    report("gated gelu_new", "GB/s", bytes(0, 3, 2048), &mut || {
        gated(Activation::GeluNew, &gate, &up).map(|y| drop(black_box(y)))
    })?;
    report("gated_gradient gelu_new", "GB/s", bytes(0, 5, 2048), &mut || {
        gated_gradient(Activation::GeluNew, &up, &gate, &up).map(|y| drop(black_box(y)))
    })?;
    let segments = Segments::new([1000, 1048]);
    let masks = Dropout::new(0.1, vec![1, 2])?;
    report("dropout", "GB/s", bytes(0, 2, 2048), &mut || {
        dropout(&gate, &segments, &masks).map(|y| drop(black_box(y)))
    })?;
    let (logits, targets) = (random(&[128, 32_128], DType::F32)?, vec![7; 128]);
    let size = (128 * 32_128 * (4 + dtype.size_in_bytes())) as f64;
    report("cross_entropy_gradient 128 x 32128", "GB/s", size, &mut || {
        let targets = Targets { ids: &targets, vocabulary: Vocabulary::whole(32_128) };
        let normalisers = Softmax::new(&logits, targets)?.normalisers()?;
        let slope = LossSlope { normalisers: &normalisers, scale: &[1.0; 128], z_loss: 0.0 };
        cross_entropy_gradient(&logits, targets, slope, dtype).map(|y| drop(black_box(y)))
    })
}
