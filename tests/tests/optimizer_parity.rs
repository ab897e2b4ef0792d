//! 20 steps of every optimizer against `tests/goldens/optimizers.safetensors`, which `scripts/goldens/optimizers.py` made:
//! T5X's Adafactor by an implementation of its own in float64, the others by PyTorch in float64.

use std::collections::HashMap;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use candle_core::{DType, Device, Tensor};
use incipit_tune::optimizer::{Optimizer, OptimizerKind};

struct Goldens(HashMap<String, Tensor>);

impl Goldens {
    fn load() -> Result<Self> {
        let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("goldens/optimizers.safetensors");
        Ok(Self(candle_core::safetensors::load(file, &Device::Cpu)?))
    }

    fn values(&self, key: &str) -> Result<Vec<f32>> {
        let tensor = self.0.get(key).with_context(|| format!("no golden {key}"))?;
        Ok(tensor.to_dtype(DType::F32)?.flatten_all()?.to_vec1()?)
    }

    /// The gradients of a prompt that T5X factors: `f32(a_t A + b_t B)`.
    fn large_gradients(&self) -> Result<Vec<Vec<f32>>> {
        let (a, b) = (self.values("large.gradient_a")?, self.values("large.gradient_b")?);
        let mix =
            |w: &[f32], a: &f32, b: &f32| f64::from(w[0]) * f64::from(*a) + f64::from(w[1]) * f64::from(*b);
        let weights = self.values("large.weights")?;
        Ok(weights.chunks(2).map(|w| a.iter().zip(&b).map(|(a, b)| mix(w, a, b) as f32).collect()).collect())
    }
}

fn assert_near(what: &str, ours: &[f32], golden: &[f32], start: &[f32]) -> Result<()> {
    ensure!(ours.len() == golden.len(), "{what}: {} numbers instead of {}", ours.len(), golden.len());
    let moved = golden.iter().zip(start).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    let size = golden.iter().map(|x| x.abs()).fold(0.0, f32::max);
    let apart = ours.iter().zip(golden).map(|(a, b)| if a.is_nan() { f32::INFINITY } else { (a - b).abs() });
    let apart = apart.fold(0.0, f32::max);
    println!("{what}: {apart:.1e} off, {moved:.1e} moved, {size:.1e} at most");
    ensure!(
        apart <= 1e-5 * moved + 2e-6 * size,
        "{what} is off by {apart:.2e} after having moved by {moved:.2e}"
    );
    Ok(())
}

fn assert_small_follows(name: &str, kind: &OptimizerKind, lr: f32) -> Result<()> {
    let goldens = Goldens::load()?;
    let start = goldens.values("small.initial")?;
    let (gradients, steps) = (goldens.values("small.gradients")?, goldens.values(&format!("small.{name}"))?);
    let (mut prompt, mut optimizer) = (start.clone(), Optimizer::new(kind, 7, 16));
    let pairs = gradients.chunks(start.len()).zip(steps.chunks(start.len()));
    for (step, (gradient, golden)) in pairs.enumerate() {
        optimizer.step(&mut prompt, gradient, lr);
        assert_near(&format!("{name}, step {}", step + 1), &prompt, golden, &start)?;
    }
    ensure!(optimizer.num_steps() == 20, "{} steps instead of 20", optimizer.num_steps());
    Ok(())
}

fn assert_large_follows(name: &str, kind: &OptimizerKind, lr: f32) -> Result<()> {
    let goldens = Goldens::load()?;
    let start: Vec<f32> =
        goldens.values("large.gradient_b")?.iter().map(|b| (30.0 * f64::from(*b)) as f32).collect();
    let (mut prompt, mut optimizer) = (start.clone(), Optimizer::new(kind, 150, 160));
    for gradient in goldens.large_gradients()? {
        optimizer.step(&mut prompt, &gradient, lr);
    }
    assert_near(&format!("{name}, factored"), &prompt, &goldens.values(&format!("large.{name}"))?, &start)
}

#[test]
fn adafactor_takes_t5x_steps_from_the_papers_counter() -> Result<()> {
    let kind = OptimizerKind::adafactor(1e-5, 0);
    assert_small_follows("adafactor_paper", &kind, 0.3)?;
    assert_large_follows("adafactor_paper", &kind, 0.3)
}

#[test]
fn adafactor_takes_t5x_steps_from_the_released_codes_counter() -> Result<()> {
    let kind = OptimizerKind::adafactor(1e-5, 1_100_000);
    assert_small_follows("adafactor_released_code", &kind, 0.3)?;
    assert_large_follows("adafactor_released_code", &kind, 0.3)
}

/// The documented difference: where both factor, transformers' weight decay is ours times the learning rate.
#[test]
fn adafactor_with_the_weight_decay_scaled_takes_transformers_steps_where_both_factor() -> Result<()> {
    assert_large_follows("transformers_adafactor", &OptimizerKind::adafactor(0.3 * 1e-5, 0), 0.3)
}

#[test]
fn adafactor_does_not_take_transformers_steps_where_t5x_does_not_factor() -> Result<()> {
    let same = assert_small_follows("transformers_adafactor", &OptimizerKind::adafactor(0.3 * 1e-5, 0), 0.3);
    ensure!(same.is_err(), "a prompt of 7 rows was factored");
    Ok(())
}

#[test]
fn adamw_takes_pytorchs_steps() -> Result<()> {
    assert_small_follows("adamw", &OptimizerKind::adamw(0.01), 0.05)
}

#[test]
fn sgd_takes_pytorchs_steps() -> Result<()> {
    assert_small_follows("sgd", &OptimizerKind::sgd(0.0, 1e-4), 0.5)?;
    assert_small_follows("sgd_momentum", &OptimizerKind::sgd(0.9, 1e-4), 0.5)
}
