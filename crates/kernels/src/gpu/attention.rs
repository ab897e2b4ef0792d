//! Attention and its gradient.

use candle_core::{DType, Tensor};

use super::rows::Dropping;
use super::{Address, Gpu, Launch, Params, Uploaded, suffix};
use crate::attention::{Attended, Attention};
use crate::dropout::Dropout;
use crate::segments::Segments;
use crate::{Error, Result};

/// `AttentionParams` of `attention.cuh`.
#[derive(Clone, Copy)]
#[repr(C)]
struct AttentionParams {
    q: Address,
    k: Address,
    v: Address,
    y: Address,
    dy: Address,
    out: Address,
    dq: Address,
    dk: Address,
    dv: Address,
    normalisers: Address,
    delta: Address,
    query_offsets: Address,
    key_offsets: Address,
    tiles: Address,
    bias: Address,
    random: Address,
    dropping: Dropping,
    bias_stride: i32,
    bias_zero: i32,
    heads: i32,
    width: i32,
    queries: i32,
    causal: i32,
}
// SAFETY: the C++ struct has the same fields.
unsafe impl Params for AttentionParams {}

/// `DELTA_THREADS` of `attention.cuh`.
const DELTA_THREADS: u32 = 256;
/// Columns of the tiles that kernels were made for.
const WIDTHS: [usize; 3] = [64, 128, 256];

/// A call's sizes, and what it keeps on the device while it is launched.
struct Call<'a> {
    gpu: &'a Gpu,
    spec: &'a Attention<'a>,
    dtype: DType,
    /// Columns of a tile.
    width: usize,
    params: AttentionParams,
    _random: Option<Uploaded>,
}

impl<'a> Call<'a> {
    fn new(gpu: &'a Gpu, op: &'static str, spec: &'a Attention<'a>, q: &Tensor) -> Result<Self> {
        let own = q.dims()[1] / spec.heads;
        let Some(width) = WIDTHS.into_iter().find(|width| *width >= own) else {
            let what = format!("heads of {own} numbers: on a GPU a head has {} at most", WIDTHS[2]);
            return Err(Error::Shape { op, what });
        };
        let none = Address::NONE;
        let mut params = AttentionParams {
            q: none,
            k: none,
            v: none,
            y: none,
            dy: none,
            out: none,
            dq: none,
            dk: none,
            dv: none,
            normalisers: none,
            delta: none,
            query_offsets: spec.queries.offsets_on(gpu)?,
            key_offsets: spec.keys.offsets_on(gpu)?,
            tiles: none,
            bias: none,
            random: none,
            dropping: Dropping::NONE,
            bias_stride: 0,
            bias_zero: 0,
            heads: spec.heads as i32,
            width: own as i32,
            queries: spec.queries.total() as i32,
            causal: i32::from(spec.causal),
        };
        if let Some(bias) = spec.bias {
            params.bias = bias.on(gpu)?;
            (params.bias_stride, params.bias_zero) = (bias.stride() as i32, bias.longest as i32 - 1);
        }
        let random = spec.dropout.map(|dropout| masks(gpu, op, spec, dropout)).transpose()?;
        if let (Some(dropout), Some(random)) = (spec.dropout, &random) {
            let (threshold, kept) = dropout.threshold();
            params.random = random.address;
            params.dropping = Dropping { threshold, kept };
        }
        Ok(Self { gpu, spec, dtype: q.dtype(), width, params, _random: random })
    }

    /// Rows of a tile.
    fn rows(&self) -> usize {
        if self.dtype == DType::BF16 { 64 } else { 32 }
    }

    /// Launches a kernel with a block for each tile of `segments` and head; `operands` tiles of rows lie in shared memory.
    ///
    /// # Safety
    /// The parameters must be set for it.
    unsafe fn launch(&mut self, name: &str, segments: &Segments, operands: usize) -> Result<()> {
        let size = self.dtype.size_in_bytes();
        let (rows, padding) = (self.rows(), 16 / size);
        let numbers = operands * rows * (self.width + padding) + rows * (rows + padding);
        // Two f32 numbers a row besides, which one of the kernels uses.
        let shared_bytes = (numbers * size + 2 * rows * 4) as u32;
        let (tiles, count) = segments.tiles_on(self.gpu, rows)?;
        self.params.tiles = tiles;
        let launch = Launch {
            grid: [count as u32, self.spec.heads as u32],
            threads: (rows / 16 * 32) as u32,
            shared_bytes,
        };
        let kernel = format!("{name}_{}_{}", suffix(self.dtype), self.width);
        // SAFETY: the caller's promise.
        unsafe { self.gpu.launch(&kernel, launch, &self.params) }
    }
}

/// The random numbers of each example and head.
fn masks(gpu: &Gpu, op: &'static str, spec: &Attention<'_>, dropout: &Dropout) -> Result<Uploaded> {
    let of = |i: usize| dropout.head_masks(i / spec.heads, i % spec.heads).words();
    gpu.upload(op, &(0..spec.queries.len() * spec.heads).map(of).collect::<Vec<_>>())
}

/// As `attention`, of operands that were checked.
pub(crate) fn attention(
    gpu: &Gpu,
    spec: &Attention<'_>,
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
) -> Result<Attended> {
    let op = "attention";
    let mut call = Call::new(gpu, op, spec, q)?;
    let output = gpu.output(op, q.dims(), q.dtype())?;
    let normalisers = gpu.output(op, &[spec.heads, spec.queries.total()], DType::F32)?;
    let (q, k, v) = (gpu.operand(op, q)?, gpu.operand(op, k)?, gpu.operand(op, v)?);
    call.params.q = q.address;
    call.params.k = k.address;
    call.params.v = v.address;
    call.params.out = output.address;
    call.params.normalisers = normalisers.address;
    // SAFETY: the shapes were checked, and the outputs are as large as the queries.
    unsafe { call.launch(op, spec.queries, 3)? };
    Ok(Attended { output: output.tensor(), normalisers: normalisers.tensor() })
}

/// As `attention_gradient`, of operands that were checked.
pub(crate) fn attention_gradient(
    gpu: &Gpu,
    spec: &Attention<'_>,
    [q, k, v]: [&Tensor; 3],
    attended: &Attended,
    dy: &Tensor,
) -> Result<[Tensor; 3]> {
    let op = "attention_gradient";
    let mut call = Call::new(gpu, op, spec, q)?;
    let delta = gpu.output(op, &[spec.heads, spec.queries.total()], DType::F32)?;
    let [dq, dk, dv] = [q, k, v].map(|like| gpu.output(op, like.dims(), like.dtype()));
    let (dq, dk, dv) = (dq?, dk?, dv?);
    let operands = [q, k, v, &attended.output, dy, &attended.normalisers].map(|t| gpu.operand(op, t));
    let [q, k, v, y, dy, normalisers] = operands;
    let (q, k, v, y, dy, normalisers) = (q?, k?, v?, y?, dy?, normalisers?);
    call.params = AttentionParams {
        q: q.address,
        k: k.address,
        v: v.address,
        y: y.address,
        dy: dy.address,
        dq: dq.address,
        dk: dk.address,
        dv: dv.address,
        normalisers: normalisers.address,
        delta: delta.address,
        ..call.params
    };
    let warps = DELTA_THREADS as usize / 32;
    let rows = Launch {
        grid: [spec.queries.total().div_ceil(warps) as u32, spec.heads as u32],
        threads: DELTA_THREADS,
        shared_bytes: 0,
    };
    // SAFETY: the shapes were checked, and gradients are as large as what they are of.
    unsafe {
        gpu.launch(&format!("attention_delta_{}", suffix(call.dtype)), rows, &call.params)?;
        call.launch("attention_gradient_queries", spec.queries, 4)?;
        call.launch("attention_gradient_keys", spec.keys, 4)?;
    }
    Ok([dq.tensor(), dk.tensor(), dv.tensor()])
}
