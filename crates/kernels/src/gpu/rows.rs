//! Whole rows: embeddings, dropout, and exact sums of gradients.

use candle_core::{DType, Tensor};

use super::elementwise::over;
use super::{Address, Gpu, Launch, Params, suffix};
use crate::dropout::Dropout;
use crate::frozen::Frozen;
use crate::segments::Segments;
use crate::tensor::dims2;
use crate::{Error, Result};

const THREADS: u32 = 256;
/// `NO_ROW` of `rows.cuh`.
pub(crate) const NO_ROW: i32 = i32::MIN;

/// `EmbedParams` of `rows.cuh`.
#[derive(Clone, Copy)]
#[repr(C)]
struct EmbedParams {
    table: Address,
    prompts: Address,
    rows: Address,
    out: Address,
    stride: i64,
    width: i32,
}
// SAFETY: the C++ struct has the same fields.
unsafe impl Params for EmbedParams {}

/// The rows that `rows` names: of the table from 0 on, of `prompts` `[n, D]` f32 by -1, -2, ..., or zeros ([`NO_ROW`]). They were
/// checked.
pub(crate) fn embed(gpu: &Gpu, table: &Frozen, prompts: Option<&Tensor>, rows: &[i32]) -> Result<Tensor> {
    let op = "embed";
    let weight =
        table.on_device().ok_or_else(|| Error::Device { op, device: "the host's memory".to_owned() })?;
    let weight = gpu.operand(op, weight)?;
    let (_held, prompts) = gpu.optional(op, prompts)?;
    let out = gpu.output(op, &[rows.len(), table.cols()], DType::F32)?;
    let count = rows.len();
    let rows = gpu.upload(op, rows)?;
    let params = EmbedParams {
        table: weight.address.plus(table.offset() * table.dtype().size_in_bytes()),
        prompts,
        rows: rows.address,
        out: out.address,
        stride: table.stride() as i64,
        width: table.cols() as i32,
    };
    // SAFETY: every row is one of the table or of the prompts.
    unsafe {
        gpu.launch(&format!("embed_{}", suffix(table.dtype())), Launch::blocks(count, THREADS), &params)?;
    };
    Ok(out.tensor())
}

/// `EmbedGradientParams` of `rows.cuh`.
#[derive(Clone, Copy)]
#[repr(C)]
struct EmbedGradientParams {
    dx: Address,
    ends: Address,
    order: Address,
    out: Address,
    width: i32,
}
// SAFETY: the C++ struct has the same fields.
unsafe impl Params for EmbedGradientParams {}

/// Row `r` is the sum of the rows `order[ends[r] .. ends[r + 1]]` of `dx`, which are all there.
pub(crate) fn embed_gradient(gpu: &Gpu, dx: &Tensor, (ends, order): (&[u32], &[u32])) -> Result<Tensor> {
    let op = "embed_gradient";
    super::elementwise::expect_f32(op, dx)?;
    let (rows, width) = (ends.len() - 1, dims2(op, dx)?.1);
    let dx = gpu.operand(op, dx)?;
    let (ends, order) = (gpu.upload(op, ends)?, gpu.upload(op, order)?);
    let out = gpu.output(op, &[rows, width], DType::F32)?;
    let params = EmbedGradientParams {
        dx: dx.address,
        ends: ends.address,
        order: order.address,
        out: out.address,
        width: width as i32,
    };
    // SAFETY: the caller's rows are those of `dx`, and the result has a row for each end.
    unsafe { gpu.launch(op, Launch::blocks(rows, THREADS), &params)? };
    Ok(out.tensor())
}

/// `Dropping` of `common.cuh`.
#[derive(Clone, Copy)]
#[repr(C)]
pub(super) struct Dropping {
    pub(super) threshold: u32,
    pub(super) kept: f32,
}

impl Dropping {
    pub(super) const NONE: Dropping = Dropping { threshold: 0, kept: 1.0 };
}

/// `DropoutParams` of `rows.cuh`.
#[derive(Clone, Copy)]
#[repr(C)]
struct DropoutParams {
    x: Address,
    out: Address,
    offsets: Address,
    random: Address,
    dropping: Dropping,
    examples: i32,
    width: i32,
    first: i32,
    total: i32,
}
// SAFETY: the C++ struct has the same fields.
unsafe impl Params for DropoutParams {}

/// `x` `[T, D]` with numbers dropped; the shapes were checked.
pub(crate) fn dropout(gpu: &Gpu, x: &Tensor, segments: &Segments, dropout: &Dropout) -> Result<Tensor> {
    let op = "dropout";
    let (rows, width) = dims2(op, x)?;
    let (first, total) = dropout.columns().unwrap_or((0, width));
    let random: Vec<[u32; 4]> =
        (0..segments.len()).map(|example| dropout.row_masks(example).words()).collect();
    let random = gpu.upload(op, &random)?;
    let offsets = segments.offsets_on(gpu)?;
    let (threshold, kept) = dropout.threshold();
    let dtype = x.dtype();
    let x = gpu.operand(op, x)?;
    let out = gpu.output(op, &[rows, width], dtype)?;
    let params = DropoutParams {
        x: x.address,
        out: out.address,
        offsets,
        random: random.address,
        dropping: Dropping { threshold, kept },
        examples: segments.len() as i32,
        width: width as i32,
        first: first as i32,
        total: total as i32,
    };
    // SAFETY: the shapes were checked.
    unsafe { gpu.launch(&format!("dropout_{}", suffix(dtype)), Launch::blocks(rows, THREADS), &params)? };
    Ok(out.tensor())
}

/// `LargestParams` of `rows.cuh`.
#[derive(Clone, Copy)]
#[repr(C)]
struct LargestParams {
    x: Address,
    largest: Address,
    count: i64,
}
// SAFETY: the C++ struct has the same fields.
unsafe impl Params for LargestParams {}

/// The bits of the largest absolute value of each tensor, 0 of an empty one: f32 numbers, all on `gpu`. Waits for the device.
pub(crate) fn largest_bits(gpu: &Gpu, tensors: &[&Tensor]) -> Result<Vec<u32>> {
    let op = "largest";
    let Some(first) = tensors.first() else { return Ok(Vec::new()) };
    // An absolute value is the number that its bits are.
    let results = Tensor::zeros(tensors.len(), DType::F32, first.device())?;
    let largest = gpu.operand(op, &results)?.address;
    for (i, x) in tensors.iter().enumerate() {
        let count = x.elem_count();
        let x = gpu.operand(op, x)?;
        let params = LargestParams { x: x.address, largest: largest.plus(4 * i), count: count as i64 };
        // SAFETY: `count` numbers, and one result each.
        unsafe { gpu.launch("largest_bits", over(count), &params)? };
    }
    Ok(results.to_vec1::<f32>()?.into_iter().map(f32::to_bits).collect())
}

/// `SumParams` of `rows.cuh`.
#[derive(Clone, Copy)]
#[repr(C)]
struct SumParams {
    x: Address,
    sum: Address,
    values: Address,
    count: i64,
    scale: f64,
}
// SAFETY: the C++ struct has the same fields.
unsafe impl Params for SumParams {}

/// `sum[first ..] += x * scale`, rounded to integers: `sum` is i64, `x` f32, and as many numbers are there.
pub(crate) fn quantize_add(gpu: &Gpu, sum: &Tensor, first: usize, x: &Tensor, scale: f64) -> Result<()> {
    let op = "quantize_add";
    let count = x.elem_count();
    if first + count > sum.elem_count() || sum.dtype() != DType::I64 {
        return Err(Error::Shape {
            op,
            what: format!("{count} numbers from {first} on do not fit into {sum:?}"),
        });
    }
    let (sum, x) = (gpu.operand(op, sum)?, gpu.operand(op, x)?);
    let params = SumParams {
        x: x.address,
        sum: sum.address.plus(8 * first),
        values: Address::NONE,
        count: count as i64,
        scale,
    };
    // SAFETY: the bounds were checked.
    unsafe { gpu.launch(op, over(count), &params) }
}

/// `sum[first .. first + count] * scale` as f32.
pub(crate) fn dequantize(
    gpu: &Gpu,
    sum: &Tensor,
    (first, count): (usize, usize),
    scale: f64,
) -> Result<Tensor> {
    let op = "dequantize";
    if first + count > sum.elem_count() || sum.dtype() != DType::I64 {
        return Err(Error::Shape { op, what: format!("{count} numbers from {first} on are not in {sum:?}") });
    }
    let sum = gpu.operand(op, sum)?;
    let values = gpu.output(op, &[count], DType::F32)?;
    let params = SumParams {
        x: Address::NONE,
        sum: sum.address.plus(8 * first),
        values: values.address,
        count: count as i64,
        scale,
    };
    // SAFETY: the bounds were checked.
    unsafe { gpu.launch(op, over(count), &params)? };
    Ok(values.tensor())
}
