//! Frozen weights: matrices that are read and never written.

use std::sync::Arc;

use candle_core::{DType, Tensor};
use half::bf16;

use crate::{Error, Result};

/// Whatever keeps the bytes of a weight alive: a mapped file, say.
pub type ByteOwner = Arc<dyn AsRef<[u8]> + Send + Sync>;

/// A frozen matrix `[rows, cols]`, row-major. A linear layer's weight is `[out, in]`, as Hugging Face stores it; a vector
/// has one row.
///
/// The numbers stay where they are (a mapped checkpoint, or a buffer of our own) and in the type they have there: cloning
/// and slicing copy nothing. Products read them panel by panel, so that a backbone larger than memory can be used.
#[derive(Clone)]
pub struct Frozen {
    data: Data,
    /// Of the first number, counted in numbers.
    offset: usize,
    rows: usize,
    cols: usize,
    /// Numbers from the start of one row to the start of the next.
    stride: usize,
    /// Rows that are usually multiplied by it at once.
    usual_rows: usize,
}

/// A microbatch of middling size.
const USUAL_ROWS: usize = 16_384;

#[derive(Clone)]
enum Data {
    Mapped {
        owner: ByteOwner,
        byte_offset: usize,
        len: usize,
        dtype: DType,
    },
    Bf16(Arc<Vec<bf16>>),
    F32(Arc<Vec<f32>>),
    /// On a GPU, as `[rows, cols]` without gaps.
    Device(Tensor),
}

/// The numbers of a [`Frozen`], in the type in which they are stored.
#[derive(Clone, Copy)]
pub enum FrozenSlice<'a> {
    /// bf16 numbers.
    Bf16(&'a [bf16]),
    /// f32 numbers.
    F32(&'a [f32]),
}

impl Frozen {
    /// A view of `rows * cols` numbers of type `dtype` (bf16 or f32, little-endian) that begin at `byte_offset` in `owner`.
    ///
    /// Numbers that are not aligned to their size are copied, once.
    ///
    /// # Errors
    /// If the range does not lie within the owner's bytes, or `dtype` is neither bf16 nor f32.
    pub fn mapped(
        owner: ByteOwner,
        byte_offset: usize,
        dtype: DType,
        rows: usize,
        cols: usize,
    ) -> Result<Self> {
        let size = match dtype {
            DType::BF16 | DType::F32 => dtype.size_in_bytes(),
            other => return Err(Error::WeightDType { dtype: other }),
        };
        let len = rows.saturating_mul(cols);
        let (from, bytes) = (byte_offset, len.saturating_mul(size));
        let all: &[u8] = (*owner).as_ref();
        let bytes = all.get(from..from.saturating_add(bytes)).ok_or(Error::WeightBounds {
            from,
            len: bytes,
            owned: all.len(),
        })?;
        if !bytes.as_ptr().addr().is_multiple_of(size) || cfg!(target_endian = "big") {
            return Ok(Self::copied(bytes, dtype, rows, cols));
        }
        let data = Data::Mapped { owner, byte_offset, len, dtype };
        Ok(Self::whole(data, rows, cols))
    }

    fn whole(data: Data, rows: usize, cols: usize) -> Self {
        Self { data, offset: 0, rows, cols, stride: cols, usual_rows: USUAL_ROWS }
    }

    /// A matrix of its own numbers.
    ///
    /// # Panics
    /// If `values` does not hold `rows * cols` numbers.
    #[must_use]
    pub fn from_bf16(values: Vec<bf16>, rows: usize, cols: usize) -> Self {
        assert_eq!(values.len(), rows * cols, "a matrix of {rows} x {cols}");
        Self::whole(Data::Bf16(Arc::new(values)), rows, cols)
    }

    /// A matrix of its own numbers.
    ///
    /// # Panics
    /// If `values` does not hold `rows * cols` numbers.
    #[must_use]
    pub fn from_f32(values: Vec<f32>, rows: usize, cols: usize) -> Self {
        assert_eq!(values.len(), rows * cols, "a matrix of {rows} x {cols}");
        Self::whole(Data::F32(Arc::new(values)), rows, cols)
    }

    /// The same, of which it is known how many rows are usually multiplied by it at once. A GPU's way to make products is chosen for
    /// that number and kept for all others, so that a row's result does not depend on the rows beside it.
    #[must_use]
    pub fn for_rows(self, usual_rows: usize) -> Self {
        Self { usual_rows, ..self }
    }

    /// See [`Frozen::for_rows`].
    pub(crate) fn usual_rows(&self) -> usize {
        self.usual_rows
    }

    /// A matrix that lies on a device.
    pub(crate) fn from_device(tensor: Tensor) -> Self {
        let dims = tensor.dims();
        let (rows, cols) = (dims[0], dims[1]);
        Self::whole(Data::Device(tensor), rows, cols)
    }

    /// The whole matrix of which this is a part, where it lies on a device.
    pub(crate) fn on_device(&self) -> Option<&Tensor> {
        match &self.data {
            Data::Device(tensor) => Some(tensor),
            _ => None,
        }
    }

    /// Whether `next` has the rows below this one's in the same matrix on a device, and the same use.
    pub(crate) fn is_above(&self, next: &Self) -> bool {
        let same = match (&self.data, &next.data) {
            (Data::Device(own), Data::Device(other)) => own.id() == other.id(),
            _ => false,
        };
        let below = self.offset + self.rows * self.stride;
        let [own, other] = [self, next].map(|w| (w.cols, w.stride, w.usual_rows));
        same && below == next.offset && own == other
    }

    /// With the rows below, if [`Self::is_above`] says that they are `next`'s.
    pub(crate) fn with_below(self, next: &Self) -> Self {
        Self { rows: self.rows + next.rows, ..self }
    }

    /// Of the first number, in the matrix of which this is a part.
    pub(crate) fn offset(&self) -> usize {
        self.offset
    }

    fn copied(bytes: &[u8], dtype: DType, rows: usize, cols: usize) -> Self {
        if dtype == DType::BF16 {
            let values = bytes.chunks_exact(2).map(|b| bf16::from_le_bytes([b[0], b[1]])).collect();
            return Self::from_bf16(values, rows, cols);
        }
        let values = bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect();
        Self::from_f32(values, rows, cols)
    }

    /// Rows (a linear layer's outputs).
    #[must_use]
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Columns (a linear layer's inputs).
    #[must_use]
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Numbers from the start of one row to the start of the next.
    #[must_use]
    pub fn stride(&self) -> usize {
        self.stride
    }

    /// The stored type: bf16 or f32.
    #[must_use]
    pub fn dtype(&self) -> DType {
        match &self.data {
            Data::Mapped { dtype, .. } => *dtype,
            Data::Bf16(_) => DType::BF16,
            Data::F32(_) => DType::F32,
            Data::Device(tensor) => tensor.dtype(),
        }
    }

    /// The part `[first_row .. first_row + rows, first_col .. first_col + cols]`; nothing is copied.
    ///
    /// # Panics
    /// If the part does not lie within the matrix.
    #[must_use]
    pub fn part(&self, (first_row, rows): (usize, usize), (first_col, cols): (usize, usize)) -> Self {
        assert!(
            first_row + rows <= self.rows && first_col + cols <= self.cols,
            "the part lies outside the matrix"
        );
        let offset = self.offset + first_row * self.stride + first_col;
        Self { offset, rows, cols, ..self.clone() }
    }

    /// The numbers from the first of the first row to the last of the last row; row `r` begins at `r * stride`.
    ///
    /// # Panics
    /// If they lie on a device: whoever moved them there computes there.
    #[must_use]
    pub fn values(&self) -> FrozenSlice<'_> {
        let range = match self.rows {
            0 => 0..0, // the offset of no rows may lie behind the last number
            rows => self.offset..self.offset + (rows - 1) * self.stride + self.cols,
        };
        match &self.data {
            Data::Bf16(v) => FrozenSlice::Bf16(&v[range]),
            Data::F32(v) => FrozenSlice::F32(&v[range]),
            Data::Device(_) => panic!("the numbers of {self:?} lie on a device"),
            Data::Mapped { owner, byte_offset, len, dtype } => {
                let all: &[u8] = (**owner).as_ref();
                let first = all[*byte_offset..*byte_offset + len * dtype.size_in_bytes()].as_ptr();
                assert!(first.addr().is_multiple_of(dtype.size_in_bytes()), "the owner's bytes have moved");
                // SAFETY: the bounds of these `len` numbers and their alignment are checked just above, `owner` outlives the
                // result, and each bit pattern is a valid number.
                unsafe {
                    if *dtype == DType::BF16 {
                        FrozenSlice::Bf16(&std::slice::from_raw_parts(first.cast::<bf16>(), *len)[range])
                    } else {
                        FrozenSlice::F32(&std::slice::from_raw_parts(first.cast::<f32>(), *len)[range])
                    }
                }
            }
        }
    }

    /// Row `row` as f32.
    ///
    /// # Panics
    /// If there is no such row, or `out` is not as long as one.
    pub fn copy_row(&self, row: usize, out: &mut [f32]) {
        assert!(row < self.rows && out.len() == self.cols, "row {row} of {} x {}", self.rows, self.cols);
        let range = row * self.stride..row * self.stride + self.cols;
        match self.values() {
            FrozenSlice::F32(v) => out.copy_from_slice(&v[range]),
            FrozenSlice::Bf16(v) => out.iter_mut().zip(&v[range]).for_each(|(o, x)| *o = x.to_f32()),
        }
    }

    /// All numbers as f32, row after row.
    #[must_use]
    pub fn to_f32(&self) -> Vec<f32> {
        let mut out = vec![0.0; self.rows * self.cols];
        for (row, part) in out.chunks_exact_mut(self.cols.max(1)).enumerate() {
            self.copy_row(row, part);
        }
        out
    }
}

impl std::fmt::Debug for Frozen {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Frozen {} x {} {:?}", self.rows, self.cols, self.dtype())
    }
}
