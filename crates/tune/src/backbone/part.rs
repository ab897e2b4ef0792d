//! This rank's part of a model: loaded by itself, for as many groups of ranks as come.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

use candle_core::{DType, Device};
use incipit_collective::{Axis, Ranks, Shard, gather_bytes};
use incipit_model::{
    Config, T5, TensorAxis,
    sharding::{part_bytes, sharded_dim},
};
use incipit_weights::{Checkpoint, Digests, Fingerprint, Loading};
use tokenizers::Tokenizer;

use crate::{
    Error, Result,
    backbone::Backbone,
    device::DeviceChoice,
    engine::{Engine, EngineOptions, Limits, Shortage},
    ranks,
    spec::Precision,
};

/// A model of which the configuration and the tokenizer were read, and no weight. Examples can be read with it, so that what is wrong with
/// them is said before the weights, which may take minutes.
pub struct Opened {
    /// The model's tokenizer.
    pub tokenizer: Tokenizer,
    /// The model's shape.
    pub config: Config,
    /// What it was asked for as: a directory, or a name on the hub.
    pub name: String,
    checkpoint: Arc<Checkpoint>,
    device: Device,
    dtype: DType,
}

impl Opened {
    /// Opens a directory, or a model of the Hugging Face hub, for this rank; all ranks do so together.
    ///
    /// # Errors
    /// If there is no such model, one of its files is missing, damaged or of an unknown kind, or the device cannot be used; also if a rank
    /// computes with other instructions.
    pub fn open(model: &str, dtype: Precision, device: DeviceChoice, ranks: &Ranks) -> Result<Self> {
        // Said here already, for weights may take minutes.
        same_instructions(ranks, device.is_gpu())?;
        let device = device.open(ranks)?;
        let dir = directory(model, ranks)?;
        ranks::while_others_wait(ranks, || Self::at(&dir, model, dtype, device))
    }

    /// Opens the model in `dir`, which was asked for as `name`, for one rank by itself.
    ///
    /// # Errors
    /// If one of the model's files is missing, damaged or of an unknown kind.
    pub fn at(dir: &Path, name: &str, dtype: Precision, device: Device) -> Result<Self> {
        let checkpoint = Arc::new(Checkpoint::open(dir, dtype.into())?);
        let config = Config::from_json(&checkpoint.config_json()?).map_err(|source| Error::ModelConfig {
            dir: checkpoint.dir().to_owned(),
            source: Box::new(source),
        })?;
        let tokenizer = incipit_weights::load_tokenizer(checkpoint.dir())?;
        Ok(Self { tokenizer, config, checkpoint, device, dtype: dtype.into(), name: name.to_owned() })
    }

    /// How far loading has got, once it has begun.
    #[must_use]
    pub fn loading(&self) -> Arc<Loading> {
        self.checkpoint.loading()
    }

    /// Loads part `shard` of the weights, without a word to other ranks.
    ///
    /// # Errors
    /// If a weight is missing or damaged, the model cannot be cut into so many parts, or the device has not memory enough.
    pub fn part(self, shard: Shard) -> Result<Part> {
        let Self { tokenizer, config, checkpoint, device, dtype, name } = self;
        checkpoint.expect(part_bytes(&*checkpoint, shard), !device.is_cpu(), true);
        let model = T5::load_on(config, &*checkpoint, dtype, &TensorAxis::unmet(shard), &device)?;
        checkpoint.loading().end_of_copies();
        let digests = own_digests(&checkpoint, shard);
        let model = Arc::new(model);
        Ok(Part { model, tokenizer, checkpoint, digests, name, limits: None, fingerprint: None })
    }

    /// Loads what is this rank's of the weights; all ranks do so together, and one whose disk is slow is waited for.
    ///
    /// # Errors
    /// As [`Backbone::load_on`].
    pub fn load(self, options: EngineOptions, ranks: &Arc<Ranks>) -> Result<Backbone> {
        ranks::while_others_wait(ranks, || self.part(ranks.shard(Axis::Tensor)))?.meet(options, ranks)
    }
}

/// One rank's part of a model, with its weights.
pub struct Part {
    /// Shared with the backbone of one group at a time.
    model: Arc<T5>,
    tokenizer: Tokenizer,
    checkpoint: Arc<Checkpoint>,
    /// What this rank has hashed of it.
    digests: Digests,
    name: String,
    /// What the ranks of the last group could take at once, and what this one has found out since.
    limits: Option<(Limits, Shortage)>,
    /// What all of it was in the first group.
    fingerprint: Option<Fingerprint>,
}

impl Part {
    /// Joins a group of ranks that have the model's other parts, or the same ones: the weights stay where they are, whatever became of an
    /// earlier group, or of an earlier call of this. All ranks of the group make this call together.
    ///
    /// `options` are those of the first group that was met; others agree with its ranks, on less where memory did not suffice for that.
    ///
    /// # Errors
    /// [`Error::Regroup`] if this rank has another part than its place in the group says, a backbone of an earlier group is still there, or
    /// another rank has other weights; also if a rank computes with other instructions, or an exchange fails.
    pub fn meet(&mut self, options: EngineOptions, ranks: &Arc<Ranks>) -> Result<Backbone> {
        self.take_place(&TensorAxis::of(ranks))?;
        same_instructions(ranks, !self.model.device().is_cpu())?;
        if let Some((limits, shortage)) = &mut self.limits {
            *limits = shortage.lower(*limits, self.model.device());
        }
        let known = self.limits.as_ref().map(|(limits, _)| *limits);
        let engine = Engine::within(self.model.clone(), options, known, ranks.clone())?;
        let fingerprint = fingerprint(&self.checkpoint, ranks, &self.digests)?;
        if self.fingerprint.is_some_and(|known| known != fingerprint) {
            let what = format!("another rank has other weights of {}; were its files changed?", self.name);
            return Err(Error::Regroup { what });
        }
        (self.limits, self.fingerprint) = (Some(engine.limits()), Some(fingerprint));
        Ok(Backbone {
            engine,
            tokenizer: self.tokenizer.clone(),
            fingerprint,
            num_parameters: self.checkpoint.num_parameters(),
            name: self.name.clone(),
            source: self.checkpoint.clone(),
        })
    }

    fn take_place(&mut self, axis: &TensorAxis) -> Result<()> {
        let Some(model) = Arc::get_mut(&mut self.model) else {
            return Err(Error::Regroup { what: "an earlier group still uses its weights".to_owned() });
        };
        model.regroup(axis).map_err(|error| Error::Regroup { what: error.to_string() })
    }

    /// Whether the device works that it lies on. With one that failed, no process goes on.
    #[must_use]
    pub fn device_works(&self) -> bool {
        incipit_kernels::check_device(self.model.device()).is_ok()
    }
}

/// Checks that all ranks compute with the same instructions, if that is not done on GPUs: with others, a number would depend on the rank
/// that computed it.
fn same_instructions(ranks: &Ranks, on_gpus: bool) -> Result<()> {
    let isa = || if on_gpus { "those of GPUs".to_owned() } else { incipit_kernels::isa().name().to_owned() };
    ranks::agree(ranks, || [("other instructions of its processor (INCIPIT_ISA chooses them)", isa())])
}

/// Where the files of a model lie: in the directory of that name, or in the cache of what is on the hub, where they are fetched if they
/// are not there. `gets_on` is called for as long as that gets on.
///
/// # Errors
/// If there is no such model, or it cannot be fetched.
pub fn find_watched(model: &str, gets_on: &dyn Fn()) -> Result<PathBuf> {
    Ok(incipit_weights::resolve_watched(model, gets_on)?)
}

/// Where the model's files lie, on all ranks together. What is on the hub is fetched by one rank of each machine, and found in the cache by the others.
fn directory(model: &str, ranks: &Ranks) -> Result<PathBuf> {
    if !ranks::any(ranks, !Path::new(model).is_dir())? {
        return Ok(incipit_weights::resolve(model)?);
    }
    ranks::while_others_wait(ranks, || Ok(incipit_weights::resolve(model)?))
}

/// What each rank of a replica hashes: what it reads anyway.
fn own_digests(checkpoint: &Checkpoint, shard: Shard) -> Digests {
    // What all ranks have, all hash: so it is noticed if they read different files.
    let share = |parts| if parts == 1 { 0..1 } else { shard.portion(parts) };
    checkpoint.fingerprint_parts(&sharded_dim, &share)
}

/// The fingerprint of the whole checkpoint, of which this rank has hashed `own`.
fn fingerprint(checkpoint: &Checkpoint, ranks: &Ranks, own: &Digests) -> Result<Fingerprint> {
    let mut all = Digests::default();
    for bytes in gather_bytes(&**ranks.tensor(), &own.to_bytes())? {
        all.merge(Digests::from_bytes(&bytes)?);
    }
    Ok(checkpoint.fingerprint_of(&all)?)
}
