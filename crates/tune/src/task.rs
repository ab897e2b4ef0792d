//! A run's data: read, tokenized and checked before the first step.

mod bytes;

use std::{
    fs::File,
    num::NonZeroU64,
    path::{Path, PathBuf},
    sync::Arc,
};

use incipit_data::{
    LoadOptions, TextExample, TokenizedSet, labels_of, load_text,
    metrics::Reference,
    pretrain::{PretrainOptions, Pretraining, add_sentinel},
    tasks::{self, Split, TaskSplit, Use},
    tokenize,
};
use tokenizers::Tokenizer;

use crate::{
    Error, Result, checkpoint, init::PromptInit, prompt::Prompt, rank::Candidates, ranks, spec::TrainSpec,
};

/// Examples of a held-out text that a run on a corpus is evaluated on, where nothing else is said.
const EVAL_EXAMPLES: usize = 256;

/// More distinct targets than this are taken for free text.
const MAX_LABELS: usize = 100;

/// All that a job takes from files but its checkpoints. Clones share the examples.
#[derive(Clone, Debug, PartialEq)]
pub struct Task {
    /// Training examples.
    pub train: Arc<TokenizedSet>,
    /// Evaluation examples.
    pub eval: Option<Arc<TokenizedSet>>,
    /// Of a named task, what predictions for the evaluation examples are scored against.
    pub references: Option<Arc<Vec<Reference>>>,
    /// The label set, if the task has one.
    pub labels: Option<Vec<String>>,
    /// Longest prediction, in tokens: of the longest label with what tells it from others, or of the longest target.
    pub max_new_tokens: usize,
    /// BLAKE3 of the file of training examples; of a named task, of the examples themselves.
    pub train_hash: String,
    /// BLAKE3 of the file of evaluation examples, or of the named task's.
    pub eval_hash: Option<String>,
    /// The prompt of `--prompt-init file:PATH`. A run that goes on (`spec.resume`) has no need of it, and the file may be gone.
    pub initial: Option<Prompt>,
    /// Fingerprint of the backbone on which that was trained, if its files tell, and it is to be this one.
    pub initial_backbone: Option<String>,
    /// What was cut, left out or odd.
    pub warnings: Vec<String>,
}

impl Task {
    /// Reads, tokenizes and checks the files that `spec` names, or those of its named task. `vocab_size` is the model's; no id is
    /// outside of it.
    ///
    /// # Errors
    /// If a file cannot be read, a record does not fit the templates, the labels or the named task, the tokenizer is not the model's,
    /// or the file of `--prompt-init` holds no prompt.
    pub fn load(spec: &TrainSpec, tokenizer: &Tokenizer, vocab_size: usize) -> Result<Self> {
        if let Some(options) = spec.pretraining() {
            return Self::of_corpus(spec, tokenizer, vocab_size, &options);
        }
        let mut loader = Loader { spec, tokenizer, vocab_size, warnings: Vec::new() };
        let train = match spec.task {
            Some(task) => loader.split(task, &spec.train, Split::Train)?,
            None => loader.file("training", &spec.train)?,
        };
        let eval = match (spec.task, &spec.eval) {
            (_, None) => None,
            (Some(task), Some(eval)) => Some(loader.split(task, eval, Split::Dev)?),
            (None, Some(eval)) => Some(loader.file("evaluation", eval)?),
        };
        let labels = labels(spec, &train.set.texts)?;
        if let (Some(labels), Some(eval)) = (&labels, &eval) {
            let unseen = eval.set.texts.iter().filter(|text| !labels.contains(&text.targets)).count();
            if unseen > 0 {
                loader.warnings.push(format!(
                    "{unseen} evaluation targets are none of the {} labels of the training data",
                    labels.len()
                ));
            }
        }
        let (initial, initial_backbone) = match &spec.prompt_init {
            PromptInit::File(path) if !spec.resume => {
                // Only where that matters: the checkpoint of its run may be of another version.
                let origin = if spec.allow_other_backbone { None } else { checkpoint::backbone_of(path)? };
                (Some(Prompt::read(path)?), origin)
            }
            _ => (None, None),
        };
        let max_new_tokens = loader.max_new_tokens(labels.as_deref())?;
        let (eval, eval_hash, references) = match eval {
            Some(Examples { set, hash, references }) => (Some(Arc::new(set)), Some(hash), references),
            None => (None, None, None),
        };
        Ok(Self {
            train: Arc::new(train.set),
            eval,
            references: references.map(Arc::new),
            labels,
            max_new_tokens,
            train_hash: train.hash,
            eval_hash,
            initial,
            initial_backbone,
            warnings: loader.warnings,
        })
    }

    /// What predictions are chosen among, if they are chosen.
    pub(crate) fn candidates(
        &self,
        spec: &TrainSpec,
        tokenizer: &Tokenizer,
        vocab_size: usize,
    ) -> Result<Option<Arc<Candidates>>> {
        spec.predict.candidates(self.labels.as_deref(), tokenizer, vocab_size, spec.target_sentinel)
    }

    /// Of a run on a corpus only what it is evaluated on: the first examples of another text, always the same. Training examples are
    /// made as the corpus goes by.
    fn of_corpus(
        spec: &TrainSpec,
        tokenizer: &Tokenizer,
        vocab_size: usize,
        options: &PretrainOptions,
    ) -> Result<Self> {
        let held_out = |path: &PathBuf| {
            let once = PretrainOptions { seed: 0, shuffle: false, epochs: Some(NonZeroU64::MIN), ..*options };
            let mut text = Pretraining::open(std::slice::from_ref(path), tokenizer, vocab_size, &once)?;
            let examples = text.next_batch(spec.eval_examples.unwrap_or(EVAL_EXAMPLES))?;
            let unnamed =
                |index| TextExample { inputs: String::new(), targets: String::new(), index, line: index + 1 };
            let texts = (0..examples.len()).map(unnamed).collect();
            Ok::<_, Error>(TokenizedSet { examples, texts, ..TokenizedSet::default() })
        };
        let eval = spec.eval.as_ref().map(held_out).transpose()?;
        Ok(Self {
            train: Arc::default(),
            eval_hash: eval.as_ref().map(|set| ranks::tokens_digest(&set.examples)),
            eval: eval.map(Arc::new),
            references: None,
            labels: None,
            max_new_tokens: 0,
            // A checkpoint's place in the corpus knows which corpus it is.
            train_hash: String::new(),
            initial: None,
            initial_backbone: None,
            warnings: Vec::new(),
        })
    }
}

/// Examples as they were read.
struct Examples {
    set: TokenizedSet,
    hash: String,
    /// Of a named task.
    references: Option<Vec<Reference>>,
}

/// The label set that the specification, or else the training examples say.
pub(crate) fn labels(spec: &TrainSpec, train: &[TextExample]) -> Result<Option<Vec<String>>> {
    Ok(match (spec.task, spec.task_format()?.labels) {
        (Some(task), _) => task.label_texts(),
        (None, Some(map)) => Some(map.texts().map(str::to_owned).collect()),
        (None, None) => classes(train),
    })
}

/// The distinct targets, if so few stand for so many examples that they are classes.
#[must_use]
pub fn classes(examples: &[TextExample]) -> Option<Vec<String>> {
    labels_of(examples, MAX_LABELS.min(examples.len() / 2))
}

struct Loader<'a> {
    spec: &'a TrainSpec,
    tokenizer: &'a Tokenizer,
    vocab_size: usize,
    warnings: Vec<String>,
}

impl Loader<'_> {
    fn options(&self) -> LoadOptions {
        LoadOptions { skip_bad_records: self.spec.skip_bad_records }
    }

    fn file(&mut self, kind: &str, path: &Path) -> Result<Examples> {
        let loaded = load_text(path, &self.spec.task_format()?, self.options())?;
        self.tell_skipped(kind, loaded.skipped, loaded.first_skipped.first());
        let set = self.tokenized(kind, &loaded.examples)?;
        Ok(Examples { set, hash: hash(path)?, references: None })
    }

    /// `place` is the directory of the task's files, or the split's file.
    fn split(&mut self, task: &'static tasks::Task, place: &Path, split: Split) -> Result<Examples> {
        let purpose = Use::of(split);
        let kind = match purpose {
            Use::Training => "training",
            Use::Evaluation => "evaluation",
        };
        let file = match self.spec.data_dir {
            Some(_) => task.file(place, split)?,
            None => place.to_owned(),
        };
        let found = task.open(&file, split, purpose)?.read(self.options())?;
        self.tell_skipped(kind, found.skipped, found.first_skipped.first());
        self.warnings.extend(found.left_out());
        let set = self.tokenized(kind, &found.texts())?;
        Ok(Examples { set, hash: split_hash(&found), references: found.references() })
    }

    fn tell_skipped(&mut self, kind: &str, skipped: usize, first: Option<&incipit_data::Error>) {
        if let Some(first) = first {
            self.warnings.push(format!("{skipped} {kind} records were left out; the first: {first}"));
        }
    }

    fn tokenized(&mut self, kind: &str, texts: &[TextExample]) -> Result<TokenizedSet> {
        let spec = self.spec;
        let (max_input, max_target) = (spec.max_input_length, spec.max_target_length);
        let room = max_target - usize::from(spec.target_sentinel);
        let mut set = tokenize(texts, self.tokenizer, max_input, room, self.vocab_size)?;
        if spec.target_sentinel {
            add_sentinel(&mut set.examples, self.tokenizer)?;
        }
        let truncated = [
            ("inputs", set.truncated_inputs, "max-input-length", max_input, set.longest_input),
            ("targets", set.truncated_targets, "max-target-length", max_target, set.longest_target),
        ];
        for (side, count, flag, limit, longest) in truncated.into_iter().filter(|(_, count, ..)| *count > 0) {
            let all = set.examples.len();
            self.warnings.push(format!(
                "{count} of {all} {kind} {side} were cut to {limit} tokens; --{flag} {longest} would keep them whole"
            ));
        }
        Ok(set)
    }

    /// A prediction longer than every label is none, so that nothing is lost by ending it there.
    fn max_new_tokens(&self, labels: Option<&[String]>) -> Result<usize> {
        let mut longest = 0;
        for label in labels.unwrap_or_default() {
            let encoded = self.tokenizer.encode(label.as_str(), false);
            let encoded = encoded.map_err(|cause| Error::Tokenizer { cause: cause.to_string() })?;
            // One for `</s>`, and one that tells a label from a text that begins with it.
            longest = longest.max(encoded.len() + 2 + usize::from(self.spec.target_sentinel));
        }
        let limit = self.spec.max_target_length;
        Ok(if labels.is_some() { longest.min(limit) } else { limit })
    }
}

/// BLAKE3 of a named task's examples, whatever files they were read from: of what they are learnt from and scored against, one after
/// the other as JSON.
fn split_hash(split: &TaskSplit) -> String {
    let mut hasher = blake3::Hasher::new();
    for example in &split.examples {
        let reference = example.reference.as_ref().map(|r| (&r.answers, r.group, r.holds));
        let line = serde_json::json!([example.text.inputs, example.text.targets, reference]);
        hasher.update(line.to_string().as_bytes());
        hasher.update(b"\n");
    }
    hasher.finalize().to_hex().to_string()
}

/// BLAKE3 of a file's bytes.
fn hash(path: &Path) -> Result<String> {
    let mut hasher = blake3::Hasher::new();
    let file = File::open(path).map_err(Error::io("read", path))?;
    hasher.update_reader(file).map_err(Error::io("read", path))?;
    Ok(hasher.finalize().to_hex().to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn examples(targets: &[&str]) -> Vec<TextExample> {
        let example = |(index, targets): (usize, &&str)| TextExample {
            inputs: String::new(),
            targets: (*targets).to_owned(),
            index,
            line: index + 1,
        };
        targets.iter().enumerate().map(example).collect()
    }

    #[test]
    fn few_targets_of_many_examples_are_classes_and_all_others_are_free_text() {
        let classified = examples(&["no", "yes", "yes", "no"]);
        assert_eq!(classes(&classified).unwrap(), ["no", "yes"]);
        assert_eq!(classes(&examples(&["Rome", "Paris", "Oslo", "Rome"])), None);
        let many: Vec<String> = (0..300).map(|n| (n / 2).to_string()).collect();
        assert_eq!(classes(&examples(&many.iter().map(String::as_str).collect::<Vec<_>>())), None);
    }

    #[test]
    fn a_files_hash_is_that_of_its_bytes() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), "abc").unwrap();
        assert_eq!(hash(file.path()).unwrap(), blake3::hash(b"abc").to_hex().to_string());
        assert!(hash(Path::new("/no/such/file")).unwrap_err().to_string().contains("/no/such/file"));
    }
}
