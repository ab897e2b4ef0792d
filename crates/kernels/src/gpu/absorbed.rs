//! Attention to rows of which no keys and values are made.

use candle_core::{DType, Tensor};

use super::{Address, Gpu, Launch, Params, Plain, Product, suffix};
use crate::attention::absorbed::{Absorbed, AbsorbedAttended, Readers};
use crate::frozen::Frozen;
use crate::gemm::pack::Layout;
use crate::gpu::attention::MOST_ROWS;
use crate::{Error, Result};

const OP: &str = "absorbed_attention";

/// `AbsorbedParams` of `absorbed.cuh`.
#[derive(Clone, Copy, Default)]
#[repr(C)]
struct AbsorbedParams {
    queries: Address,
    gradients: Address,
    rows: Address,
    out: Address,
    sum: Address,
    row_gradients: Address,
    scores: Address,
    probabilities: Address,
    score_gradients: Address,
    query_offsets: Address,
    row_offsets: Address,
    places: Address,
    tiles: Address,
    terms: Address,
    term_count: i32,
    width: i32,
    aligned: i32,
}
// SAFETY: the C++ struct has the same fields.
unsafe impl Params for AbsorbedParams {}

/// `AbsorbedTerm` of `absorbed.cuh`.
#[derive(Clone, Copy)]
#[repr(C)]
struct Term {
    weights: Address,
    of_queries: Address,
}
// SAFETY: two addresses, which are numbers.
unsafe impl Plain for Term {}

/// `SOFTMAX_THREADS` of `absorbed.cuh`.
const SOFTMAX_THREADS: u32 = 128;

/// A call's sizes and parameters.
struct Call<'a> {
    gpu: &'a Gpu,
    readers: &'a Readers,
    dtype: DType,
    /// Numbers of all examples' scores.
    places: usize,
    params: AbsorbedParams,
}

impl<'a> Call<'a> {
    /// `x` are the rows.
    fn new(gpu: &'a Gpu, readers: &'a Readers, x: Address, (width, dtype): (usize, DType)) -> Result<Self> {
        let (places_at, places) = readers.places_on(gpu)?;
        let params = AbsorbedParams {
            rows: x,
            query_offsets: readers.wide().offsets_on(gpu)?,
            row_offsets: readers.rows().offsets_on(gpu)?,
            places: places_at,
            width: width as i32,
            ..AbsorbedParams::default()
        };
        Ok(Self { gpu, readers, dtype, places, params })
    }

    /// Numbers of a tile's side.
    fn side(&self) -> usize {
        if self.dtype == DType::BF16 { MOST_ROWS } else { 32 }
    }

    /// Whether all wide rows, which begin there, can be read 16 bytes at a time.
    fn set_alignment(&mut self, all: &[Address]) {
        let pack = 16 / self.dtype.size_in_bytes() as i32;
        let aligned = all.iter().all(|Address(at)| at % 16 == 0) && self.params.width % pack == 0;
        self.params.aligned = i32::from(aligned);
    }

    /// Launches a kernel with a block for each tile of queries, or of rows, and each of `columns`.
    ///
    /// # Safety
    /// The parameters must be set for it.
    unsafe fn tiles(&mut self, name: &str, of_rows: bool, columns: usize) -> Result<()> {
        let (side, size) = (self.side(), self.dtype.size_in_bytes());
        let segments = if of_rows { self.readers.rows() } else { self.readers.wide() };
        let (tiles, count) = segments.tiles_on(self.gpu, side)?;
        self.params.tiles = tiles;
        let launch = Launch {
            grid: [count as u32, columns.div_ceil(side) as u32],
            threads: (side / 16 * 32) as u32,
            shared_bytes: (4 * side * (side + 16 / size) * size) as u32,
        };
        // SAFETY: the caller's promise.
        unsafe { self.gpu.launch(&format!("absorbed_{name}_{}", suffix(self.dtype)), launch, &self.params) }
    }

    /// Launches a kernel that goes through the scores, a warp a query.
    ///
    /// # Safety
    /// The parameters must be set for it.
    unsafe fn rows(&mut self, name: &str) -> Result<()> {
        let (tiles, count) = self.readers.wide().tiles_on(self.gpu, self.side())?;
        self.params.tiles = tiles;
        let blocks = (self.side() as u32).div_ceil(SOFTMAX_THREADS / 32);
        let launch = Launch { grid: [count as u32, blocks], threads: SOFTMAX_THREADS, shared_bytes: 0 };
        // SAFETY: the caller's promise.
        unsafe { self.gpu.launch(&format!("absorbed_{name}_{}", suffix(self.dtype)), launch, &self.params) }
    }
}

/// As `absorbed_attention`, of operands that were checked.
pub(crate) fn attention(gpu: &Gpu, spec: &Absorbed<'_>, q: &Tensor, x: &Tensor) -> Result<AbsorbedAttended> {
    let (width, dtype) = (x.dims()[1], x.dtype());
    let queries = widened(gpu, q, spec.k, spec.readers.heads())?;
    let rows = gpu.operand(OP, x)?;
    let mut call = Call::new(gpu, spec.readers, rows.address, (width, dtype))?;
    let scores = gpu.output(OP, &[call.places], DType::F32)?;
    let probabilities = gpu.output(OP, &[call.places], dtype)?;
    let out = gpu.output(OP, queries.dims(), dtype)?;
    call.params.queries = gpu.operand(OP, &queries)?.address;
    call.params.scores = scores.address;
    call.params.probabilities = probabilities.address;
    call.params.out = out.address;
    call.set_alignment(&[call.params.queries, rows.address]);
    let longest = spec.readers.rows().longest();
    // SAFETY: the shapes were checked, and there is room for every query's scores.
    unsafe {
        call.tiles("scores", false, longest)?;
        call.rows("softmax")?;
        call.tiles("output", false, width)?;
    }
    let output = narrowed(gpu, &out.tensor(), spec.v, spec.readers.heads())?;
    Ok(AbsorbedAttended { output, queries: q.clone(), softmax: probabilities.tensor() })
}

/// What a layer adds to the gradient to the rows: the wide queries and the gradients to what they get, `[Tq * heads, D]`, and for the
/// scores of all examples the gradients to them and the probabilities.
pub(crate) struct Waiting {
    queries: Tensor,
    gradients: Tensor,
    score_gradients: Tensor,
    probabilities: Tensor,
}

impl Waiting {
    /// Numbers of all of it.
    pub(crate) fn numbers(&self) -> usize {
        let all = [&self.queries, &self.gradients, &self.score_gradients, &self.probabilities];
        all.iter().map(|tensor| tensor.elem_count()).sum()
    }
}

/// The gradient to the queries `q`, and what is to be added to that to the rows, of operands that were checked.
pub(crate) fn gradient(
    gpu: &Gpu,
    spec: &Absorbed<'_>,
    attended: &AbsorbedAttended,
    (x, dy): (&Tensor, &Tensor),
) -> Result<(Tensor, Waiting)> {
    let (width, dtype) = (x.dims()[1], x.dtype());
    let queries = widened(gpu, &attended.queries, spec.k, spec.readers.heads())?;
    let dy = widened(gpu, dy, spec.v, spec.readers.heads())?;
    let rows = gpu.operand(OP, x)?;
    let mut call = Call::new(gpu, spec.readers, rows.address, (width, dtype))?;
    let probability_gradients = gpu.output(OP, &[call.places], DType::F32)?;
    let score_gradients = gpu.output(OP, &[call.places], dtype)?;
    let dq = gpu.output(OP, dy.dims(), dtype)?;
    call.params = AbsorbedParams {
        queries: gpu.operand(OP, &queries)?.address,
        gradients: gpu.operand(OP, &dy)?.address,
        out: dq.address,
        scores: probability_gradients.address,
        probabilities: gpu.operand(OP, &attended.softmax)?.address,
        score_gradients: score_gradients.address,
        ..call.params
    };
    call.set_alignment(&[call.params.queries, call.params.gradients, rows.address]);
    let longest = spec.readers.rows().longest();
    // SAFETY: as above.
    unsafe {
        call.tiles("probability_gradients", false, longest)?;
        call.rows("score_gradients")?;
        call.tiles("query_gradients", false, width)?;
    }
    let waiting = Waiting {
        queries,
        gradients: dy,
        score_gradients: score_gradients.tensor(),
        probabilities: attended.softmax.clone(),
    };
    Ok((narrowed(gpu, &dq.tensor(), spec.k, spec.readers.heads())?, waiting))
}

/// The gradient to the rows `x`, in f32: what layers add, and the `sum`.
pub(crate) fn row_gradient(
    gpu: &Gpu,
    readers: &Readers,
    x: &Tensor,
    waiting: &[Waiting],
    sum: Option<&Tensor>,
) -> Result<Tensor> {
    let width = x.dims()[1];
    let rows = gpu.operand(OP, x)?;
    let mut call = Call::new(gpu, readers, rows.address, (width, x.dtype()))?;
    let of = |tensor| -> Result<Address> { Ok(gpu.operand(OP, tensor)?.address) };
    let mut terms = Vec::with_capacity(2 * waiting.len());
    for layer in waiting {
        terms.push(Term { weights: of(&layer.probabilities)?, of_queries: of(&layer.gradients)? });
        terms.push(Term { weights: of(&layer.score_gradients)?, of_queries: of(&layer.queries)? });
    }
    let uploaded = gpu.upload(OP, &terms)?;
    let dx = gpu.output(OP, x.dims(), DType::F32)?;
    let (_held, sum) = gpu.optional(OP, sum)?;
    call.params.terms = uploaded.address;
    call.params.term_count = terms.len() as i32;
    call.params.sum = sum;
    call.params.row_gradients = dx.address;
    call.set_alignment(&terms.iter().map(|term| term.of_queries).collect::<Vec<_>>());
    // SAFETY: every layer's numbers are as large as the readers have them, and the sum as the rows.
    unsafe { call.tiles("row_gradients", true, width)? };
    Ok(dx.tensor())
}

/// The numbers of head `h` times the weight's rows that are the head's: `[T, heads * K]` to `[T * heads, D]`.
fn widened(gpu: &Gpu, x: &Tensor, w: &Frozen, heads: usize) -> Result<Tensor> {
    let (rows, inner, width) = (x.dims()[0], w.rows(), w.cols());
    let k = inner / heads;
    let products = ByHeads {
        layout: Layout::Rows,
        result: [rows * heads, width],
        a_stride: inner,
        out_stride: heads * width,
        dims: [rows, width, k],
        steps: [k, k * w.stride(), width],
    };
    products.make(gpu, x, w, heads)
}

/// Head `h`'s rows times the weight's rows that are the head's, transposed: `[T * heads, D]` to `[T, heads * K]`.
fn narrowed(gpu: &Gpu, x: &Tensor, w: &Frozen, heads: usize) -> Result<Tensor> {
    let (rows, inner, width) = (x.dims()[0] / heads, w.rows(), w.cols());
    let k = inner / heads;
    let products = ByHeads {
        layout: Layout::ColumnsAsRows,
        result: [rows, inner],
        a_stride: heads * width,
        out_stride: inner,
        dims: [rows, k, width],
        steps: [width, k * w.stride(), k],
    };
    products.make(gpu, x, w, heads)
}

/// A product for each head.
struct ByHeads {
    layout: Layout,
    /// The shape of the result of all.
    result: [usize; 2],
    /// Numbers from row to row.
    a_stride: usize,
    out_stride: usize,
    /// Of one product, as [`Product`] has them; and the numbers from one to the next.
    dims: [usize; 3],
    steps: [usize; 3],
}

impl ByHeads {
    fn make(self, gpu: &Gpu, x: &Tensor, w: &Frozen, heads: usize) -> Result<Tensor> {
        let Self { layout, result, a_stride, out_stride, dims, steps } = self;
        let weight =
            w.on_device().ok_or_else(|| Error::Device { op: OP, device: "the host's memory".to_owned() })?;
        if w.dtype() != x.dtype() {
            let what = format!("a weight of {:?} on a GPU, for rows of {:?}", w.dtype(), x.dtype());
            return Err(Error::Shape { op: OP, what });
        }
        let (a, weight) = (gpu.operand(OP, x)?, gpu.operand(OP, weight)?);
        let out = gpu.output(OP, &result, x.dtype())?;
        let product = Product {
            a: a.address,
            a_stride,
            w: weight.address.plus(w.offset() * w.dtype().size_in_bytes()),
            w_stride: w.stride(),
            layout,
            dtype: x.dtype(),
            out: out.address,
            out_stride,
            out_dtype: x.dtype(),
            added: Address::NONE,
            count: heads,
            steps,
            dims,
            usual_rows: FEW_ROWS,
        };
        // SAFETY: the shapes were checked, and the products of all heads lie within operands and result.
        unsafe { gpu.multiply(&product)? };
        Ok(out.tensor())
    }
}

/// Rows of queries that a batch usually has.
const FEW_ROWS: usize = 256;
