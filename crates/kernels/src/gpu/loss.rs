//! Softmax and cross-entropy.

use candle_core::{DType, Tensor};

use super::{Address, Gpu, Launch, Params, suffix};
use crate::loss::{LossSlope, Softmax, Targets};
use crate::{Result, tensor::dims2};

const THREADS: u32 = 512;

/// `LossParams` of `loss.cuh`.
#[derive(Clone, Copy)]
#[repr(C)]
struct LossParams {
    logits: Address,
    targets: Address,
    top: Address,
    total: Address,
    target: Address,
    normalisers: Address,
    scale: Address,
    out: Address,
    columns: i32,
    z_loss: f32,
}
// SAFETY: the C++ struct has the same fields.
unsafe impl Params for LossParams {}

impl LossParams {
    fn new(logits: Address, targets: Address, columns: usize) -> Self {
        let none = Address::NONE;
        Self {
            logits,
            targets,
            top: none,
            total: none,
            target: none,
            normalisers: none,
            scale: none,
            out: none,
            columns: columns as i32,
            z_loss: 0.0,
        }
    }
}

/// Columns of the targets among those that are here, -1 where they are elsewhere.
fn columns(targets: Targets<'_>, held: usize) -> Vec<i32> {
    let place = |id: &u32| targets.vocabulary.place(*id, held).map_or(-1, |place| place as i32);
    targets.ids.iter().map(place).collect()
}

/// The softmax of logits that were checked.
pub(crate) fn softmax(gpu: &Gpu, logits: &Tensor, targets: Targets<'_>) -> Result<Softmax> {
    let op = "softmax";
    let (rows, held) = dims2(op, logits)?;
    super::elementwise::expect_f32(op, logits)?;
    let places = gpu.upload(op, &columns(targets, held))?;
    let logits = gpu.operand(op, logits)?;
    let [top, total, target] = [(); 3].map(|()| gpu.output(op, &[rows], DType::F32));
    let (top, total, target) = (top?, total?, target?);
    let params = LossParams {
        top: top.address,
        total: total.address,
        target: target.address,
        ..LossParams::new(logits.address, places.address, held)
    };
    // SAFETY: the shapes were checked.
    unsafe { gpu.launch(op, Launch::blocks(rows, THREADS), &params)? };
    Ok(Softmax { top: top.tensor(), total: total.tensor(), target: target.tensor() })
}

/// `BestParams` of `loss.cuh`.
#[derive(Clone, Copy)]
#[repr(C)]
struct BestParams {
    logits: Address,
    out: Address,
    columns: i32,
}
// SAFETY: the C++ struct has the same fields.
unsafe impl Params for BestParams {}

/// Each row's best column and its log-probability, `[T, 2]` f32.
pub(crate) fn best(gpu: &Gpu, logits: &Tensor) -> Result<Tensor> {
    let op = "best";
    let (rows, columns) = dims2(op, logits)?;
    super::elementwise::expect_f32(op, logits)?;
    let logits = gpu.operand(op, logits)?;
    let out = gpu.output(op, &[rows, 2], DType::F32)?;
    let params = BestParams { logits: logits.address, out: out.address, columns: columns as i32 };
    // SAFETY: the shapes were checked.
    unsafe { gpu.launch(op, Launch::blocks(rows, THREADS), &params)? };
    Ok(out.tensor())
}

/// The gradient to logits that were checked.
pub(crate) fn cross_entropy_gradient(
    gpu: &Gpu,
    logits: &Tensor,
    targets: Targets<'_>,
    slope: LossSlope<'_>,
    out: DType,
) -> Result<Tensor> {
    let op = "cross_entropy_gradient";
    let (rows, held) = dims2(op, logits)?;
    super::elementwise::expect_f32(op, logits)?;
    let places = gpu.upload(op, &columns(targets, held))?;
    let scale = gpu.upload(op, slope.scale)?;
    let (logits, normalisers) = (gpu.operand(op, logits)?, gpu.operand(op, slope.normalisers)?);
    let gradient = gpu.output(op, &[rows, held], out)?;
    let params = LossParams {
        normalisers: normalisers.address,
        scale: scale.address,
        out: gradient.address,
        z_loss: slope.z_loss,
        ..LossParams::new(logits.address, places.address, held)
    };
    // SAFETY: the shapes were checked.
    unsafe { gpu.launch(&format!("{op}_{}", suffix(out)), Launch::blocks(rows, THREADS), &params)? };
    Ok(gradient.tensor())
}
