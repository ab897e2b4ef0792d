//! Li and Liang's reparameterisation (2021, section 4.3): while a prefix is trained, an MLP makes it of `P` smaller rows; then the MLP
//! is thrown away, and its results are kept.
//!
//! As PEFT's `PrefixEncoder` with `prefix_projection`: rows `[P, D]`, a layer to `width` columns, tanh, and a layer to all keys and
//! values. That last layer lies here in parts, one for each tensor of the prefix: `….prefix_k.weight` `[P, H K]` is made by
//! `….prefix_k.up.weight` `[H K, width]` and `….prefix_k.up.bias`.

use std::collections::BTreeMap;

use candle_core::{DType, Device, Tensor};
use incipit_kernels::{Frozen, linear, linear_gradient, linear_weight_gradient, rng::Philox, tanh};

use crate::{Error, Result, optimizer::NamedTensor};

const ROWS: &str = "prefix.embedding.weight";
const DOWN: [&str; 2] = ["prefix.down.weight", "prefix.down.bias"];
const UP: [&str; 2] = [".up.weight", ".up.bias"];

/// Distinguishes these random numbers from the job's others.
const STREAM: u64 = u64::from_be_bytes(*b"prefix m");

/// The MLP before the first step, for results with the names and shapes of `kept`. Its numbers are drawn as PyTorch draws those of
/// embeddings, standard normal, and of linear layers, uniform up to the root of `1 / in`.
pub(super) fn initial(kept: &[NamedTensor], d_model: usize, width: usize, seed: u64) -> Vec<NamedTensor> {
    let mut random = Philox::new(seed, &[STREAM]);
    let length = kept.first().map_or(0, |tensor| tensor.shape[0]);
    let rows = (0..length * d_model).map(|_| random.normal()).collect();
    let mut tensors = vec![NamedTensor { name: ROWS.to_owned(), shape: vec![length, d_model], data: rows }];
    let mut layer = |[weight, bias]: [String; 2], out: usize, into: usize| {
        let bound = (into as f32).sqrt().recip();
        for (name, shape) in [(weight, vec![out, into]), (bias, vec![out])] {
            let count = shape.iter().product();
            let data = (0..count).map(|_| bound * (2.0 * random.uniform() - 1.0)).collect();
            tensors.push(NamedTensor { name, shape, data });
        }
    };
    layer(DOWN.map(str::to_owned), width, d_model);
    let mut kept: Vec<&NamedTensor> = kept.iter().collect();
    kept.sort_by(|a, b| a.name.cmp(&b.name));
    for tensor in kept {
        let name = tensor.name.trim_end_matches(".weight");
        layer(UP.map(|part| format!("{name}{part}")), tensor.shape[1], width);
    }
    tensors
}

/// What the MLP makes, by the names under which the model takes it; none if `tensors` are no MLP.
///
/// # Errors
/// If the MLP is not whole, or its shapes do not fit.
pub(crate) fn results(tensors: &[NamedTensor]) -> Result<Option<Vec<NamedTensor>>> {
    let Some(mlp) = Mlp::of(tensors)? else { return Ok(None) };
    let hidden = mlp.hidden()?;
    let result = |(name, (weight, bias)): (&String, &(Frozen, &NamedTensor))| {
        let rows = with_bias(&linear(&hidden, weight, DType::F32)?, bias)?;
        let shape = rows.dims().to_vec();
        Ok(NamedTensor { name: name.clone(), shape, data: rows.flatten_all()?.to_vec1()? })
    };
    mlp.up.iter().map(result).collect::<Result<_>>().map(Some)
}

/// The gradients to the MLP's numbers, each by its name, from those to its results.
///
/// # Errors
/// If the MLP is not whole, or its shapes do not fit.
pub(super) fn gradients(
    tensors: &[NamedTensor],
    results: &BTreeMap<String, Vec<f32>>,
) -> Result<BTreeMap<String, Vec<f32>>> {
    let Some(mlp) = Mlp::of(tensors)? else { return Ok(results.clone()) };
    let hidden = mlp.hidden()?;
    let mut found = BTreeMap::new();
    let mut put = |name: String, gradient: &Tensor| -> Result<()> {
        found.insert(name, gradient.flatten_all()?.to_vec1()?);
        Ok(())
    };
    let mut terms = Vec::with_capacity(mlp.up.len());
    for (name, (weight, bias)) in &mlp.up {
        let dy = results.get(name).ok_or_else(|| broken(name, "has no gradient"))?;
        let dy = Tensor::from_slice(dy, (hidden.dims()[0], weight.rows()), &Device::Cpu)?;
        put(
            format!("{}{}", name.trim_end_matches(".weight"), UP[0]),
            &linear_weight_gradient(&dy, &hidden)?,
        )?;
        put(bias.name.clone(), &dy.sum(0)?)?;
        terms.push((dy, weight));
    }
    let terms: Vec<(&Tensor, &Frozen)> = terms.iter().map(|(dy, weight)| (dy, *weight)).collect();
    let d_hidden = linear_gradient(&terms, DType::F32)?;
    // The slope of tanh is one less its square.
    let d_down = (d_hidden * hidden.sqr()?.affine(-1.0, 1.0)?)?;
    put(DOWN[0].to_owned(), &linear_weight_gradient(&d_down, &mlp.rows)?)?;
    put(DOWN[1].to_owned(), &d_down.sum(0)?)?;
    put(ROWS.to_owned(), &linear_gradient(&[(&d_down, &mlp.down.0)], DType::F32)?)?;
    Ok(found)
}

/// A weight `[out, in]` and its bias.
type Layer<'a> = (Frozen, &'a NamedTensor);

struct Mlp<'a> {
    /// `[P, D]`.
    rows: Tensor,
    down: Layer<'a>,
    /// By the name of what each makes.
    up: BTreeMap<String, Layer<'a>>,
}

impl<'a> Mlp<'a> {
    /// None if `tensors` have no rows to make a prefix of.
    fn of(tensors: &'a [NamedTensor]) -> Result<Option<Self>> {
        let of_name: BTreeMap<&str, &NamedTensor> =
            tensors.iter().map(|tensor| (&*tensor.name, tensor)).collect();
        let Some(rows) = of_name.get(ROWS) else { return Ok(None) };
        let layer = |[weight, bias]: [&str; 2]| -> Result<Layer<'a>> {
            let part = |name: &str| of_name.get(name).copied().ok_or_else(|| broken(name, "is missing"));
            let (weight, bias) = (part(weight)?, part(bias)?);
            match weight.shape[..] {
                [out, into] if bias.shape == [out] => {
                    Ok((Frozen::from_f32(weight.data.clone(), out, into), bias))
                }
                _ => Err(broken(&weight.name, "has not the shape of its bias")),
            }
        };
        let mut up = BTreeMap::new();
        for name in of_name.keys().filter_map(|name| name.strip_suffix(UP[0])) {
            let [weight, bias] = UP.map(|part| format!("{name}{part}"));
            up.insert(format!("{name}.weight"), layer([&weight, &bias])?);
        }
        let rows = Tensor::from_slice(&rows.data, &rows.shape[..], &Device::Cpu)?;
        Ok(Some(Self { rows, down: layer(DOWN)?, up }))
    }

    /// `[P, width]`.
    fn hidden(&self) -> Result<Tensor> {
        let sums = with_bias(&linear(&self.rows, &self.down.0, DType::F32)?, self.down.1)?;
        let values: Vec<f32> = sums.flatten_all()?.to_vec1()?;
        let values = values.into_iter().map(tanh).collect();
        Ok(Tensor::from_vec(values, sums.dims(), &Device::Cpu)?)
    }
}

fn with_bias(sums: &Tensor, bias: &NamedTensor) -> Result<Tensor> {
    Ok(sums.broadcast_add(&Tensor::from_slice(&bias.data, bias.data.len(), &Device::Cpu)?)?)
}

fn broken(name: &str, what: &str) -> Error {
    Error::Prompt { what: format!("of the MLP that makes a prefix, {name} {what}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kept() -> Vec<NamedTensor> {
        let names = [
            "encoder.block.0.layer.0.SelfAttention.prefix_v",
            "decoder.block.1.layer.1.EncDecAttention.prefix_k",
        ];
        names.map(|name| NamedTensor::zeros(&format!("{name}.weight"), &[3, 6])).to_vec()
    }

    /// The results in f64, straight from the formula.
    fn in_f64(tensors: &[NamedTensor]) -> BTreeMap<String, Vec<f64>> {
        let of = |name: &str| tensors.iter().find(|tensor| tensor.name == name).unwrap();
        let layer = |rows: &[Vec<f64>], weight: &NamedTensor, bias: &NamedTensor| -> Vec<Vec<f64>> {
            let dot =
                |row: &Vec<f64>, w: &[f32]| row.iter().zip(w).map(|(x, w)| x * f64::from(*w)).sum::<f64>();
            let out = |row| {
                weight
                    .data
                    .chunks(weight.shape[1])
                    .zip(&bias.data)
                    .map(move |(w, b)| dot(row, w) + f64::from(*b))
            };
            rows.iter().map(|row| out(row).collect()).collect()
        };
        let rows: Vec<Vec<f64>> = of(ROWS)
            .data
            .chunks(of(ROWS).shape[1])
            .map(|row| row.iter().map(|x| f64::from(*x)).collect())
            .collect();
        let mut hidden = layer(&rows, of(DOWN[0]), of(DOWN[1]));
        hidden.iter_mut().flatten().for_each(|x| *x = x.tanh());
        let made = tensors.iter().filter_map(|tensor| tensor.name.strip_suffix(UP[0]));
        made.map(|name| {
            let [weight, bias] = UP.map(|part| of(&format!("{name}{part}")));
            (format!("{name}.weight"), layer(&hidden, weight, bias).concat())
        })
        .collect()
    }

    #[test]
    fn the_prefix_is_what_the_formula_says_and_has_the_names_that_the_model_takes() {
        let tensors = initial(&kept(), 5, 7, 1);
        assert_eq!(tensors, initial(&kept(), 5, 7, 1));
        assert_ne!(tensors, initial(&kept(), 5, 7, 2));
        let found = results(&tensors).unwrap().unwrap();
        let expected = in_f64(&tensors);
        assert_eq!(found.iter().map(|t| &t.name).collect::<Vec<_>>(), expected.keys().collect::<Vec<_>>());
        for tensor in &found {
            assert_eq!(tensor.shape, [3, 6]);
            for (x, y) in tensor.data.iter().zip(&expected[&tensor.name]) {
                assert!((f64::from(*x) - y).abs() < 1e-6, "{}: {x} and {y}", tensor.name);
            }
        }
        assert_eq!(results(&kept()).unwrap(), None);
    }

    /// Of a sum of all results, each times a number of its own.
    #[test]
    fn the_gradients_are_the_slopes_in_f64() {
        let tensors = initial(&kept(), 5, 7, 3);
        let mut random = Philox::new(4, &[]);
        let factors: BTreeMap<String, Vec<f32>> =
            kept().into_iter().map(|t| (t.name, t.data.iter().map(|_| random.normal()).collect())).collect();
        let objective = |tensors: &[NamedTensor]| -> f64 {
            let terms = |(name, values): (String, Vec<f64>)| {
                values.iter().zip(&factors[&name]).map(|(x, f)| x * f64::from(*f)).sum::<f64>()
            };
            in_f64(tensors).into_iter().map(terms).sum()
        };
        let found = gradients(&tensors, &factors).unwrap();
        assert_eq!(found.len(), tensors.len());
        let mut worst = 0.0f64;
        for (t, tensor) in tensors.iter().enumerate() {
            for (i, found) in found[&tensor.name].iter().enumerate() {
                // A power of two, so that the step is the same up and down.
                let step = 2f32.powi(-12);
                let [up, down] = [step, -step].map(|step| {
                    let mut moved = tensors.clone();
                    moved[t].data[i] += step;
                    (objective(&moved), f64::from(moved[t].data[i]))
                });
                let slope = (up.0 - down.0) / (up.1 - down.1);
                worst = worst.max((slope - f64::from(*found)).abs());
            }
        }
        println!("largest difference: {worst:.1e}");
        assert!(worst < 2e-5, "{worst}");
    }

    #[test]
    fn an_mlp_that_is_not_whole_is_refused_by_the_name_of_what_is_missing() {
        let mut tensors = initial(&kept(), 5, 7, 1);
        let last = tensors.pop().unwrap();
        let error = results(&tensors).unwrap_err().to_string();
        assert!(error.contains(&last.name) && error.contains("is missing"), "{error}");
        tensors.push(NamedTensor::zeros(&last.name, &[5]));
        assert!(results(&tensors).unwrap_err().to_string().contains("shape of its bias"));
    }
}
