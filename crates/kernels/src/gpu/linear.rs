//! Products of linear layers.

use candle_core::{DType, Tensor};

use super::{Gpu, Matrix, Product};
use crate::frozen::Frozen;
use crate::gemm::pack::Layout;
use crate::{Error, Result};

/// `x w^T` for each weight; the shapes were checked.
pub(crate) fn each<const N: usize>(
    gpu: &Gpu,
    op: &'static str,
    x: &Tensor,
    weights: [&Frozen; N],
    out: DType,
) -> Result<[Tensor; N]> {
    let mut results = Vec::with_capacity(N);
    for run in weights.chunk_by(|above, below| above.is_above(below)) {
        let all = run[1..].iter().fold(run[0].clone(), |all, below| all.with_below(below));
        let whole = product(gpu, op, &[(x, &all)], Layout::ColumnsAsRows, None, out)?;
        let mut first = 0;
        for weight in run {
            results.push(whole.narrow(1, first, weight.rows())?);
            first += weight.rows();
        }
    }
    Ok(results.try_into().unwrap_or_else(|_| unreachable!("each weight has a result")))
}

/// The factors of a sum of products. Terms of gradients that lie beside each other, of weights that lie below each other, are one.
pub(super) fn factors<'a>(
    gpu: &Gpu,
    op: &'static str,
    terms: &[(&'a Tensor, &Frozen)],
    layout: Layout,
) -> Result<Vec<(Matrix<'a>, Frozen)>> {
    let mut all: Vec<(Matrix<'_>, Frozen)> = Vec::with_capacity(terms.len());
    for (x, w) in terms {
        let x = gpu.matrix(op, x)?;
        match all.pop() {
            Some((mut before, above))
                if layout == Layout::Rows && before.is_beside(&x) && above.is_above(w) =>
            {
                before.cols += x.cols;
                all.push((before, above.with_below(w)));
            }
            last => {
                all.extend(last);
                all.push((x, (*w).clone()));
            }
        }
    }
    Ok(all)
}

/// The sum of `x w^T` (or of `x w`, as `layout` says) over the terms, plus the f32 tensor `added`; the shapes were checked.
pub(crate) fn product(
    gpu: &Gpu,
    op: &'static str,
    terms: &[(&Tensor, &Frozen)],
    layout: Layout,
    added: Option<&Tensor>,
    out: DType,
) -> Result<Tensor> {
    let (first, weight) = terms[0];
    let (rows, dtype) = (first.dims()[0], first.dtype());
    let columns = if layout == Layout::Rows { weight.cols() } else { weight.rows() };
    // Sums of several products, and what is added to one, are made in f32 and rounded once. cuBLASLt has no product of f32 numbers with a
    // result of another type.
    let factors = factors(gpu, op, terms, layout)?;
    let rounded = factors.len() == 1 && added.is_none() && dtype == DType::BF16;
    let sum_dtype = if rounded { out } else { DType::F32 };
    let sum = gpu.output(op, &[rows, columns], sum_dtype)?;
    let (_held, mut added) = gpu.optional(op, added)?;
    for (x, w) in &factors {
        let weight =
            w.on_device().ok_or_else(|| Error::Device { op, device: "the host's memory".to_owned() })?;
        if w.dtype() != dtype {
            let what = format!("a weight of {:?} on a GPU, for rows of {dtype:?}", w.dtype());
            return Err(Error::Shape { op, what });
        }
        let weight = gpu.operand(op, weight)?;
        let contracted = if layout == Layout::Rows { w.rows() } else { w.cols() };
        if contracted == 0 {
            return Err(Error::Shape { op, what: "a product of no numbers".to_owned() });
        }
        let product = Product {
            a: x.address,
            a_stride: x.stride,
            w: weight.address.plus(w.offset() * w.dtype().size_in_bytes()),
            w_stride: w.stride(),
            layout,
            dtype,
            out: sum.address,
            out_stride: columns,
            out_dtype: sum_dtype,
            added,
            count: 1,
            steps: [0; 3],
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
