//! What methods need that train weights: gradients to them, and what a prefix begins with.

use std::collections::BTreeMap;

use candle_core::Tensor;
use incipit_kernels::embed_gradient;

use super::{Backward, PassOptions, T5};
use crate::Result;
use crate::batch::Microbatch;
use crate::decoder::Memory;
use crate::encoder::Pass;
use crate::gradients::WeightGradients;
use crate::prompt::LayerPrompts;
use crate::sharding::Rule;

impl T5 {
    /// Each example's loss. The gradients of the sum of `scale[e] * loss of e` to weights are added to `gradients`; each is this rank's
    /// part of the weight, and the sum over this batch alone.
    ///
    /// # Errors
    /// As [`T5::loss_and_gradient`].
    pub fn loss_and_weight_gradients(
        &self,
        batch: &Microbatch<'_>,
        scale: &[f32],
        options: &PassOptions,
        gradients: &mut WeightGradients,
    ) -> Result<Vec<f32>> {
        let Backward { losses, d_input, d_targets, .. } = self.backward(batch, scale, options, gradients)?;
        self.embedding_gradient(&d_input, &batch.encoder().tokens(), gradients)?;
        if let Some(d_targets) = d_targets {
            let start = [self.config.decoder_start_token_id];
            self.embedding_gradient(&d_targets, &batch.decoder(&start).tokens(), gradients)?;
        }
        Ok(losses)
    }

    /// The sums of whole weights, of which every rank of the tensor axis has a part.
    ///
    /// # Errors
    /// If an exchange with other ranks fails.
    pub fn gathered(&self, gradients: WeightGradients) -> Result<BTreeMap<String, Tensor>> {
        let mut whole = BTreeMap::new();
        for (name, sum) in gradients.into_sums() {
            let Some(sum) = sum else { continue };
            let sum = match Rule::of(&name).and_then(Rule::dim) {
                Some(0) => self.axis.gather_rows(sum)?,
                Some(_) => self.axis.gather_columns(sum)?,
                None => sum,
            };
            whole.insert(name, sum);
        }
        Ok(whole)
    }

    /// Adds the gradient to the table, from the one to rows of it.
    fn embedding_gradient(
        &self,
        dx: &Tensor,
        tokens: &[Option<u32>],
        gradients: &mut WeightGradients,
    ) -> Result<()> {
        let rows = self.shared.matrix.rows();
        gradients.add(&self.shared.name, || Ok(embed_gradient(dx, tokens, self.vocabulary, rows)?))
    }

    /// The keys and values of every attention for this batch, `[rows, H K]`, each by the name of a prefix that would have these rows.
    ///
    /// # Errors
    /// If the batch does not fit the model, or an exchange with other ranks fails.
    pub fn keys_and_values(&self, batch: &Microbatch<'_>) -> Result<Vec<(String, Tensor)>> {
        batch.check(&self.config, true)?;
        let start = [self.config.decoder_start_token_id];
        let (encoder, decoder) = (batch.encoder(), batch.decoder(&start));
        let (encoder_rows, decoder_rows) = (encoder.rows(), decoder.rows());
        let prompts = LayerPrompts::of(batch, &encoder.spans());
        let pass = Pass { recompute: false, prompts: prompts.as_ref(), ..self.pass(&encoder_rows) };
        let x = self.embedding(batch, &encoder)?;
        let (memory, encoder_state) = self.encoder.forward(&self.config, x, &pass)?;
        let (segments, readers) = (&encoder_rows, &decoder_rows);
        let memory = Memory { rows: &memory, segments, readers, absorbed: None };
        let pass = Pass { rows: &decoder_rows, prompts: None, ..pass };
        let x = self.embedding(batch, &decoder)?;
        let (_, decoder_state) = self.decoder.forward(&self.config, x, memory, &pass)?;
        let all = [self.encoder.as_prefixes(&encoder_state), self.decoder.as_prefixes(&decoder_state)];
        all.concat().into_iter().map(|(name, rows)| Ok((name, self.axis.gather_columns(rows)?))).collect()
    }
}
