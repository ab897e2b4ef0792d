//! How the decoder reads the encoder's result: with keys and values of it or, where an example's rows are few, without.

use candle_core::{DType, Tensor};
use incipit_kernels::{Readers, Segments};

use super::{Encoded, T5};
use crate::Result;
use crate::batch::{Example, Microbatch};
use crate::decoder::Memory;

/// With this part of a head's numbers as rows, an example has 3/8 of the work without keys and values, forward and backward, and less
/// with fewer. (A row of the encoder's takes 12 operations a decoder's row, head and number of its own without them, and with them 8 a
/// head, number of the head's and number of its own.) It is known of an example alone, so that no other changes its numbers.
const FEW: usize = 4;

impl T5 {
    /// Whether the decoder attends to the encoder's result without keys and values for an example that has so few rows there. (Where
    /// something is dropped, or weights are trained, it has them always; and in f32, which is there to be compared, rounding is that of
    /// everybody's way.)
    #[must_use]
    pub fn absorbs(&self, rows: usize) -> bool {
        self.dtype == DType::BF16 && self.decoder.can_absorb() && FEW * rows <= self.config.d_kv
    }

    pub(super) fn absorbs_all(&self, rows: &Segments) -> bool {
        (0..rows.len()).all(|e| self.absorbs(rows.range(e).len()))
    }

    pub(super) fn decoder_rows(&self, batch: &Microbatch<'_>) -> Segments {
        batch.decoder(&[self.config.decoder_start_token_id]).rows()
    }

    /// What `pass` gives for each example, in their order. Those of few `rows` go by themselves, if there are others.
    pub(super) fn by_reading<R>(
        &self,
        rows: &Segments,
        pass: impl Fn(&[usize]) -> Result<Vec<R>>,
    ) -> Result<Vec<R>> {
        let (few, many): (Vec<_>, Vec<_>) = (0..rows.len()).partition(|e| self.absorbs(rows.range(*e).len()));
        if few.is_empty() || many.is_empty() {
            return pass(&(0..rows.len()).collect::<Vec<_>>());
        }
        let mut results: Vec<Option<R>> = (0..rows.len()).map(|_| None).collect();
        for part in [few, many] {
            let given = pass(&part)?;
            part.into_iter().zip(given).for_each(|(e, given)| results[e] = Some(given));
        }
        Ok(results.into_iter().flatten().collect())
    }

    /// The decoder's result for all target tokens end to end; `readers` examples that follow each other read one encoding, whose rows in
    /// the decoder are those of all of them.
    pub(super) fn decoded(
        &self,
        batch: &Microbatch<'_>,
        encoded: &Encoded,
        readers: usize,
    ) -> Result<Tensor> {
        batch.check(&self.config, true)?;
        let rows = self.decoder_rows(batch);
        let of_encoding = |e: usize| (e * readers..(e + 1) * readers).map(|i| rows.range(i).len()).sum();
        let by_encoding = Segments::new((0..encoded.segments.len()).map(of_encoding));
        // One tensor for all encodings that are read in the same way.
        let pass = |part: &[usize]| {
            let all = part.iter().flat_map(|e| e * readers..(e + 1) * readers);
            let examples: Vec<Example<'_>> = all.map(|i| batch.examples[i]).collect();
            let part_of = Microbatch { prompts: batch.prompts, examples: &examples };
            let decoded = self.decoded_alike(&part_of, encoded, &by_encoding, part)?;
            if part.len() == by_encoding.len() {
                return Ok(vec![decoded]);
            }
            let mut next = 0;
            let of_encoding = |e: &usize| {
                let targets = &batch.examples[e * readers..(e + 1) * readers];
                let count = targets.iter().map(|example| example.target.len()).sum();
                next += count;
                Ok(decoded.narrow(0, next - count, count)?)
            };
            part.iter().map(of_encoding).collect()
        };
        let parts: Vec<Tensor> = self.by_reading(&by_encoding, pass)?;
        if parts.len() == 1 { Ok(parts[0].clone()) } else { Ok(Tensor::cat(&parts, 0)?) }
    }

    /// The same for the examples of these encodings, which are all read in the same way.
    fn decoded_alike(
        &self,
        batch: &Microbatch<'_>,
        encoded: &Encoded,
        by_encoding: &Segments,
        encodings: &[usize],
    ) -> Result<Tensor> {
        let start = [self.config.decoder_start_token_id];
        let layout = batch.decoder(&start);
        let rows = layout.rows();
        let mut read = vec![0; by_encoding.len()];
        encodings.iter().for_each(|e| read[*e] = by_encoding.range(*e).len());
        let absorbs = read.iter().all(|rows| self.absorbs(*rows));
        let readers = Segments::new(read);
        let absorbed = absorbs.then(|| Readers::new(&readers, &encoded.segments, self.decoder.heads()));
        let absorbed = absorbed.as_ref();
        let memory = Memory { rows: &encoded.rows, segments: &encoded.segments, readers: &readers, absorbed };
        let x = self.embedding(batch, &layout)?;
        let decoded = self.decoder.forward(&self.config, x, memory, &self.pass(&rows))?.0;
        super::taken(&decoded, &layout.token_ranges())
    }
}
