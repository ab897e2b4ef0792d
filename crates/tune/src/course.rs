//! The course of a job: which examples each step takes, and how large its update may be. A function of the specification, the data
//! and the number of the step.

use std::sync::Arc;

use incipit_data::{
    TokenizedExample, TokenizedSet,
    pretrain::{Cursor, Pretraining},
};

use crate::{
    Error, Result,
    engine::JobFault,
    job::{JobSpec, Update},
    order::{DataOrder, dropout_key},
};

/// A job's data and what it was told to do with them.
pub(crate) struct Course {
    pub(crate) spec: JobSpec,
    source: Source,
}

/// Where a job's examples come from.
enum Source {
    /// They lie in memory, and each epoch visits them in an order of its own.
    Set { data: Arc<TokenizedSet>, order: DataOrder },
    /// They are made of a corpus as it goes by: those of the next step, and where in the corpus they begin.
    Corpus { stream: Box<Pretraining>, batch: Vec<TokenizedExample>, cursor: Cursor },
}

impl Course {
    /// The course after `num_steps` steps.
    ///
    /// # Errors
    /// If the data are less than one batch.
    pub(crate) fn new(spec: JobSpec, data: Arc<TokenizedSet>, num_steps: u64) -> Result<Self> {
        let mut order = DataOrder::of(&spec, data.examples.len())?;
        order.seek(num_steps);
        Ok(Self { spec, source: Source::Set { data, order } })
    }

    /// The course through a corpus, from `cursor` on, or from its beginning.
    ///
    /// # Errors
    /// If the corpus cannot be read, or is another than the cursor's.
    pub(crate) fn of_corpus(spec: JobSpec, mut stream: Pretraining, cursor: Option<&Cursor>) -> Result<Self> {
        if let Some(cursor) = cursor {
            stream.seek(cursor)?;
        }
        let cursor = stream.cursor().clone();
        let batch = stream.next_batch(spec.batch_size)?;
        Ok(Self { spec, source: Source::Corpus { stream: Box::new(stream), batch, cursor } })
    }

    /// The epoch of the step `step`, the next one, and the place of its batch in it, or in the whole corpus; both from 0.
    pub(crate) fn place(&self, step: u64) -> (u64, u64) {
        match &self.source {
            Source::Set { order, .. } => (order.epoch(step), order.place(step)),
            Source::Corpus { cursor, .. } => {
                (cursor.epoch(), cursor.examples() / self.spec.batch_size as u64)
            }
        }
    }

    /// Where in a corpus the next step's examples begin.
    pub(crate) fn cursor(&self) -> Option<&Cursor> {
        match &self.source {
            Source::Set { .. } => None,
            Source::Corpus { cursor, .. } => Some(cursor),
        }
    }

    /// The examples of the step `step`, the next one, and the keys of their random numbers.
    pub(crate) fn batch(&self, step: u64) -> (Vec<&TokenizedExample>, Vec<u64>) {
        let (examples, places): (Vec<_>, Vec<usize>) = match &self.source {
            Source::Set { data, order } => {
                order.batch(step).into_iter().map(|place| (&data.examples[place], place)).unzip()
            }
            Source::Corpus { batch, .. } => batch.iter().zip(0..).unzip(),
        };
        (examples, places.into_iter().map(|place| dropout_key(self.spec.seed, step, place)).collect())
    }

    /// The learning rate of a step.
    pub(crate) fn lr(&self, step: u64) -> f32 {
        self.spec.schedule.lr(self.spec.lr, step, self.spec.num_steps, self.spec.warmup_steps)
    }

    /// Goes on to the step after `step`, and says what that one did: `loss`, `gradient_norm`, and the number of its tokens.
    ///
    /// # Errors
    /// If a corpus cannot be read on.
    pub(crate) fn advance(
        &mut self,
        step: u64,
        loss: f64,
        gradient_norm: f64,
        num_tokens: usize,
    ) -> Result<Update> {
        let update = Update {
            step: step + 1,
            epoch: self.place(step).0,
            loss,
            lr: self.lr(step),
            gradient_norm,
            num_examples: self.spec.batch_size,
            num_tokens,
        };
        match &mut self.source {
            Source::Set { order, .. } => order.seek(step + 1),
            Source::Corpus { stream, batch, cursor } => {
                *cursor = stream.cursor().clone();
                *batch = stream.next_batch(self.spec.batch_size)?;
            }
        }
        Ok(update)
    }

    /// What ends the job at `step`, with the place of the example where there is one.
    pub(crate) fn fault(&self, step: u64, fault: &JobFault) -> Error {
        let (example, rank, what) = match fault {
            JobFault::Loss { example, rank, loss } => (*example, *rank, format!("the loss is {loss}")),
            JobFault::Gradient { example, rank } => {
                (*example, *rank, "the gradient is not finite".to_owned())
            }
            JobFault::Refused(why) => return Error::Stopped { step: step + 1, why: why.clone() },
        };
        match &self.source {
            Source::Set { data, order } => {
                let text = &data.texts[order.batch(step)[example]];
                Error::NonFinite { step: step + 1, rank, what, index: text.index, line: text.line }
            }
            Source::Corpus { .. } => {
                let what = format!("{what} (example {example} of the batch, rank {rank})");
                Error::Stopped { step: step + 1, why: what.into() }
            }
        }
    }

    /// What ends the job at `step` if its update would leave f32.
    pub(crate) fn overflow(&self, step: u64) -> Error {
        let lr = self.lr(step);
        let what = format!("the update with learning rate {lr} leaves f32; pass a smaller --lr");
        Error::Stopped { step: step + 1, why: what.into() }
    }
}

/// Euclidean norm, summed in f64 in order.
pub(crate) fn norm<'a>(values: impl IntoIterator<Item = &'a f32>) -> f64 {
    values.into_iter().map(|v| f64::from(*v).powi(2)).sum::<f64>().sqrt()
}
