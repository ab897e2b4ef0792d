//! A run's data: read, tokenized and checked before the first step.

mod bytes;

use std::{fs::File, path::Path, sync::Arc};

use incipit_data::{LoadOptions, TextExample, TokenizedSet, labels_of, load_text, tokenize};
use tokenizers::Tokenizer;

use crate::{Error, Result, init::PromptInit, prompt::Prompt, spec::TrainSpec};

/// More distinct targets than this are taken for free text.
const MAX_LABELS: usize = 100;

/// All that a job takes from files but its checkpoints. Clones share the examples.
#[derive(Clone, Debug, PartialEq)]
pub struct Task {
    /// Training examples.
    pub train: Arc<TokenizedSet>,
    /// Evaluation examples.
    pub eval: Option<Arc<TokenizedSet>>,
    /// The label set, if the task has one.
    pub labels: Option<Vec<String>>,
    /// Longest prediction, in tokens: of the longest label with what tells it from others, or of the longest target.
    pub max_new_tokens: usize,
    /// BLAKE3 of the file of training examples.
    pub train_hash: String,
    /// BLAKE3 of the file of evaluation examples.
    pub eval_hash: Option<String>,
    /// The prompt of `--prompt-init file:PATH`. A run that goes on (`spec.resume`) has no need of it, and the file may be gone.
    pub initial: Option<Prompt>,
    /// What was cut, left out or odd.
    pub warnings: Vec<String>,
}

impl Task {
    /// Reads, tokenizes and checks the files that `spec` names. `vocab_size` is the model's; no id is outside of it.
    ///
    /// # Errors
    /// If a file cannot be read, a record does not fit the templates or the labels, the tokenizer is not the model's, or the file of
    /// `--prompt-init` holds no prompt.
    pub fn load(spec: &TrainSpec, tokenizer: &Tokenizer, vocab_size: usize) -> Result<Self> {
        let loader = Loader { spec, tokenizer, vocab_size };
        let mut warnings = Vec::new();
        let train = loader.load("training", &spec.train, &mut warnings)?;
        let eval =
            spec.eval.as_ref().map(|eval| loader.load("evaluation", eval, &mut warnings)).transpose()?;
        let labels = match spec.task_format()?.labels {
            Some(map) => Some(map.texts().map(str::to_owned).collect()),
            None => classes(&train.texts),
        };
        if let (Some(labels), Some(eval)) = (&labels, &eval) {
            let unseen = eval.texts.iter().filter(|text| !labels.contains(&text.targets)).count();
            if unseen > 0 {
                warnings.push(format!(
                    "{unseen} evaluation targets are none of the {} labels of the training data",
                    labels.len()
                ));
            }
        }
        let initial = match &spec.prompt_init {
            PromptInit::File(path) if !spec.resume => Some(Prompt::read(path)?),
            _ => None,
        };
        Ok(Self {
            max_new_tokens: loader.max_new_tokens(labels.as_deref())?,
            train_hash: hash(&spec.train)?,
            eval_hash: spec.eval.as_deref().map(hash).transpose()?,
            train: Arc::new(train),
            eval: eval.map(Arc::new),
            labels,
            initial,
            warnings,
        })
    }
}

/// The distinct targets, if so few stand for so many examples that they are classes.
fn classes(examples: &[TextExample]) -> Option<Vec<String>> {
    labels_of(examples, MAX_LABELS.min(examples.len() / 2))
}

struct Loader<'a> {
    spec: &'a TrainSpec,
    tokenizer: &'a Tokenizer,
    vocab_size: usize,
}

impl Loader<'_> {
    fn load(&self, kind: &str, path: &Path, warnings: &mut Vec<String>) -> Result<TokenizedSet> {
        let spec = self.spec;
        let options = LoadOptions { skip_bad_records: spec.skip_bad_records };
        let loaded = load_text(path, &spec.task_format()?, options)?;
        if let Some(first) = loaded.first_skipped.first() {
            warnings.push(format!("{} {kind} records were left out; the first: {first}", loaded.skipped));
        }
        let (max_input, max_target) = (spec.max_input_length, spec.max_target_length);
        let set = tokenize(&loaded.examples, self.tokenizer, max_input, max_target, self.vocab_size)?;
        let truncated = [
            ("inputs", set.truncated_inputs, "max-input-length", max_input, set.longest_input),
            ("targets", set.truncated_targets, "max-target-length", max_target, set.longest_target),
        ];
        for (side, count, flag, limit, longest) in truncated.into_iter().filter(|(_, count, ..)| *count > 0) {
            let all = set.examples.len();
            warnings.push(format!(
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
            longest = longest.max(encoded.len() + 2);
        }
        let limit = self.spec.max_target_length;
        Ok(if labels.is_some() { longest.min(limit) } else { limit })
    }
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
