//! The run's record: `metrics.jsonl`, one line an event, and the same for TensorBoard.
//!
//! Lines that say the same are the same bytes, whether the run was disturbed or not, but for the fields that a clock gave
//! ([`CLOCK_FIELDS`]).

use std::{
    fs::{File, OpenOptions},
    io::Write,
    path::{Path, PathBuf},
    time::SystemTime,
};

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::{Error, Result, atomic, evaluate::Evaluation, events::EventWriter, job::Update};

/// The file's name in a run's directory.
pub const METRICS_FILE: &str = "metrics.jsonl";

/// Fields that differ from run to run.
pub const CLOCK_FIELDS: [&str; 3] = ["seconds", "examples_per_s", "tokens_per_s"];

/// A line of `metrics.jsonl`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum Line {
    /// A step was made.
    Step {
        /// Steps made, this one included.
        step: u64,
        /// Epoch of its data, from 0.
        epoch: u64,
        /// Mean cross-entropy over the batch's target tokens before the update, in nats.
        loss: f64,
        /// Learning rate of the update.
        lr: f32,
        /// Euclidean norm of the objective's gradient.
        gradient_norm: f64,
        /// Examples of the batch.
        examples: usize,
        /// Its inputs, prompt rows and targets, in tokens.
        tokens: usize,
        /// How long the step took.
        seconds: f64,
        /// Examples a second.
        examples_per_s: f64,
        /// Tokens a second.
        tokens_per_s: f64,
    },
    /// The prompt was evaluated.
    Eval {
        /// Steps made.
        step: u64,
        /// Mean cross-entropy over all target tokens, in nats.
        loss: f64,
        /// What chooses the best checkpoint: the mean of the metrics, or of a named task the one that counts.
        score: f64,
        /// Share of predictions that are labels, where the labels are known.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        legal_share: Option<f64>,
        /// Examples.
        examples: usize,
        /// The metrics by name, each from 0 to 1.
        metrics: Map<String, Value>,
        /// How long the evaluation took.
        seconds: f64,
    },
}

impl Line {
    /// Steps made when it was written.
    #[must_use]
    pub fn step(&self) -> u64 {
        match self {
            Self::Step { step, .. } | Self::Eval { step, .. } => *step,
        }
    }

    /// A line for an update that took `seconds`.
    #[must_use]
    pub fn update(update: &Update, seconds: f64) -> Self {
        let rate = |count: usize| millionths(count as f64 / seconds.max(1e-6));
        Self::Step {
            step: update.step,
            epoch: update.epoch,
            loss: update.loss,
            lr: update.lr,
            gradient_norm: update.gradient_norm,
            examples: update.num_examples,
            tokens: update.num_tokens,
            seconds: millionths(seconds),
            examples_per_s: rate(update.num_examples),
            tokens_per_s: rate(update.num_tokens),
        }
    }

    /// A line for an evaluation after `step` steps that took `seconds`.
    #[must_use]
    pub fn evaluation(step: u64, evaluation: &Evaluation, seconds: f64) -> Self {
        let metrics = evaluation.metrics.iter();
        Self::Eval {
            step,
            loss: evaluation.loss,
            score: evaluation.score(),
            legal_share: evaluation.legal_share,
            examples: evaluation.predictions.len(),
            metrics: metrics.map(|(metric, value)| (metric.to_string(), Value::from(*value))).collect(),
            seconds: millionths(seconds),
        }
    }

    /// Names and values for TensorBoard.
    fn scalars(&self) -> Vec<(String, f32)> {
        let named = |name: &str, value: f64| (name.to_owned(), value as f32);
        match self {
            Self::Step { loss, lr, gradient_norm, tokens_per_s, .. } => vec![
                named("train/loss", *loss),
                named("train/lr", f64::from(*lr)),
                named("train/gradient_norm", *gradient_norm),
                named("train/tokens_per_s", *tokens_per_s),
            ],
            Self::Eval { loss, legal_share, metrics, .. } => {
                let mut scalars = vec![named("eval/loss", *loss)];
                scalars.extend(legal_share.map(|share| named("eval/legal_share", share)));
                let measured =
                    |(name, value): (&String, &Value)| Some(named(&format!("eval/{name}"), value.as_f64()?));
                scalars.extend(metrics.iter().filter_map(measured));
                scalars
            }
        }
    }
}

/// Rounded: a clock tells no more.
fn millionths(value: f64) -> f64 {
    (value * 1e6).round() / 1e6
}

/// Reads the lines of a run. A last line that was not written to its end is left out.
///
/// # Errors
/// If the file cannot be read, or another line is none of ours.
pub fn read(path: &Path) -> Result<Vec<Line>> {
    let text = std::fs::read_to_string(path).map_err(Error::io("read", path))?;
    let whole = text.rfind('\n').map_or("", |end| &text[..end]);
    let line = |(i, line): (usize, &str)| {
        serde_json::from_str(line).map_err(|source| Error::MetricsLine {
            path: path.to_owned(),
            line: i + 1,
            source,
        })
    };
    whole.lines().enumerate().map(line).collect()
}

/// The open record of a run.
pub struct MetricsLog {
    path: PathBuf,
    file: File,
    events: EventWriter,
}

impl MetricsLog {
    /// Opens the record in the directory of a run that has made `step` steps, the last evaluation after `evaluated` of them.
    /// What an earlier process wrote beyond that is taken away: it will be written again.
    ///
    /// # Errors
    /// If the file cannot be read or written.
    pub fn open(out: &Path, step: u64, evaluated: u64) -> Result<Self> {
        let path = out.join(METRICS_FILE);
        let kept = if path.exists() { lines_up_to(&path, step, evaluated)? } else { String::new() };
        atomic::write_file(&path, kept.as_bytes())?;
        let file = OpenOptions::new().append(true).open(&path).map_err(Error::io("write", &path))?;
        Ok(Self { path, file, events: EventWriter::create(out, step + 1, SystemTime::now())? })
    }

    /// Writes one line.
    ///
    /// # Errors
    /// If the system refuses.
    pub fn write(&mut self, line: &Line) -> Result<()> {
        let mut text = serde_json::to_vec(line).expect("numbers and names are JSON");
        text.push(b'\n');
        self.file.write_all(&text).map_err(Error::io("write", &self.path))?;
        let scalars = line.scalars();
        let scalars: Vec<(&str, f32)> = scalars.iter().map(|(name, value)| (&**name, *value)).collect();
        self.events.scalars(line.step(), SystemTime::now(), &scalars)
    }

    /// Makes sure that the lines so far outlive a loss of power, as the checkpoint after them will.
    ///
    /// # Errors
    /// If the system refuses.
    pub fn sync(&self) -> Result<()> {
        self.file.sync_data().map_err(Error::io("write", &self.path))
    }
}

/// The lines of the first `step` steps and of the evaluations up to `evaluated`, as they stand in the file.
fn lines_up_to(path: &Path, step: u64, evaluated: u64) -> Result<String> {
    let bytes = std::fs::read(path).map_err(Error::io("read", path))?;
    let text = String::from_utf8_lossy(&bytes);
    let early = |line: &&str| match serde_json::from_str(line) {
        Ok(line @ Line::Step { .. }) => line.step() <= step,
        Ok(line @ Line::Eval { .. }) => line.step() <= evaluated,
        Err(_) => false,
    };
    Ok(text.split_inclusive('\n').filter(|line| line.ends_with('\n')).filter(early).collect())
}

#[cfg(test)]
mod tests {
    use incipit_data::tasks::Selection;

    use super::*;

    fn step(step: u64) -> Line {
        let update = Update {
            step,
            epoch: 0,
            loss: 0.1,
            lr: 0.3,
            gradient_norm: 2.0,
            num_examples: 4,
            num_tokens: 90,
        };
        Line::update(&update, 0.5)
    }

    fn eval(step: u64) -> Line {
        let evaluation = Evaluation {
            metrics: vec![],
            selection: Selection::Mean,
            legal_share: Some(0.25),
            loss: 1.5,
            predictions: Vec::new(),
        };
        Line::evaluation(step, &evaluation, 0.25)
    }

    #[test]
    fn what_lies_beyond_the_resumed_step_or_was_not_written_to_its_end_is_taken_away() {
        let dir = tempfile::tempdir().unwrap();
        let mut log = MetricsLog::open(dir.path(), 0, 0).unwrap();
        let lines = [step(1), step(2), eval(2), step(3), step(4), eval(4), step(5)];
        lines.iter().for_each(|line| log.write(line).unwrap());
        let path = dir.path().join(METRICS_FILE);
        log.file.write_all(br#"{"event": "st"#).unwrap();
        assert_eq!(read(&path).unwrap().len(), 7);
        // After step 4, whose evaluation was broken off.
        let mut log = MetricsLog::open(dir.path(), 4, 2).unwrap();
        log.write(&eval(4)).unwrap();
        log.sync().unwrap();
        assert_eq!(read(&path).unwrap(), [step(1), step(2), eval(2), step(3), step(4), eval(4)]);
    }

    #[test]
    fn a_strange_line_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(METRICS_FILE);
        std::fs::write(&path, "{\"event\": \"party\"}\n").unwrap();
        let message = read(&path).unwrap_err().to_string();
        assert!(message.contains("metrics.jsonl, line 1") && message.contains("party"), "{message}");
    }

    #[test]
    fn rates_are_per_second_and_the_learning_rate_keeps_its_digits() {
        let text = serde_json::to_string(&step(1)).unwrap();
        assert!(text.contains(r#""lr":0.3,"#), "{text}");
        assert!(text.contains(r#""examples_per_s":8.0,"tokens_per_s":180.0"#), "{text}");
    }
}
