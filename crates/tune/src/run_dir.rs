//! The directory of a run: who may write to it, what it holds, and what it shows to others.

use std::path::{Path, PathBuf};

use crate::{
    Error, Result, atomic,
    backbone::Backbone,
    checkpoint::TrainState,
    checkpoint::{self, Checkpoint, Store},
    npy, peft,
    prompt::Prompt,
    spec::{INITIAL_DIR, Method, RUN_FILE, TrainSpec},
    tokens::{TOKENS, TokenPrompt},
    trained::{Trained, WEIGHTS},
};

/// The prompt, as google-research/prompt-tuning reads it.
pub(crate) const PROMPT_FILE: &str = "prompt.npy";
/// The prompt, as PEFT reads it, where it is one that PEFT knows.
pub(crate) const ADAPTER_DIR: &str = "adapter";

/// A model that was trained as a whole, as Hugging Face's libraries read it.
pub(crate) const MODEL_DIR: &str = "model";
/// Bytes of a file of such a model, at most.
const MAX_SHARD_BYTES: u64 = 5 << 30;

/// Where a run shows what was trained by `method`.
pub(crate) fn published(method: Method) -> &'static str {
    match method {
        Method::Prompt | Method::Text | Method::Search => PROMPT_FILE,
        Method::Adapter | Method::Prefix => WEIGHTS,
        Method::Model => MODEL_DIR,
    }
}

/// The directory of a run, while this process writes to it.
pub(crate) struct RunDir {
    out: PathBuf,
    pub(crate) store: Store,
    /// Where to go on from, if that is not the newest checkpoint: a step, or the beginning.
    from: Option<Option<u64>>,
}

impl RunDir {
    /// Takes the directory for a run: an empty one, or with `--resume` one in which the same run has begun.
    pub(crate) fn open(spec: &TrainSpec) -> Result<Self> {
        let out = &spec.out;
        let run = out.join(RUN_FILE);
        let begun = run.exists();
        if !spec.resume && (begun || holds_something_else(out)?) {
            return Err(Error::OutNotEmpty { path: out.clone() });
        }
        if begun {
            spec.continues(&TrainSpec::read(&run)?)?;
        } else if holds_something_else(out)? {
            return Err(Error::NoRun { path: out.clone() });
        }
        let store = Store::open(out)?;
        if let Some(made) = store.last().filter(|made| *made > spec.steps) {
            let what = format!(
                "is {}, and the run in {} has made {made} steps: give {made} at least, or another --out",
                spec.steps,
                out.display()
            );
            return Err(Error::spec("steps", &what));
        }
        Ok(Self { out: out.clone(), store, from: None })
    }

    /// Goes on from the checkpoint of a step, which is there, or from the beginning, whatever checkpoints there are besides.
    pub(crate) fn go_on_from(&mut self, step: Option<u64>) {
        self.from = Some(step);
    }

    /// Writes the specification down.
    pub(crate) fn begin(&self, spec: &TrainSpec) -> Result<()> {
        atomic::write_file(&self.out.join(RUN_FILE), spec.to_toml().as_bytes())
    }

    /// The newest checkpoint that can be used. Those that cannot be used are told as warnings; if there are no others, the
    /// newest one's error is returned.
    pub(crate) fn newest(&self, warnings: &mut Vec<String>) -> Result<Option<Checkpoint>> {
        if let Some(step) = self.from {
            return step.map(|step| checkpoint::load(&self.store.path(step))).transpose();
        }
        let found = self.store.newest_valid()?;
        let Some((_, checkpoint)) = found.checkpoint else {
            return found.damaged.into_iter().next().map_or(Ok(None), Err);
        };
        warnings.extend(found.damaged.iter().map(|error| format!("{error}; going on from an earlier one")));
        Ok(Some(checkpoint))
    }

    /// Finishes what a run that died just after writing the checkpoint of `state` had still to do: `best` and `last` point
    /// where the state says, and of the older checkpoints `keep` are left.
    pub(crate) fn settle(&self, state: &TrainState, keep: usize) -> Result<()> {
        if let Some(best) = state.best.filter(|best| self.store.path(best.step).is_dir()) {
            self.store.mark_best(best.step)?;
        }
        self.store.mark_last(state.step)?;
        self.store.prune(keep)?;
        Ok(())
    }

    /// Shows the best prompt, or the last one where nothing was evaluated, to other programs. Weights are shown at the end: they may be
    /// a whole model.
    pub(crate) fn publish(&self, backbone: &Backbone) -> Result<()> {
        match self.to_show()? {
            Some(Checkpoint { trained: Trained::Prompt(prompt), state, .. }) => {
                self.show_prompt(&prompt, state.tokens, backbone)
            }
            _ => Ok(()),
        }
    }

    /// Shows what was trained to other programs, and for good.
    pub(crate) fn finish(&self, backbone: &Backbone, method: Method) -> Result<()> {
        let Some(Checkpoint { trained, state, .. }) = self.to_show()? else { return Ok(()) };
        match trained.kept()? {
            Trained::Prompt(prompt) => self.show_prompt(&prompt, state.tokens, backbone),
            Trained::Weights(weights) if method == Method::Model => {
                // What a run that went on further has to show takes the place of what it showed before.
                atomic::write_dir(&self.out.join(MODEL_DIR), |place| {
                    backbone.write_with(&weights, place, MAX_SHARD_BYTES).map(drop)
                })
            }
            trained @ Trained::Weights(_) => {
                self.show_prefix(&trained, backbone)?;
                let file = self.out.join(WEIGHTS);
                let refuse = |what| Error::PromptFile { path: file.clone(), what };
                atomic::write_file(&file, &trained.encode().map_err(refuse)?)
            }
        }
    }

    /// Shows a prefix as PEFT reads it, if it is of a kind that PEFT has.
    fn show_prefix(&self, trained: &Trained, backbone: &Backbone) -> Result<()> {
        match trained {
            Trained::Weights(weights) if peft::prefix::is_whole(weights) => {
                peft::prefix::write(&self.out.join(ADAPTER_DIR), weights, &backbone.base_model())
            }
            _ => Ok(()),
        }
    }

    /// The best, or the last where nothing was evaluated.
    fn to_show(&self) -> Result<Option<Checkpoint>> {
        let step = self.store.best().or(self.store.last());
        step.map(|step| checkpoint::load(&self.store.path(step))).transpose()
    }

    fn show_prompt(&self, prompt: &Prompt, tokens: Option<Vec<u32>>, backbone: &Backbone) -> Result<()> {
        if let Some(tokens) = tokens {
            let tokens = TokenPrompt::new(tokens, backbone.config().vocab_size)?;
            tokens.write(&self.out.join(TOKENS), &backbone.tokenizer)?;
        }
        npy::write(&self.out.join(PROMPT_FILE), prompt)?;
        if !prompt.is_plain() {
            return Ok(());
        }
        peft::write(&self.out.join(ADAPTER_DIR), prompt, &backbone.base_model())
    }
}

/// A run that was refused before it began leaves no empty directories.
impl Drop for RunDir {
    fn drop(&mut self) {
        // Both only succeed on what is empty, and nothing is lost where they do not.
        let _ = std::fs::remove_dir(self.out.join("checkpoints"));
        let _ = std::fs::remove_dir(&self.out);
    }
}

fn entries(dir: &Path) -> Result<Vec<String>> {
    match std::fs::read_dir(dir) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(Vec::new()),
        entries => entries
            .and_then(|entries| entries.map(|e| Ok(e?.file_name().to_string_lossy().into_owned())).collect())
            .map_err(Error::io("read", dir)),
    }
}

fn is_empty(dir: &Path) -> Result<bool> {
    Ok(entries(dir)?.is_empty())
}

/// Whether a directory without a specification holds more than a run that died in its first moment leaves.
pub(crate) fn holds_something_else(dir: &Path) -> Result<bool> {
    let ours = |name: &String| ["checkpoints", INITIAL_DIR].contains(&&**name) || name.starts_with(".tmp-");
    Ok(!entries(dir)?.iter().all(ours) || !is_empty(&dir.join("checkpoints"))?)
}
