//! A backbone with what belongs to it: loaded once, for as many jobs as come.

use std::{collections::BTreeMap, path::Path, sync::Arc};

use candle_core::DType;
use half::bf16;
use incipit_collective::Ranks;
use incipit_kernels::Frozen;
use incipit_model::{Config, T5, TensorAxis, sharding};
use incipit_weights::{Fingerprint, Overlay, Source, Written};
use rayon::prelude::*;
use tokenizers::Tokenizer;

use crate::{
    Error, Result,
    device::DeviceChoice,
    engine::{Engine, EngineOptions},
    optimizer::NamedTensor,
    peft::BaseModel,
    spec::Precision,
    weights::matrix,
};

mod part;

pub use incipit_weights::Loading;
pub use part::{Opened, Part, find_watched};

/// A frozen model, its tokenizer and its identity, as the ranks of one group have it together.
pub struct Backbone {
    /// The model, ready for batches.
    pub engine: Engine,
    /// Its tokenizer.
    pub tokenizer: Tokenizer,
    /// Names its numbers.
    pub fingerprint: Fingerprint,
    /// Where its tensors are read.
    pub source: Arc<dyn Source>,
    /// How many numbers it has.
    pub num_parameters: u64,
    /// What it was asked for as: a directory, or a name on the hub.
    pub name: String,
}

impl Backbone {
    /// Loads a directory, or a model of the Hugging Face hub, on one rank and the CPU.
    ///
    /// # Errors
    /// If there is no such model, or one of its files is missing, damaged or of an unknown kind; the message names the file.
    pub fn load(model: &str, dtype: Precision, options: EngineOptions) -> Result<Self> {
        Self::load_on(model, dtype, DeviceChoice::Cpu, options, &Arc::new(Ranks::alone()))
    }

    /// As [`Self::load`], of the weights only what is this rank's, on its device.
    ///
    /// # Errors
    /// As [`Self::load`]; also if the model cannot be cut as the mesh says, an exchange with other ranks fails, or the device cannot be
    /// used or has not memory enough.
    pub fn load_on(
        model: &str,
        dtype: Precision,
        device: DeviceChoice,
        options: EngineOptions,
        ranks: &Arc<Ranks>,
    ) -> Result<Self> {
        Opened::open(model, dtype, device, ranks)?.load(options, ranks)
    }

    /// An engine over the model with these weights in the place of its own, or besides them. What they do not name stays frozen where it
    /// is.
    ///
    /// # Errors
    /// If the model does not take one of the weights, or has it in another shape.
    pub fn engine_with(&self, weights: &[NamedTensor]) -> Result<Engine> {
        let model = self.engine.model();
        if !model.device().is_cpu() {
            let what =
                "weights that a run has trained are laid over a model on a CPU alone; pass --device cpu";
            return Err(Error::Prompt { what: what.to_owned() });
        }
        let source = self.with(weights, model.dtype())?;
        let axis = TensorAxis::of(self.engine.ranks());
        let model = T5::load_on(model.config().clone(), &source, model.dtype(), &axis, model.device())?;
        Ok(self.engine.with_model(model))
    }

    /// Writes the model with these weights in the place of its own, in the type in which it was loaded, as Hugging Face's libraries
    /// read it: in files of `max_shard_bytes` at most.
    ///
    /// # Errors
    /// If one is no weight of the model itself, `dir` holds something, a tensor cannot be read, or the system refuses.
    pub fn write_with(&self, weights: &[NamedTensor], dir: &Path, max_shard_bytes: u64) -> Result<Written> {
        self.check_own(weights)?;
        let dtype = self.engine.model().dtype();
        Ok(incipit_weights::write_safetensors(dir, &self.with(weights, dtype)?, dtype, max_shard_bytes)?)
    }

    /// Checks that these are weights of the model itself, and not of what is laid into it: of that its files know nothing.
    fn check_own(&self, weights: &[NamedTensor]) -> Result<()> {
        let own: BTreeMap<String, Vec<usize>> = self.engine.model().weights().into_iter().collect();
        for NamedTensor { name, shape, .. } in weights {
            let what = match own.get(name) {
                Some(expected) if expected == shape => continue,
                Some(expected) => format!(
                    "{name} is {shape:?}, and {} has it as {expected:?}; give the model that was trained",
                    self.name
                ),
                None => format!(
                    "{name} is no weight of {}; adapters and prefixes stay beside their model, where `eval` and `generate` take them",
                    self.name
                ),
            };
            return Err(Error::Prompt { what });
        }
        Ok(())
    }

    /// The model's tensors with these over them: matrices of type `dtype`.
    fn with(&self, weights: &[NamedTensor], dtype: DType) -> Result<Overlay<'_>> {
        let mut source = Overlay::new(&*self.source);
        for weight in self.fitting(weights)? {
            check_weight(weight)?;
            let numbers = frozen(weight, dtype);
            for copy in self.copies(&weight.name) {
                source.put(copy, &weight.shape, numbers.clone());
            }
            source.put(&weight.name, &weight.shape, numbers);
        }
        Ok(source)
    }

    /// The weights that the model has layers for. PEFT's prefixes may have as many again, which it makes and does not read.
    fn fitting<'w>(&self, weights: &'w [NamedTensor]) -> Result<Vec<&'w NamedTensor>> {
        let (layers, width) = (self.config().num_decoder_layers, self.config().inner());
        let past = || weights.iter().filter(|weight| weight.name.ends_with(".past_k.weight"));
        let (found, wide) = (past().count(), past().next().and_then(|weight| weight.shape.last().copied()));
        if ![0, layers, 2 * layers].contains(&found) || wide.is_some_and(|wide| wide != width) {
            let what = format!(
                "the prefix has {} columns for {found} decoder layers, and {} has {layers} layers of {width}; give the model that it was \
                 trained on",
                wide.unwrap_or_default(),
                self.name
            );
            return Err(Error::Prompt { what });
        }
        let beyond: Vec<String> = (layers..found).map(|i| format!("decoder.block.{i}.")).collect();
        let fits = |weight: &&NamedTensor| !beyond.iter().any(|block| weight.name.starts_with(block));
        Ok(weights.iter().filter(fits).collect())
    }

    /// The names under which the files have the table `name` again: some checkpoints keep the shared embedding more than once.
    fn copies(&self, name: &str) -> impl Iterator<Item = &'static str> {
        let names = ["encoder.embed_tokens.weight", "decoder.embed_tokens.weight"];
        let is_table = name == "shared.weight" || names.contains(&name);
        names.into_iter().filter(move |copy| is_table && self.source.contains(copy))
    }

    /// The shape of the model.
    #[must_use]
    pub fn config(&self) -> &Config {
        self.engine.model().config()
    }

    /// What an exported adapter says of the model.
    #[must_use]
    pub fn base_model(&self) -> BaseModel {
        let config = self.config();
        BaseModel { name: self.name.clone(), num_layers: config.num_layers, num_heads: config.num_heads }
    }
}

/// Checks that a T5 has a place for a weight of this name.
fn check_weight(weight: &NamedTensor) -> Result<()> {
    if sharding::Rule::of(&weight.name).is_some() {
        return Ok(());
    }
    Err(Error::Prompt { what: format!("no T5 takes a trained weight {:?}", weight.name) })
}

/// A trained weight as the model reads it: a matrix in the model's type, a vector in f32.
fn frozen(weight: &NamedTensor, dtype: DType) -> Frozen {
    let (rows, cols) = matrix(&weight.shape);
    if dtype == DType::BF16 && weight.shape.len() == 2 {
        return Frozen::from_bf16(weight.data.par_iter().map(|x| bf16::from_f32(*x)).collect(), rows, cols);
    }
    Frozen::from_f32(weight.data.clone(), rows, cols)
}
