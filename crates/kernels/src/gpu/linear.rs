//! Products of linear layers.

use candle_core::{DType, Tensor};

use super::{Gpu, Product};
use crate::frozen::Frozen;
use crate::gemm::pack::Layout;
use crate::{Error, Result};

/// The sum of `x w^T` (or of `x w`, as `layout` says) over the terms, plus the f32 tensor `added`; the shapes were checked.
pub(crate) fn product(
    gpu: &Gpu,
    op: &'static str,
    terms: &[(&Tensor, &Frozen)],
    layout: Layout,
    added: Option<&Tensor>,
    out: DType,
) -> Result<Tensor> {
    let first = terms[0];
    let rows = first.0.dims()[0];
    let columns = if layout == Layout::Rows { first.1.cols() } else { first.1.rows() };
    // Sums of several products, and what is added to one, are made in f32 and rounded once. cuBLASLt has no product of f32 numbers with a
    // result of another type.
    let rounded = terms.len() == 1 && added.is_none() && first.0.dtype() == DType::BF16;
    let sum_dtype = if rounded { out } else { DType::F32 };
    let sum = gpu.output(op, &[rows, columns], sum_dtype)?;
    let (_held, mut added) = gpu.optional(op, added)?;
    for (x, w) in terms {
        let weight =
            w.on_device().ok_or_else(|| Error::Device { op, device: "the host's memory".to_owned() })?;
        if w.dtype() != x.dtype() {
            let what = format!("a weight of {:?} on a GPU, for rows of {:?}", w.dtype(), x.dtype());
            return Err(Error::Shape { op, what });
        }
        let (x, weight) = (gpu.operand(op, x)?, gpu.operand(op, weight)?);
        let contracted = if layout == Layout::Rows { w.rows() } else { w.cols() };
        if contracted == 0 {
            return Err(Error::Shape { op, what: "a product of no numbers".to_owned() });
        }
        let product = Product {
            a: x.address,
            w: weight.address.plus(w.offset() * w.dtype().size_in_bytes()),
            w_stride: w.stride(),
            layout,
            dtype: w.dtype(),
            out: sum.address,
            out_dtype: sum_dtype,
            added,
            dims: [rows, columns, contracted],
            usual_rows: w.usual_rows(),
        };
        // SAFETY: the shapes were checked, and the weight is as large as it says.
        unsafe { gpu.multiply(&product)? };
        added = sum.address;
    }
    let sum = sum.tensor();
    if sum_dtype == out { Ok(sum) } else { super::elementwise::rounded(gpu, &sum) }
}
