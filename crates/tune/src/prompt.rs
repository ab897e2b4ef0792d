//! A soft prompt, and reading one from whatever holds one.

use crate::{
    Error, Result, checkpoint, npy, peft,
    spec::{PartialSpec, RUN_FILE},
    trained::Trained,
};
use incipit_model::{Config, Placement};
use std::{
    fs::File,
    io::Read,
    path::{Path, PathBuf},
};

/// The rows `[P, D]` that are put into what a model reads, or `[L, P, D]` with rows for each of the encoder's `L` layers: f32,
/// row-major, finite.
#[derive(Clone, Debug, PartialEq)]
pub struct Prompt {
    num_layers: usize,
    length: usize,
    width: usize,
    values: Vec<f32>,
    placement: Placement,
}

impl Prompt {
    /// A prompt of `length` rows of `width` (the model's `d_model`).
    ///
    /// # Errors
    /// If it is empty, `values` are not `length * width`, or one of them is not finite.
    pub fn new(length: usize, width: usize, values: Vec<f32>) -> Result<Self> {
        Self::of_layers(1, length, width, values)
    }

    /// A prompt with `length` rows for each of `num_layers` layers, those of the first layer first.
    ///
    /// # Errors
    /// As [`Self::new`].
    pub fn of_layers(num_layers: usize, length: usize, width: usize, values: Vec<f32>) -> Result<Self> {
        let refuse = |what| Err(Error::Prompt { what });
        if num_layers == 0 || length == 0 || width == 0 {
            return refuse(format!("a prompt of {length} x {width} has no rows or no columns"));
        }
        let rows = length.checked_mul(num_layers);
        if rows.and_then(|rows| rows.checked_mul(width)) != Some(values.len()) {
            return refuse(format!("a prompt of {length} x {width} cannot hold {} numbers", values.len()));
        }
        if let Some(i) = values.iter().position(|v| !v.is_finite()) {
            let (row, col) = (i / width, i % width);
            return refuse(format!("the prompt's row {row}, column {col} is {}; it is damaged", values[i]));
        }
        Ok(Self { num_layers, length, width, values, placement: Placement::Before })
    }

    /// A prompt of the shape `[P, D]` or `[L, P, D]`.
    pub(crate) fn of_shape(shape: &[usize], values: Vec<f32>) -> Result<Self, String> {
        let prompt = match *shape {
            [length, width] => Self::new(length, width, values),
            [layers, length, width] => Self::of_layers(layers, length, width, values),
            _ => return Err(format!("the prompt has the shape {shape:?} and should have two dimensions")),
        };
        prompt.map_err(|e| e.to_string())
    }

    /// The same rows in another place.
    #[must_use]
    pub fn placed(self, placement: Placement) -> Self {
        Self { placement, ..self }
    }

    /// The same place and shape, with other numbers.
    ///
    /// # Errors
    /// As [`Self::new`].
    pub fn with_values(&self, values: Vec<f32>) -> Result<Self> {
        let prompt = Self::of_layers(self.num_layers, self.length, self.width, values)?;
        Ok(prompt.placed(self.placement))
    }

    /// The rows of a prompt of one layer for each of `num_layers` layers.
    ///
    /// # Errors
    /// If it has rows for another number of layers.
    pub fn for_layers(self, num_layers: usize) -> Result<Self> {
        if self.num_layers == num_layers {
            return Ok(self);
        }
        if self.num_layers != 1 {
            let what = format!(
                "a prompt with rows for {} layers is none for {num_layers}; look at --prompt-layers",
                self.num_layers
            );
            return Err(Error::Prompt { what });
        }
        let values = self.values.repeat(num_layers);
        Ok(Self::of_layers(num_layers, self.length, self.width, values)?.placed(self.placement))
    }

    /// Layers for which it has rows: 1, or L.
    #[must_use]
    pub fn num_layers(&self) -> usize {
        self.num_layers
    }

    /// Where the rows stand.
    #[must_use]
    pub fn placement(&self) -> Placement {
        self.placement
    }

    /// Whether it is what other programs take for a prompt: `[P, D]` before the input.
    #[must_use]
    pub fn is_plain(&self) -> bool {
        self.num_layers == 1 && self.placement == Placement::Before
    }

    /// `[P, D]`, or `[L, P, D]`.
    #[must_use]
    pub fn shape(&self) -> Vec<usize> {
        match self.num_layers {
            1 => vec![self.length, self.width],
            layers => vec![layers, self.length, self.width],
        }
    }

    /// Rows of all layers together.
    #[must_use]
    pub fn num_rows(&self) -> usize {
        self.num_layers * self.length
    }

    /// P: the places that it takes.
    #[must_use]
    pub fn length(&self) -> usize {
        self.length
    }

    /// D: how many columns it has.
    #[must_use]
    pub fn width(&self) -> usize {
        self.width
    }

    /// All rows, end to end.
    #[must_use]
    pub fn values(&self) -> &[f32] {
        &self.values
    }

    /// All rows, end to end.
    #[must_use]
    pub fn into_values(self) -> Vec<f32> {
        self.values
    }

    /// Reads the prompt that `path` holds: an `.npy` file, a PEFT directory, a checkpoint, a
    /// `prompt.safetensors`, or a training directory (whose best prompt is taken, or the last one as long as
    /// there is no best). Where its rows stand is told by the file, or of an `.npy` file by the `run.toml` beside it.
    ///
    /// # Errors
    /// If it holds none, or a damaged one.
    pub fn read(path: &Path) -> Result<Self> {
        let data = std::fs::metadata(path).map_err(Error::io("read", path))?;
        if data.is_dir() { Self::read_dir(path) } else { Self::read_file(path) }
    }

    fn read_dir(dir: &Path) -> Result<Self> {
        if dir.join(peft::CONFIG).exists() {
            return peft::read(dir);
        }
        if dir.join(checkpoint::MANIFEST).exists() || dir.join(checkpoint::PROMPT).exists() {
            return of_checkpoint(dir);
        }
        if dir.join("prompt.npy").exists() {
            return of_npy(&dir.join("prompt.npy"));
        }
        match ["best", "last"].map(|name| dir.join(name)).into_iter().find(|link| link.exists()) {
            Some(link) => of_checkpoint(&link),
            None => Err(no_prompt(dir)),
        }
    }

    fn read_file(path: &Path) -> Result<Self> {
        let mut start = Vec::new();
        let file = File::open(path).map_err(Error::io("read", path))?;
        file.take(npy::MAGIC.len() as u64).read_to_end(&mut start).map_err(Error::io("read", path))?;
        let name = path.file_name().unwrap_or_default();
        if start == npy::MAGIC || path.extension().is_some_and(|e| e == "npy") {
            of_npy(path)
        } else if name == peft::WEIGHTS || name == peft::OLD_WEIGHTS || name == peft::CONFIG {
            peft::read(&path.with_file_name(""))
        } else if path.extension().is_some_and(|e| e == "safetensors") {
            let bytes = std::fs::read(path).map_err(Error::io("read", path))?;
            checkpoint::decode_prompt(&bytes)
                .map_err(|what| Error::PromptFile { path: path.to_owned(), what })
        } else {
            Err(no_prompt(path))
        }
    }

    /// Checks that it fits a model; `from` is where it came from.
    ///
    /// # Errors
    /// If its rows have not `d_model` columns, or are for other layers than the encoder has.
    pub fn check_fits(&self, config: &Config, from: impl Into<PathBuf>) -> Result<()> {
        let from = from.into();
        self.check_width(config.d_model, &from)?;
        if self.num_layers == 1 || self.num_layers == config.num_layers {
            return Ok(());
        }
        let (here, all) = (self.num_layers, config.num_layers);
        let what = format!(
            "it has rows for {here} layers, and the model's encoder has {all}; give the model that it is for"
        );
        Err(Error::PromptFile { path: from, what })
    }

    /// Checks that its rows are the model's; `from` is where it came from.
    ///
    /// # Errors
    /// If they have not `d_model` columns.
    pub fn check_width(&self, d_model: usize, from: impl Into<PathBuf>) -> Result<()> {
        if self.width == d_model {
            return Ok(());
        }
        Err(Error::PromptWidth { path: from.into(), expected: d_model, found: self.width })
    }
}

/// An `.npy` file has no room for the place of its rows.
fn of_npy(path: &Path) -> Result<Prompt> {
    let prompt = npy::read(path)?;
    let run = path.with_file_name(RUN_FILE);
    if !run.is_file() {
        return Ok(prompt);
    }
    let placement = PartialSpec::read(&run)?.prompt_placement;
    Ok(prompt.placed(placement.map(Into::into).unwrap_or_default()))
}

fn of_checkpoint(dir: &Path) -> Result<Prompt> {
    let what =
        "it holds trained weights and no prompt; pass it to a command that takes either (eval, generate)";
    match checkpoint::load(dir)?.trained {
        Trained::Prompt(prompt) => Ok(prompt),
        Trained::Weights(_) => Err(Error::PromptFile { path: dir.to_owned(), what: what.to_owned() }),
    }
}

fn no_prompt(path: &Path) -> Error {
    let what = "it holds no prompt; give an .npy file, a PEFT directory (adapter_config.json), a checkpoint \
                (step-…) or a training directory"
        .to_owned();
    Error::PromptFile { path: path.to_owned(), what }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn prompt() -> Prompt {
        Prompt::new(2, 2, vec![1.0, 2.0, 3.0, 4.0]).unwrap()
    }

    #[test]
    fn a_prompt_must_have_the_numbers_it_says_and_they_must_be_finite() {
        let error = |l, w, v: &[f32]| Prompt::new(l, w, v.to_vec()).unwrap_err().to_string();
        assert!(error(0, 4, &[]).contains("no rows"));
        assert!(error(2, 2, &[1.0; 3]).contains("cannot hold 3 numbers"));
        assert!(error(2, 2, &[1.0, 1.0, f32::NAN, 1.0]).contains("row 1, column 0 is NaN"));
    }

    #[test]
    fn a_prompt_of_another_model_is_refused_with_the_file_and_both_widths() {
        prompt().check_width(2, "a.npy").unwrap();
        let error = prompt().check_width(512, "a.npy").unwrap_err().to_string();
        assert!(error.contains("a.npy") && error.contains("2 columns") && error.contains("512"), "{error}");
    }

    #[test]
    fn whatever_holds_a_prompt_is_read() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        npy::write(&at("prompt.npy"), &prompt()).unwrap();
        std::fs::copy(at("prompt.npy"), at("encoder.prompt.prompt.prompt")).unwrap();
        let base = peft::BaseModel { name: "t5".to_owned(), num_layers: 2, num_heads: 4 };
        peft::write(&at("adapter"), &prompt(), &base).unwrap();
        checkpoint::write_prompt(&at("alone.safetensors"), &prompt()).unwrap();
        for name in [
            "alone.safetensors",
            "prompt.npy",
            "encoder.prompt.prompt.prompt",
            "adapter",
            "adapter/adapter_model.safetensors",
            ".",
        ] {
            assert_eq!(Prompt::read(&at(name)).unwrap(), prompt(), "{name}");
        }
    }

    #[test]
    fn what_holds_no_prompt_is_refused_with_what_would() {
        let dir = tempfile::tempdir().unwrap();
        let text = dir.path().join("readme.txt");
        std::fs::write(&text, "no").unwrap();
        for path in [dir.path(), &text] {
            let error = Prompt::read(path).unwrap_err().to_string();
            assert!(error.contains("holds no prompt; give an .npy file"), "{error}");
        }
        let error = Prompt::read(&dir.path().join("absent")).unwrap_err().to_string();
        assert!(error.contains("absent"), "{error}");
    }
}
