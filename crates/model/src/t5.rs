//! The whole model: from token ids and prompts to losses and the prompts' gradients.

use std::ops::Range;

use candle_core::{DType, Device, Tensor};
use incipit_kernels::{
    Dropout, LossSlope, Readers, Rows, Segments, Softmax, Targets, Vocabulary, cross_entropy_gradient, embed,
    linear, linear_gradient,
};
use incipit_mesh::Shard;
use incipit_weights::Source;

use crate::axis::TensorAxis;
use crate::batch::{Example, Layout, Microbatch, Span};
use crate::config::Config;
use crate::decoder::{Decoder, Memory};
use crate::encoder::{Encoder, Pass};
use crate::gradients::WeightGradients;
use crate::prompt::{LayerPrompts, RowGradients, behind_prompts, taken};
use crate::sharding::{self, Slices, Weight};
use crate::{Error, Result};

mod reading;
mod weights;

/// The head of a model that has one of its own.
const HEAD: &str = "lm_head.weight";

/// Target tokens whose logits are held at once.
const HEAD_ROWS: usize = 256;

/// A frozen T5, or what a rank of the tensor axis has of it: then every method is a step that all ranks make together, and
/// its result is the same on each.
pub struct T5 {
    config: Config,
    dtype: DType,
    device: Device,
    axis: TensorAxis,
    vocabulary: Vocabulary,
    /// `[V, D]`, the rows that are here; so is the head, which may be the same.
    shared: Weight,
    pub(crate) encoder: Encoder,
    pub(crate) decoder: Decoder,
    head: Weight,
}

/// How a pass with gradients is made.
#[derive(Clone, Copy, Debug, Default)]
pub struct PassOptions {
    /// Keep only the layers' inputs, and compute the layers' insides again in backward: a third more work, and a fraction
    /// of the memory. The result is the same, bit for bit.
    pub recompute: bool,
    /// Probability with which numbers of the frozen model are dropped; 0 for none.
    pub dropout: f32,
    /// Weight of the squared logarithm of the normaliser; 0 for none.
    pub z_loss: f32,
}

/// The encoder's result for a microbatch, from which both losses and generated tokens follow.
pub struct Encoded {
    /// `[T, D]`, in the model's type.
    pub(crate) rows: Tensor,
    pub(crate) segments: Segments,
}

impl Encoded {
    /// Of these examples alone, ascending.
    pub(crate) fn of(&self, examples: &[usize]) -> Result<Self> {
        let ranges: Vec<Range<usize>> = examples.iter().map(|e| self.segments.range(*e)).collect();
        let segments = Segments::new(ranges.iter().map(ExactSizeIterator::len));
        Ok(Self { rows: taken(&self.rows, &ranges)?, segments })
    }
}

/// Loss and gradient of one example.
#[derive(Clone, Debug)]
pub struct ExampleGradient {
    /// Sum of the target tokens' losses.
    pub loss: f32,
    /// Gradient of `scale * loss` to the rows of the example's prompt, of their shape, f32, on the model's device; `[0, D]` without
    /// a prompt.
    pub prompt_gradient: Tensor,
}

impl T5 {
    /// Takes the weights from `source`; activations are of type `dtype` (bf16 or f32), with an f32 residual stream.
    ///
    /// # Errors
    /// If a tensor is missing or has another shape or type, or `dtype` is neither bf16 nor f32.
    pub fn load(config: Config, source: &dyn Source, dtype: DType) -> Result<Self> {
        Self::load_on(config, source, dtype, &TensorAxis::whole(), &Device::Cpu)
    }

    /// As [`T5::load`], of each tensor only what this rank of the tensor axis has. On the CPU weights stay where the source has
    /// them; to a GPU they are copied.
    ///
    /// # Errors
    /// As [`T5::load`]; also if heads, feed-forward width or vocabulary cannot be divided by the number of ranks, or the device has not
    /// memory enough.
    pub fn load_on(
        mut config: Config,
        source: &dyn Source,
        dtype: DType,
        axis: &TensorAxis,
        device: &Device,
    ) -> Result<Self> {
        if !matches!(dtype, DType::BF16 | DType::F32) {
            let what = format!(
                "a T5 computes in bf16 or f32, not {dtype:?}; f16 overflows in its feed-forward layers"
            );
            return Err(Error::Options { what });
        }
        sharding::check(&config, axis.shard())?;
        let parts = Slices { source, shard: axis.shard(), device, dtype };
        let shape = [config.vocab_size, config.d_model];
        let shared = parts.weight(embedding_name(source), &shape)?;
        config.own_head = source.contains(HEAD);
        let head = if config.own_head { parts.weight(HEAD, &shape)? } else { shared.clone() };
        let logit_scale = if config.scale_logits { 1.0 / (config.d_model as f32).sqrt() } else { 1.0 };
        let encoder = Encoder::load(&config, parts, axis)?;
        let decoder = Decoder::load(&config, parts, axis, logit_scale)?;
        let vocabulary = axis.vocabulary(config.vocab_size);
        let device = device.clone();
        Ok(Self { config, dtype, device, axis: axis.clone(), vocabulary, shared, encoder, decoder, head })
    }

    /// Goes on with the same weights in another group, whatever became of the exchanges of the old one.
    ///
    /// # Errors
    /// If this rank would have another part of the model there; then nothing has changed.
    pub fn regroup(&mut self, axis: &TensorAxis) -> Result<()> {
        let (here, asked) = (self.axis.shard(), axis.shard());
        if here != asked {
            let part = |shard: Shard| format!("part {} of {}", shard.index(), shard.count());
            let what = format!(
                "{} of the model is here, and the new group would have {} here; load the model anew",
                part(here),
                part(asked)
            );
            return Err(Error::Options { what });
        }
        self.axis = axis.clone();
        self.encoder.regroup(axis);
        self.decoder.regroup(axis);
        Ok(())
    }

    /// The model's shape.
    #[must_use]
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// Name and shape of each weight of the model itself, as the source has them that it was loaded from.
    #[must_use]
    pub fn weights(&self) -> Vec<(String, Vec<usize>)> {
        let named = |(name, shape): (String, Vec<usize>)| match name.as_str() {
            "shared.weight" => (self.shared.name.clone(), shape),
            _ => (name, shape),
        };
        self.config.tensors().into_iter().map(named).collect()
    }

    /// Where its weights lie, and passes are made.
    #[must_use]
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// The type of its activations.
    #[must_use]
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Row `id` of the shared embedding, `D` numbers.
    ///
    /// # Errors
    /// If `id` is outside of the vocabulary.
    pub fn embedding_row(&self, id: u32) -> Result<Vec<f32>> {
        self.embedding_rows(&[id])
    }

    /// The rows of these tokens in the shared embedding, end to end: `[n, D]`, row-major.
    ///
    /// # Errors
    /// If one is outside of the vocabulary.
    pub fn embedding_rows(&self, ids: &[u32]) -> Result<Vec<f32>> {
        let size = self.config.vocab_size;
        if let Some(id) = ids.iter().find(|id| **id as usize >= size) {
            let what = format!("token {id} is outside of the model's vocabulary of {size}");
            return Err(Error::Options { what });
        }
        Ok(self.embedded(ids)?.flatten_all()?.to_vec1()?)
    }

    /// The product of every row of the shared embedding with `direction`, `D` numbers which are rounded to the model's type first:
    /// one number a token, `[V]`. The table is read where it lies, a panel at a time.
    ///
    /// # Errors
    /// If `direction` has not `D` numbers.
    pub fn embedding_scores(&self, direction: &[f32]) -> Result<Vec<f32>> {
        let row = Tensor::from_slice(direction, (1, direction.len()), &Device::Cpu)?;
        let row = row.to_dtype(self.dtype)?.to_device(&self.device)?;
        let scores = self.axis.gather_columns(linear(&row, &self.shared.matrix, DType::F32)?)?;
        Ok(scores.flatten_all()?.to_vec1()?)
    }

    /// The encoder's result for all examples end to end, with the prompts that stand there: `[T, D]` f32, each example's rows together.
    ///
    /// # Errors
    /// If the batch does not fit the model.
    pub fn encode(&self, batch: &Microbatch<'_>) -> Result<Tensor> {
        Ok(self.encoded(batch)?.rows.to_dtype(DType::F32)?)
    }

    /// As [`T5::encode`], for [`T5::loss_after`] and [`T5::generate_after`].
    ///
    /// # Errors
    /// If the batch does not fit the model.
    pub fn encoded(&self, batch: &Microbatch<'_>) -> Result<Encoded> {
        batch.check(&self.config, false)?;
        let layout = batch.encoder();
        let segments = layout.rows();
        let prompts = LayerPrompts::of(batch, &layout.spans());
        let x = self.embedding(batch, &layout)?;
        let pass = Pass { prompts: prompts.as_ref(), ..self.pass(&segments) };
        Ok(Encoded { rows: self.encoder.infer(&self.config, x, &pass)?, segments })
    }

    /// The logits of all target tokens end to end: `[sum of target lengths, V]` f32.
    ///
    /// # Errors
    /// If the batch does not fit the model.
    pub fn logits(&self, batch: &Microbatch<'_>) -> Result<Tensor> {
        self.head(&self.decoded(batch, &self.encoded(batch)?, 1)?)
    }

    /// Each example's sum of token losses, without dropout.
    ///
    /// # Errors
    /// If the batch does not fit the model.
    pub fn loss(&self, batch: &Microbatch<'_>) -> Result<Vec<f32>> {
        self.loss_after(&self.encoded(batch)?, batch)
    }

    /// As [`T5::loss`], for a batch that was encoded already.
    ///
    /// # Errors
    /// If the batch does not fit the model.
    pub fn loss_after(&self, encoded: &Encoded, batch: &Microbatch<'_>) -> Result<Vec<f32>> {
        self.losses(encoded, batch, 1)
    }

    /// What [`T5::loss_after`] gives for each of `labels` in the place of the target: example by example, the labels of one after the
    /// other. The encoder's result, and the decoder's keys and values of it, are shared by an example's labels. All labels' rows together
    /// decide whether there are any ([`T5::absorbs`]): where a label's own would decide alike, losses have the same bits, else they differ
    /// by rounding. The targets of `batch` are not read.
    ///
    /// # Errors
    /// If a label is empty or does not fit the model.
    pub fn label_losses_after<'a>(
        &self,
        encoded: &Encoded,
        batch: &Microbatch<'a>,
        labels: &'a [Vec<u32>],
    ) -> Result<Vec<f32>> {
        let labelled = |e: &'a Example<'a>| labels.iter().map(|label| Example { target: label, ..*e });
        let pairs: Vec<Example<'a>> = batch.examples.iter().flat_map(labelled).collect();
        self.losses(encoded, &Microbatch { prompts: batch.prompts, examples: &pairs }, labels.len())
    }

    /// The loss of each example of `batch`, in which `readers` examples of one encoding follow each other.
    fn losses(&self, encoded: &Encoded, batch: &Microbatch<'_>, readers: usize) -> Result<Vec<f32>> {
        let rows = self.decoded(batch, encoded, readers)?;
        let targets = batch.targets();
        let mut losses = Vec::new();
        for (first, chunk) in chunks(&targets) {
            let (_, softmax) = self.softmax(&rows.narrow(0, first, chunk.len())?, chunk)?;
            losses.push(softmax.losses(0.0)?);
        }
        sums(&losses, &batch.target_rows())
    }

    /// Each example's loss, and the gradient of `scale[e] * loss of e` to its prompt.
    ///
    /// An example's result is the same bit for bit whatever is computed beside it.
    ///
    /// # Errors
    /// If the batch does not fit the model, or there is not one scale an example.
    pub fn loss_and_gradient(
        &self,
        batch: &Microbatch<'_>,
        scale: &[f32],
        options: &PassOptions,
    ) -> Result<Vec<ExampleGradient>> {
        check_pass(batch, &self.config, scale)?;
        let pass = |part: &[usize]| {
            let examples: Vec<Example<'_>> = part.iter().map(|e| batch.examples[*e]).collect();
            let scale: Vec<f32> = part.iter().map(|e| scale[*e]).collect();
            let part = Microbatch { prompts: batch.prompts, examples: &examples };
            let Backward { losses, prompt_gradients, .. } =
                self.backward(&part, &scale, options, &mut WeightGradients::default())?;
            let pairs = losses.into_iter().zip(prompt_gradients);
            Ok(pairs.map(|(loss, prompt_gradient)| ExampleGradient { loss, prompt_gradient }).collect())
        };
        if options.dropout != 0.0 {
            return pass(&(0..batch.examples.len()).collect::<Vec<_>>());
        }
        self.by_reading(&self.decoder_rows(batch), pass)
    }

    /// Forward and backward.
    fn backward(
        &self,
        batch: &Microbatch<'_>,
        scale: &[f32],
        options: &PassOptions,
        gradients: &mut WeightGradients,
    ) -> Result<Backward> {
        check_pass(batch, &self.config, scale)?;
        let keys = || Dropout::new(options.dropout, batch.keys());
        let dropout = (options.dropout != 0.0).then(keys).transpose()?;
        let start = [self.config.decoder_start_token_id];
        let (encoder, decoder) = (batch.encoder(), batch.decoder(&start));
        let (encoder_rows, decoder_rows) = (encoder.rows(), decoder.rows());
        let (encoder_spans, decoder_spans) = (encoder.spans(), decoder.spans());
        let prompts = LayerPrompts::of(batch, &encoder_spans);
        let pass = Pass {
            dropout: dropout.as_ref(),
            recompute: options.recompute,
            prompts: prompts.as_ref(),
            ..self.pass(&encoder_rows)
        };
        let x = self.embedding(batch, &encoder)?;
        let (memory, encoder_state) = self.encoder.forward(&self.config, x, &pass)?;
        // Where weights are trained, theirs would be among the gradients; and what is dropped is named by keys.
        let absorbs = gradients.is_empty() && dropout.is_none() && self.absorbs_all(&decoder_rows);
        let absorbed = absorbs.then(|| Readers::new(&decoder_rows, &encoder_rows, self.decoder.heads()));
        let absorbed = absorbed.as_ref();
        let memory = Memory { rows: &memory, segments: &encoder_rows, readers: &decoder_rows, absorbed };
        // Without a prompt or weights to train there, nobody reads the gradient to what the decoder reads.
        let to_the_end = !gradients.is_empty() || decoder_spans.iter().any(Option::is_some);
        let decoder_pass = Pass { rows: &decoder_rows, prompts: None, to_the_end, ..pass };
        let x = self.embedding(batch, &decoder)?;
        let (rows, decoder_state) = self.decoder.forward(&self.config, x, memory, &decoder_pass)?;
        let targets = decoder.token_ranges();
        let rows = taken(&rows, &targets)?;
        let (losses, d_rows) = self.head_gradient(&rows, batch, (scale, options.z_loss), gradients)?;
        drop(rows);
        let d_rows = behind_prompts(d_rows, &targets, &decoder_rows)?;
        let (d_memory, d_targets) =
            self.decoder.backward(d_rows, decoder_state, memory, &decoder_pass, gradients)?;
        let (d_input, d_layers) = self.encoder.backward(d_memory, encoder_state, &pass, gradients)?;
        let places = encoder_spans.into_iter().zip(decoder_spans);
        let d_rows = RowGradients { input: &d_input, layers: &d_layers, targets: d_targets.as_ref() };
        let prompt_gradients =
            places.enumerate().map(|(e, spans)| d_rows.of_prompt(e, spans)).collect::<Result<_>>()?;
        Ok(Backward { losses: sums(&losses, &batch.target_rows())?, prompt_gradients, d_input, d_targets })
    }

    /// A pass without gradients over these rows.
    fn pass<'a>(&self, rows: &'a Segments) -> Pass<'a> {
        Pass { rows, dropout: None, dtype: self.dtype, recompute: true, prompts: None, to_the_end: false }
    }

    /// Embedded rows of these tokens, `[n, D]` f32.
    pub(crate) fn embedded(&self, tokens: &[u32]) -> Result<Tensor> {
        self.axis.reduce(&embed(&self.shared.matrix, self.vocabulary, &[], &[Rows::Tokens(tokens)])?)
    }

    /// The rows of the examples' prompts that stand in the decoder, end to end.
    pub(crate) fn prompts_in_decoder(&self, batch: &Microbatch<'_>) -> Result<Tensor> {
        let start = [self.config.decoder_start_token_id];
        let layout = batch.decoder(&start);
        let ranges: Vec<_> = layout.spans().iter().flatten().map(Span::rows).collect();
        taken(&self.embedding(batch, &layout)?, &ranges)
    }

    /// The logits `[n, V]` f32 of the decoder's result `rows` `[n, D]`.
    pub(crate) fn head(&self, rows: &Tensor) -> Result<Tensor> {
        self.axis.gather_columns(linear(rows, &self.head.matrix, DType::F32)?)
    }

    /// What a stack reads, `[T, D]` f32.
    fn embedding(&self, batch: &Microbatch<'_>, layout: &Layout<'_>) -> Result<Tensor> {
        let runs = layout.runs(self.axis.shard().index() == 0);
        let prompts = batch.embedded_prompts()?;
        self.axis.reduce(&embed(&self.shared.matrix, self.vocabulary, &prompts, &runs)?)
    }

    /// The logits `[n, V]` f32 that are here, and the softmax over all.
    fn softmax(&self, rows: &Tensor, targets: &[u32]) -> Result<(Tensor, Softmax)> {
        let logits = linear(rows, &self.head.matrix, DType::F32)?;
        let own = Softmax::new(&logits, self.targets(targets))?;
        Ok((logits, self.axis.softmax(own)?))
    }

    fn targets<'a>(&self, ids: &'a [u32]) -> Targets<'a> {
        Targets { ids, vocabulary: self.vocabulary }
    }

    /// The token losses in parts, and the gradient `[Td, D]` f32 to the decoder's result. Logits live a few rows at a time.
    fn head_gradient(
        &self,
        rows: &Tensor,
        batch: &Microbatch<'_>,
        (scale, z_loss): (&[f32], f32),
        gradients: &mut WeightGradients,
    ) -> Result<(Vec<Tensor>, Tensor)> {
        let targets = batch.targets();
        let scales: Vec<f32> = batch
            .examples
            .iter()
            .zip(scale)
            .flat_map(|(e, s)| std::iter::repeat_n(*s, e.target.len()))
            .collect();
        let (mut losses, mut d_rows) = (Vec::new(), Vec::new());
        for (first, chunk) in chunks(&targets) {
            let rows = rows.narrow(0, first, chunk.len())?;
            let (logits, softmax) = self.softmax(&rows, chunk)?;
            losses.push(softmax.losses(z_loss)?);
            let normalisers = softmax.normalisers()?;
            let scale = &scales[first..first + chunk.len()];
            let slope = LossSlope { normalisers: &normalisers, scale, z_loss };
            let d_logits = cross_entropy_gradient(&logits, self.targets(chunk), slope, self.dtype)?;
            gradients.add_products(&[(&d_logits, &self.head)], || Ok(rows))?;
            let partial = linear_gradient(&[(&d_logits, &self.head.matrix)], DType::F32)?;
            d_rows.push(self.axis.reduce_gradient(&partial)?);
        }
        Ok((losses, Tensor::cat(&d_rows, 0)?))
    }
}

/// Checks that the model can make a pass with gradients.
fn check_pass(batch: &Microbatch<'_>, config: &Config, scale: &[f32]) -> Result<()> {
    batch.check(config, true)?;
    if scale.len() == batch.examples.len() {
        return Ok(());
    }
    let what = format!("{} scales for {} examples", scale.len(), batch.examples.len());
    Err(Error::Options { what })
}

/// What a pass with gradients gives.
struct Backward {
    /// Each example's, over its target tokens.
    losses: Vec<f32>,
    /// The gradient to the embedded rows of the encoder, `[T, D]` f32.
    d_input: Tensor,
    /// The one to the decoder's, `[Td, D]` f32, where something is trained there.
    d_targets: Option<Tensor>,
    /// Each example's, of the shape of its prompt's rows.
    prompt_gradients: Vec<Tensor>,
}

/// The name of the table `[V, D]` of the vocabulary's embeddings. Checkpoints in the wild keep it under one of three, or under several.
#[must_use]
pub fn embedding_name(source: &dyn Source) -> &'static str {
    let names = ["shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight"];
    names.into_iter().find(|name| source.contains(name)).unwrap_or(names[0])
}

/// The targets a few at a time, each part with its place.
fn chunks(targets: &[u32]) -> impl Iterator<Item = (usize, &[u32])> {
    targets.chunks(HEAD_ROWS).enumerate().map(|(i, chunk)| (i * HEAD_ROWS, chunk))
}

/// Each example's sum of the token losses, which come in parts. Waits for the device.
fn sums(losses: &[Tensor], rows: &Segments) -> Result<Vec<f32>> {
    let losses = if losses.is_empty() { Vec::new() } else { Tensor::cat(losses, 0)?.to_vec1::<f32>()? };
    let sum = |e| losses[rows.range(e)].iter().map(|l| f64::from(*l)).sum::<f64>() as f32;
    Ok((0..rows.len()).map(sum).collect())
}
