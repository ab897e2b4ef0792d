//! Number by number: rounding, sums, activations; and RMSNorm.

use candle_core::{DType, Tensor};

use super::{Address, Gpu, Launch, Params, Rows, suffix};
use crate::tensor::{dims2, expect_dims};
use crate::{Activation, Error, Result};

/// `ElementwiseParams` of `elementwise.cuh`.
#[derive(Clone, Copy)]
#[repr(C)]
struct ElementwiseParams {
    operands: [Rows; 3],
    outputs: [Rows; 2],
    /// 1 where no rows lie apart.
    rows: i64,
    columns: i64,
}
// SAFETY: the C++ struct has the same fields.
unsafe impl Params for ElementwiseParams {}

const THREADS: u32 = 256;
/// Numbers that a thread takes: enough blocks for any GPU, and no more than it can start at once.
const PER_THREAD: usize = 8;
const MOST_BLOCKS: usize = 8192;

/// Blocks for a loop over `count` numbers.
pub(super) fn over(count: usize) -> Launch {
    Launch::blocks(count.div_ceil(THREADS as usize * PER_THREAD).min(MOST_BLOCKS), THREADS)
}

/// `OUT` results of type `out`, of operands that are all of one type and shape. Several lie as the first operands do.
fn elementwise<const OUT: usize>(
    gpu: &Gpu,
    (op, kernel): (&'static str, &str),
    operands: &[&Tensor],
    out: DType,
) -> Result<[Tensor; OUT]> {
    let (rows, columns) = dims2(op, operands[0])?;
    for operand in operands {
        expect_dims(op, "an operand", operand, &[rows, columns])?;
        if operand.dtype() != operands[0].dtype() {
            return Err(Error::Shape { op, what: "the operands are of different types".to_owned() });
        }
    }
    let results = gpu.matrices_like(op, &operands[..OUT], out)?;
    let inputs = operands.iter().map(|operand| gpu.matrix(op, operand)).collect::<Result<Vec<_>>>()?;
    let outputs = results.iter().map(|result| gpu.matrix(op, result)).collect::<Result<Vec<_>>>()?;
    let apart = inputs.iter().chain(&outputs).any(|matrix| matrix.stride != columns);
    let (rows, columns) = if apart { (rows, columns) } else { (1, rows * columns) };
    let mut params = ElementwiseParams {
        operands: [Rows::NONE; 3],
        outputs: [Rows::NONE; 2],
        rows: rows as i64,
        columns: columns as i64,
    };
    params.operands.iter_mut().zip(&inputs).for_each(|(to, matrix)| *to = matrix.rows());
    params.outputs.iter_mut().zip(&outputs).for_each(|(to, matrix)| *to = matrix.rows());
    // SAFETY: all operands and outputs have as many rows and columns.
    unsafe { gpu.launch(kernel, over(rows * columns), &params)? };
    drop((inputs, outputs));
    Ok(results.try_into().unwrap_or_else(|_| unreachable!("{OUT} results were made")))
}

/// An f32 tensor rounded to bf16.
pub(crate) fn rounded(gpu: &Gpu, x: &Tensor) -> Result<Tensor> {
    expect_f32("rounded", x)?;
    let [y] = elementwise(gpu, ("rounded", "round_bf16"), &[x], DType::BF16)?;
    Ok(y)
}

/// `a + b`, both f32.
pub(crate) fn add(gpu: &Gpu, a: &Tensor, b: &Tensor) -> Result<Tensor> {
    expect_f32("add", a)?;
    let [sum] = elementwise(gpu, ("add", "add_f32"), &[a, b], DType::F32)?;
    Ok(sum)
}

pub(super) fn expect_f32(op: &'static str, x: &Tensor) -> Result<()> {
    match x.dtype() {
        DType::F32 => Ok(()),
        other => Err(Error::Shape { op, what: format!("an operand is {other:?} where f32 is expected") }),
    }
}

/// `function` of the activation, over operands of one type.
pub(crate) fn activation<const OUT: usize>(
    gpu: &Gpu,
    (op, act): (&'static str, Activation),
    operands: &[&Tensor],
) -> Result<[Tensor; OUT]> {
    let act = match act {
        Activation::Relu => "relu",
        Activation::GeluNew => "gelu_new",
        Activation::Silu => "silu",
    };
    let dtype = operands[0].dtype();
    elementwise(gpu, (op, &format!("{op}_{act}_{}", suffix(dtype))), operands, dtype)
}

/// `NormParams` of `norm.cuh`.
#[derive(Clone, Copy)]
#[repr(C)]
struct NormParams {
    x: Address,
    weight: Address,
    dy: Address,
    residual: Address,
    scales: Address,
    out: Address,
    rounded: Address,
    rows: i32,
    width: i32,
    epsilon: f32,
    aligned: i32,
}
// SAFETY: the C++ struct has the same fields.
unsafe impl Params for NormParams {}

impl NormParams {
    fn new(x: Address, out: Address, (rows, width): (usize, usize), epsilon: f32) -> Self {
        let none = Address::NONE;
        Self {
            x,
            weight: none,
            dy: none,
            residual: none,
            scales: none,
            out,
            rounded: none,
            rows: rows as i32,
            width: width as i32,
            epsilon,
            aligned: 0,
        }
    }

    /// Knows whether four numbers can be read and written at once.
    fn with_alignment(mut self) -> Self {
        let places = [self.x, self.weight, self.dy, self.residual, self.out, self.rounded];
        let aligned = self.width % 4 == 0 && places.iter().all(|Address(place)| place % 16 == 0);
        self.aligned = i32::from(aligned);
        self
    }
}

pub(crate) fn rms_norm(gpu: &Gpu, x: &Tensor, weight: &Tensor, epsilon: f32, out: DType) -> Result<Tensor> {
    let op = "rms_norm";
    let (rows, width) = dims2(op, x)?;
    expect_dims(op, "the weight", weight, &[width])?;
    expect_f32(op, x)?;
    expect_f32(op, weight)?;
    let (x, weight) = (gpu.operand(op, x)?, gpu.operand(op, weight)?);
    let y = gpu.output(op, &[rows, width], out)?;
    let params = NormParams {
        weight: weight.address,
        ..NormParams::new(x.address, y.address, (rows, width), epsilon)
    }
    .with_alignment();
    // SAFETY: the shapes were checked.
    unsafe { gpu.launch(&format!("rms_norm_{}", suffix(out)), Launch::blocks(rows, THREADS), &params)? };
    Ok(y.tensor())
}

pub(crate) fn rms_norm_gradient(
    gpu: &Gpu,
    [dy, x, weight]: [&Tensor; 3],
    epsilon: f32,
    residual: Option<&Tensor>,
    out: DType,
) -> Result<(Tensor, Tensor)> {
    let op = "rms_norm_gradient";
    let (rows, width) = dims2(op, x)?;
    expect_dims(op, "the gradient", dy, &[rows, width])?;
    expect_dims(op, "the weight", weight, &[width])?;
    for operand in [Some(dy), Some(x), Some(weight), residual].into_iter().flatten() {
        expect_f32(op, operand)?;
    }
    if let Some(residual) = residual {
        expect_dims(op, "the residual", residual, &[rows, width])?;
    }
    let (dy, x, weight) = (gpu.operand(op, dy)?, gpu.operand(op, x)?, gpu.operand(op, weight)?);
    let (_held, residual) = gpu.optional(op, residual)?;
    let dx = gpu.output(op, &[rows, width], DType::F32)?;
    let rounded = (out != DType::F32).then(|| gpu.output(op, &[rows, width], out)).transpose()?;
    let params = NormParams {
        weight: weight.address,
        dy: dy.address,
        residual,
        rounded: rounded.as_ref().map_or(Address::NONE, |rounded| rounded.address),
        ..NormParams::new(x.address, dx.address, (rows, width), epsilon)
    }
    .with_alignment();
    // SAFETY: the shapes were checked.
    unsafe { gpu.launch(op, Launch::blocks(rows, THREADS), &params)? };
    let dx = dx.tensor();
    let rounded = rounded.map_or_else(|| dx.clone(), |rounded| rounded.tensor());
    Ok((dx, rounded))
}

/// Threads of a block that sums the rows of 32 columns.
const COLUMN_THREADS: u32 = 512;

pub(crate) fn rms_norm_weight_gradient(gpu: &Gpu, dy: &Tensor, x: &Tensor, epsilon: f32) -> Result<Tensor> {
    let op = "rms_norm_weight_gradient";
    let (rows, width) = dims2(op, x)?;
    expect_dims(op, "the gradient", dy, &[rows, width])?;
    expect_f32(op, dy)?;
    expect_f32(op, x)?;
    let (dy, x) = (gpu.operand(op, dy)?, gpu.operand(op, x)?);
    let scales = gpu.output(op, &[rows], DType::F32)?;
    let sums = gpu.output(op, &[width], DType::F32)?;
    let scaling = NormParams::new(x.address, scales.address, (rows, width), epsilon);
    let summing = NormParams { dy: dy.address, scales: scales.address, out: sums.address, ..scaling };
    // SAFETY: the shapes were checked, and there is a number for each row and for each column.
    unsafe {
        gpu.launch("rms_norm_scales", Launch::blocks(rows, THREADS), &scaling)?;
        gpu.launch(op, Launch::blocks(width.div_ceil(32), COLUMN_THREADS), &summing)?;
    }
    Ok(sums.tensor())
}
