//! Gradients to rows, and to weights for methods that train some of them.

use std::collections::BTreeMap;

use candle_core::{DType, Tensor};
use incipit_kernels::{linear_weight_gradient, rounded};

use crate::Result;
use crate::sharding::Weight;

/// A gradient to rows `[T, D]`.
#[derive(Clone)]
pub(crate) struct Gradient {
    /// f32.
    pub(crate) exact: Tensor,
    /// The same in the type in which products read it, if it was made in both; else the former.
    pub(crate) rounded: Tensor,
}

impl Gradient {
    /// As products of `dtype` read it.
    pub(crate) fn rounded(&self, dtype: DType) -> Result<Tensor> {
        if self.rounded.dtype() == dtype {
            return Ok(self.rounded.clone());
        }
        Ok(rounded(&self.exact, dtype)?)
    }
}

impl From<Tensor> for Gradient {
    fn from(exact: Tensor) -> Self {
        Self { rounded: exact.clone(), exact }
    }
}

/// Sums of gradients to weights, by name. For a weight that is not asked for, a backward pass computes nothing.
#[derive(Debug, Default)]
pub struct WeightGradients {
    sums: BTreeMap<String, Option<Tensor>>,
}

impl WeightGradients {
    /// For the weights of these names.
    #[must_use]
    pub fn of<'a>(names: impl IntoIterator<Item = &'a str>) -> Self {
        Self { sums: names.into_iter().map(|name| (name.to_owned(), None)).collect() }
    }

    /// The sums, each of the shape of this rank's part of its weight, in f32; none for a weight that had no part in any pass.
    pub(crate) fn into_sums(self) -> BTreeMap<String, Option<Tensor>> {
        self.sums
    }

    /// Whether no weight is asked for.
    pub(crate) fn is_empty(&self) -> bool {
        self.sums.is_empty()
    }

    /// Whether the weight `name` is asked for.
    pub(crate) fn wants(&self, name: &str) -> bool {
        self.sums.contains_key(name)
    }

    /// Adds to the sum of the weight `name`, if it is asked for.
    pub(crate) fn add(&mut self, name: &str, gradient: impl FnOnce() -> Result<Tensor>) -> Result<()> {
        let Some(sum) = self.sums.get_mut(name) else { return Ok(()) };
        let gradient = gradient()?;
        *sum = Some(match sum.take() {
            Some(sum) => (sum + gradient)?,
            None => gradient,
        });
        Ok(())
    }

    /// Adds the gradients to weights that read one `input` `[T, in]`, from those to their results `[T, out]`. The input is made
    /// if one of them is asked for.
    pub(crate) fn add_products(
        &mut self,
        terms: &[(&Tensor, &Weight)],
        input: impl FnOnce() -> Result<Tensor>,
    ) -> Result<()> {
        if !terms.iter().any(|(_, weight)| self.wants(&weight.name)) {
            return Ok(());
        }
        let input = input()?;
        terms
            .iter()
            .try_for_each(|(dy, weight)| self.add(&weight.name, || Ok(linear_weight_gradient(dy, &input)?)))
    }
}
