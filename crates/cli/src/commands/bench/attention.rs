//! How much of a step is attention: the same operations on made-up operands of the step's shapes, timed alone.

use std::time::Instant;

use anyhow::Result;
use candle_core::{DType, Device, Tensor};
use incipit_kernels::{Attention, Buckets, Frozen, PositionBias, Segments, attention, attention_gradient};
use incipit_model::Config;

/// Times that each attention is timed; the fastest counts.
const REPEATS: usize = 3;

/// Seconds that all attentions of a step take, forward and backward, without recomputation.
///
/// `inputs` are the encoder's rows of each example, `target` the decoder's.
pub(super) fn seconds(config: &Config, dtype: DType, inputs: &[usize], target: usize) -> Result<f64> {
    let encoder = Segments::new(inputs.iter().copied());
    let decoder = Segments::new(inputs.iter().map(|_| target));
    let bias = |buckets: Buckets, longest| {
        let table =
            Frozen::from_f32(vec![0.1; buckets.count * config.num_heads], buckets.count, config.num_heads);
        PositionBias::new(&table, buckets, longest)
    };
    let (both, past) = (bias(config.buckets(true), encoder.longest())?, bias(config.buckets(false), target)?);
    let spec = Attention {
        queries: &encoder,
        keys: &encoder,
        heads: config.num_heads,
        bias: Some(&both),
        causal: false,
        prefix: 0,
        dropout: None,
    };
    let own = Attention { queries: &decoder, keys: &decoder, bias: Some(&past), causal: true, ..spec };
    let cross = Attention { queries: &decoder, bias: None, ..spec };
    let time = |spec: &Attention<'_>| one(config, dtype, spec);
    let decoder_layers = config.num_decoder_layers as f64;
    Ok(config.num_layers as f64 * time(&spec)? + decoder_layers * (time(&own)? + time(&cross)?))
}

/// Seconds of one attention, forward and backward.
fn one(config: &Config, dtype: DType, spec: &Attention<'_>) -> Result<f64> {
    let operand = |rows: &Segments| -> Result<Tensor> {
        Ok(Tensor::randn(0.0f32, 0.3, (rows.total(), config.inner()), &Device::Cpu)?.to_dtype(dtype)?)
    };
    let (q, k, v, dy) =
        (operand(spec.queries)?, operand(spec.keys)?, operand(spec.keys)?, operand(spec.queries)?);
    let mut best = f64::MAX;
    for _ in 0..REPEATS {
        let start = Instant::now();
        let attended = attention(spec, &q, &k, &v)?;
        attention_gradient(spec, [&q, &k, &v], &attended, &dy)?;
        best = best.min(start.elapsed().as_secs_f64());
    }
    Ok(best)
}
