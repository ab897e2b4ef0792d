//! Attention and its gradient.

use candle_core::{DType, Device, Tensor};

use super::rows::Dropping;
use super::{Address, Gpu, Launch, Params, Rows, Uploaded, suffix};
use crate::attention::{Attended, Attention, PositionBias};
use crate::dropout::Dropout;
use crate::segments::Segments;
use crate::{Error, Result};

/// `AttentionParams` of `attention.cuh`.
#[derive(Clone, Copy)]
#[repr(C)]
struct AttentionParams {
    q: Rows,
    k: Rows,
    v: Rows,
    y: Rows,
    dy: Rows,
    out: Rows,
    dq: Rows,
    dk: Rows,
    dv: Rows,
    normalisers: Address,
    delta: Address,
    query_offsets: Address,
    key_offsets: Address,
    tiles: Address,
    bias: Address,
    by_distance: Address,
    bucket_of: Address,
    table: Address,
    random: Address,
    dropping: Dropping,
    bias_stride: i32,
    bias_zero: i32,
    heads: i32,
    width: i32,
    queries: i32,
    prefix: i32,
    causal: i32,
    aligned: i32,
    tile_count: i32,
    buckets: i32,
}
// SAFETY: the C++ struct has the same fields.
unsafe impl Params for AttentionParams {}

/// `BIAS_THREADS` of `attention.cuh`.
const BIAS_THREADS: u32 = 256;
/// Rows of the largest tile, `Tiles` of `tiles.cuh`.
pub(crate) const MOST_ROWS: usize = 64;
/// Columns of the tiles that kernels were made for.
const WIDTHS: [usize; 3] = [64, 128, 256];

/// A call's sizes, and what it keeps on the device while it is launched.
struct Call<'a> {
    gpu: &'a Gpu,
    spec: &'a Attention<'a>,
    device: &'a Device,
    dtype: DType,
    /// Columns of a tile.
    width: usize,
    /// Whether the kernels for the instructions of groups serve, see `attention_groups.cuh`.
    by_groups: bool,
    params: AttentionParams,
    _random: Option<Uploaded>,
}

impl<'a> Call<'a> {
    fn new(gpu: &'a Gpu, op: &'static str, spec: &'a Attention<'a>, q: &'a Tensor) -> Result<Self> {
        let own = q.dims()[1] / spec.heads;
        let Some(width) = WIDTHS.into_iter().find(|width| *width >= own) else {
            let what = format!("heads of {own} numbers: on a GPU a head has {} at most", WIDTHS[2]);
            return Err(Error::Shape { op, what });
        };
        let none = Address::NONE;
        let mut params = AttentionParams {
            q: Rows::NONE,
            k: Rows::NONE,
            v: Rows::NONE,
            y: Rows::NONE,
            dy: Rows::NONE,
            out: Rows::NONE,
            dq: Rows::NONE,
            dk: Rows::NONE,
            dv: Rows::NONE,
            normalisers: none,
            delta: none,
            query_offsets: spec.queries.offsets_on(gpu)?,
            key_offsets: spec.keys.offsets_on(gpu)?,
            tiles: none,
            bias: none,
            by_distance: none,
            bucket_of: none,
            table: none,
            random: none,
            dropping: Dropping::NONE,
            bias_stride: 0,
            bias_zero: 0,
            heads: spec.heads as i32,
            width: own as i32,
            queries: spec.queries.total() as i32,
            prefix: spec.prefix as i32,
            causal: i32::from(spec.causal),
            aligned: 0,
            tile_count: 0,
            buckets: 0,
        };
        if let Some(bias) = spec.bias {
            params.bias = bias.on(gpu)?;
            params.bias_stride = bias.gpu_stride() as i32;
            params.bias_zero = bias.longest as i32 - 1;
        }
        let random = spec.dropout.map(|dropout| masks(gpu, op, spec, dropout)).transpose()?;
        if let (Some(dropout), Some(random)) = (spec.dropout, &random) {
            let (threshold, kept) = dropout.threshold();
            params.random = random.address;
            params.dropping = Dropping { threshold, kept };
        }
        let dtype = q.dtype();
        let by_groups = dtype == DType::BF16 && width == WIDTHS[0] && gpu.multiplies_by_groups();
        Ok(Self { gpu, spec, device: q.device(), dtype, width, by_groups, params, _random: random })
    }

    /// Rows of a tile.
    fn rows(&self) -> usize {
        if self.dtype == DType::BF16 { MOST_ROWS } else { 32 }
    }

    /// Stages of two tiles each, as `AttentionLayout` of `attention.cuh` has them.
    fn stages(&self) -> usize {
        if self.width == WIDTHS[0] { 2 } else { 1 }
    }

    /// Whether the rows of a head can be read and written 16 bytes at a time.
    fn aligned(&self) -> bool {
        let AttentionParams { q, k, v, y, dy, out, dq, dk, dv, width, .. } = self.params;
        let pack = 16 / self.dtype.size_in_bytes() as i64;
        let all = [q, k, v, y, dy, out, dq, dk, dv];
        let rows = all.iter().all(|rows| rows.first.0 % 16 == 0 && rows.stride % pack == 0);
        rows && i64::from(width) % pack == 0
    }

    /// Launches a kernel with a block for each tile of `segments` and head. In shared memory lie the block's `own` tiles of rows, two
    /// for each stage, in f32 a row's scores, `besides` f32 numbers a row, and what dropout keeps.
    ///
    /// # Safety
    /// The parameters must be set for it.
    unsafe fn launch(
        &mut self,
        name: &str,
        segments: &Segments,
        (own, besides): (usize, usize),
    ) -> Result<()> {
        let rows = self.rows();
        let shared_bytes = (self.tile_bytes(own) + besides * rows * 4 + self.kept_bytes()) as u32;
        let (tiles, count) = segments.tiles_on(self.gpu, rows)?;
        self.params.tiles = tiles;
        let launch = Launch {
            grid: [count as u32, self.spec.heads as u32],
            threads: (rows / 16 * 32) as u32,
            shared_bytes,
        };
        // SAFETY: the caller's promise.
        unsafe { self.gpu.launch(&self.kernel(name), launch, &self.params) }
    }

    /// Bytes of the block's `own` tiles and the stages', and of what belongs to these: a row's scores in f32, the bias for groups.
    fn tile_bytes(&self, own: usize) -> usize {
        let (rows, tiles, size) = (self.rows(), own + 2 * self.stages(), self.dtype.size_in_bytes());
        if self.by_groups {
            let distances = 2 * rows;
            return tiles * rows * self.width * size + self.stages() * distances * size_of::<f32>();
        }
        let padding = 16 / size;
        let scores = if self.dtype == DType::F32 { rows + padding } else { 0 };
        rows * (tiles * (self.width + padding) + scores) * size
    }

    /// Bytes of what dropout keeps of each stage's scores, a bit each.
    fn kept_bytes(&self) -> usize {
        if self.spec.dropout.is_some() { self.stages() * self.rows() * self.rows() / 8 } else { 0 }
    }

    /// The full name of a kernel. That for a bias knows dropout, too.
    fn kernel(&self, name: &str) -> String {
        match (self.by_groups, self.params.random) {
            (false, _) => format!("{name}_{}_{}", suffix(self.dtype), self.width),
            (true, random) if random == Address::NONE || name.ends_with("_bias") => format!("group_{name}"),
            (true, _) => format!("group_{name}_dropped"),
        }
    }

    /// Launches the kernels for the gradients to the queries and to the table of the bias.
    ///
    /// # Safety
    /// The parameters must be set for the former, and `table` must have a number for each bucket and head.
    unsafe fn launch_with_bias(&mut self, bias: &PositionBias, table: Address) -> Result<()> {
        let (op, heads, rows) = ("attention_gradient", self.spec.heads, self.rows());
        let (_, count) = self.spec.queries.tiles_on(self.gpu, rows)?;
        // Sums of each tile, of which there is one at least, as room for those of all.
        let dims = (count.max(1), heads, bias.bucket_of.len());
        let by_distance = Tensor::zeros(dims, DType::F32, self.device)?;
        let by_distance = self.gpu.operand(op, &by_distance)?;
        let bucket_of = self.gpu.upload(op, &bias.bucket_of)?;
        self.params.by_distance = by_distance.address;
        self.params.bucket_of = bucket_of.address;
        self.params.table = table;
        self.params.tile_count = count as i32;
        self.params.buckets = bias.buckets.count as i32;
        // SAFETY: the caller's promise; there are sums for each tile, head and distance, and a bucket for each distance.
        unsafe {
            self.launch("attention_gradient_queries_bias", self.spec.queries, (2, rows + 1))?;
            let launch = Launch::blocks(heads, BIAS_THREADS);
            self.gpu.launch("attention_gradient_bias", launch, &self.params)
        }
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
    let (q, k, v) = (gpu.matrix(op, q)?, gpu.matrix(op, k)?, gpu.matrix(op, v)?);
    call.params.q = q.rows();
    call.params.k = k.rows();
    call.params.v = v.rows();
    call.params.out = Rows { first: output.address, stride: q.cols as i64 };
    call.params.normalisers = normalisers.address;
    call.params.aligned = i32::from(call.aligned());
    // SAFETY: the shapes were checked, and the outputs are as large as the queries.
    unsafe { call.launch(op, spec.queries, (1, 0))? };
    Ok(Attended { output: output.tensor(), normalisers: normalisers.tensor() })
}

/// As `attention_gradient`, of operands that were checked.
pub(crate) fn attention_gradient(
    gpu: &Gpu,
    spec: &Attention<'_>,
    operands: [&Tensor; 3],
    attended: &Attended,
    dy: &Tensor,
) -> Result<[Tensor; 3]> {
    gradients(gpu, spec, operands, (attended, dy), None)
}

/// As `attention_gradient_with_bias`, of operands that were checked; `bias` is that of `spec`.
pub(crate) fn attention_gradient_with_bias(
    gpu: &Gpu,
    spec: &Attention<'_>,
    operands: [&Tensor; 3],
    given: (&Attended, &Tensor),
    bias: &PositionBias,
) -> Result<([Tensor; 3], Tensor)> {
    let table = gpu.output("attention_gradient", &[bias.buckets.count, spec.heads], DType::F32)?;
    let gradients = gradients(gpu, spec, operands, given, Some((bias, table.address)))?;
    Ok((gradients, table.tensor()))
}

/// The gradients to the operands, and to the table of a bias that is trained, of which there is the address.
fn gradients(
    gpu: &Gpu,
    spec: &Attention<'_>,
    [q, k, v]: [&Tensor; 3],
    (attended, dy): (&Attended, &Tensor),
    trained: Option<(&PositionBias, Address)>,
) -> Result<[Tensor; 3]> {
    let op = "attention_gradient";
    let mut call = Call::new(gpu, op, spec, q)?;
    let delta = gpu.output(op, &[spec.heads, spec.queries.total()], DType::F32)?;
    // Beside each other where the operands are: then the gradient to what they were made of is one product.
    let outputs = gpu.matrices_like(op, &[q, k, v], q.dtype())?;
    let all = [q, k, v, &attended.output, dy].into_iter().chain(&outputs);
    let all = all.map(|tensor| gpu.matrix(op, tensor)).collect::<Result<Vec<_>>>()?;
    let normalisers = gpu.operand(op, &attended.normalisers)?;
    let [q, k, v, y, dy, dq, dk, dv] = std::array::from_fn(|i| all[i].rows());
    call.params = AttentionParams {
        q,
        k,
        v,
        y,
        dy,
        dq,
        dk,
        dv,
        normalisers: normalisers.address,
        delta: delta.address,
        ..call.params
    };
    call.params.aligned = i32::from(call.aligned());
    // SAFETY: the shapes were checked, and gradients are as large as what they are of.
    unsafe {
        match trained {
            Some((bias, table)) => call.launch_with_bias(bias, table)?,
            None => call.launch("attention_gradient_queries", spec.queries, (2, 0))?,
        }
        let of_queries = 2 * call.stages();
        call.launch("attention_gradient_keys", spec.keys, (2, of_queries))?;
    }
    drop(all);
    Ok(outputs.try_into().unwrap_or_else(|_| unreachable!("each operand has a gradient")))
}
