//! What each method that trains weights begins with.

use candle_core::DType;
use incipit_kernels::rng::Philox;
use incipit_model::{Config, Example, Microbatch};
use incipit_weights::{Random, RandomTensor, Source};

use crate::{
    Error, Result,
    backbone::Backbone,
    init::MOST_FREQUENT,
    optimizer::NamedTensor,
    spec::{Method, PrefixPart, TrainSpec},
    weights::projection,
};

/// Distinguishes these random numbers from the job's others.
const STREAM: u64 = u64::from_be_bytes(*b"prefix 0");

/// What a method that trains weights begins with. All ranks make this call together.
///
/// # Errors
/// If a tensor of the model cannot be read, or an exchange with other ranks fails.
pub(crate) fn initial(backbone: &Backbone, spec: &TrainSpec) -> Result<Vec<NamedTensor>> {
    match spec.method {
        Method::Adapter => adapters(backbone.config(), spec.adapter_width.unwrap_or_default(), spec.seed),
        Method::Prefix => {
            let words = prefixes(backbone, spec.prompt_length, spec.seed)?;
            let kept: Vec<NamedTensor> = match spec.prefix_part.unwrap_or(PrefixPart::All) {
                PrefixPart::All => words,
                PrefixPart::Decoder => words.into_iter().filter_map(as_past).collect(),
            };
            Ok(match spec.prefix_projection {
                Some(width) => projection::initial(&kept, backbone.config().d_model, width, spec.seed),
                None => kept,
            })
        }
        _ => all_weights(backbone),
    }
}

/// All weights of the model, as its files have them.
fn all_weights(backbone: &Backbone) -> Result<Vec<NamedTensor>> {
    let source = &backbone.source;
    let read = |(name, shape): (String, Vec<usize>)| {
        let data = source.convertible(&name, &shape)?.to_f32();
        Ok(NamedTensor { name, shape, data })
    };
    backbone.engine.model().weights().into_iter().map(read).collect()
}

/// An adapter behind every sub-layer (Houlsby et al. 2019), with `width` inner columns. They begin by changing nothing: the weights out of
/// them are 0, and those into them random.
fn adapters(config: &Config, width: usize, seed: u64) -> Result<Vec<NamedTensor>> {
    let d = config.d_model;
    let sub_layers = |stack: &'static str, layers: usize, count: usize| {
        (0..layers).flat_map(move |i| (0..count).map(move |j| format!("{stack}.block.{i}.layer.{j}.adapter")))
    };
    let names = sub_layers("encoder", config.num_layers, 2).chain(sub_layers(
        "decoder",
        config.num_decoder_layers,
        3,
    ));
    let mut tensors = Vec::new();
    for name in names {
        let down = RandomTensor {
            name: format!("{name}.down.weight"),
            shape: vec![width, d],
            mean: 0.0,
            deviation: (d as f32).powf(-0.5),
        };
        let data =
            Random::new(vec![down.clone()], DType::F32, seed)?.frozen(&down.name, &down.shape)?.to_f32();
        tensors.push(NamedTensor { name: down.name, shape: down.shape, data });
        tensors.push(NamedTensor::zeros(&format!("{name}.down.bias"), &[width]));
        tensors.push(NamedTensor::zeros(&format!("{name}.up.weight"), &[d, width]));
        tensors.push(NamedTensor::zeros(&format!("{name}.up.bias"), &[d]));
    }
    Ok(tensors)
}

/// A prefix of `length` keys and values for every attention (Li and Liang 2021). They begin as those of real words, drawn from
/// the most frequent pieces, which Li and Liang found to be better than random ones.
fn prefixes(backbone: &Backbone, length: usize, seed: u64) -> Result<Vec<NamedTensor>> {
    let most = (MOST_FREQUENT.end as usize).min(backbone.config().vocab_size) as u32;
    let mut random = Philox::new(seed, &[STREAM]);
    let first = MOST_FREQUENT.start;
    if most <= first {
        return Err(Error::spec(
            "method",
            &"prefix begins with pieces of the vocabulary, and this one has none",
        ));
    }
    let words: Vec<u32> = (0..length).map(|_| first + random.below(u64::from(most - first)) as u32).collect();
    let example = Example { prompt: None, input: &words, target: &words, key: 0 };
    let batch = Microbatch { prompts: &[], examples: &[example] };
    let rows = backbone.engine.model().keys_and_values(&batch)?;
    let tensor = |(name, rows): (String, candle_core::Tensor)| {
        let shape = rows.dims().to_vec();
        Ok(NamedTensor { name, shape, data: rows.to_dtype(DType::F32)?.flatten_all()?.to_vec1()? })
    };
    rows.into_iter().map(tensor).collect()
}

/// A prefix of the decoder's attention to itself, as rows that stand before the sequence; none of another attention.
fn as_past(tensor: NamedTensor) -> Option<NamedTensor> {
    if !(tensor.name.starts_with("decoder.") && tensor.name.contains(".SelfAttention.")) {
        return None;
    }
    Some(NamedTensor { name: tensor.name.replace(".prefix_", ".past_"), ..tensor })
}
