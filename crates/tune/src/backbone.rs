//! A backbone with what belongs to it: loaded once, for as many jobs as come.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

use incipit_collective::{Axis, Ranks, gather_bytes};
use incipit_model::{Config, T5, TensorAxis, sharding::sharded_dim};
use incipit_weights::{Checkpoint, Digests, Fingerprint};
use tokenizers::Tokenizer;

use crate::{
    Error, Result,
    device::DeviceChoice,
    engine::{Engine, EngineOptions},
    peft::BaseModel,
    ranks,
    spec::Precision,
};

/// A frozen model, its tokenizer and its identity.
pub struct Backbone {
    /// The model, ready for batches.
    pub engine: Engine,
    /// Its tokenizer.
    pub tokenizer: Tokenizer,
    /// Names its numbers.
    pub fingerprint: Fingerprint,
    /// What this rank has hashed of it.
    pub digests: Digests,
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
        let device = device.open(ranks)?;
        let checkpoint = Checkpoint::open(&directory(model, ranks)?, dtype.into())?;
        let config = Config::from_json(&checkpoint.config_json()?).map_err(|source| Error::ModelConfig {
            dir: checkpoint.dir().to_owned(),
            source: Box::new(source),
        })?;
        let tokenizer = incipit_weights::load_tokenizer(checkpoint.dir())?;
        let t5 = T5::load_on(config, &checkpoint, dtype.into(), &TensorAxis::of(ranks), &device)?;
        let engine = Engine::on(Arc::new(t5), options, ranks.clone())?;
        let digests = own_digests(&checkpoint, ranks);
        Ok(Self {
            engine,
            tokenizer,
            fingerprint: fingerprint(&checkpoint, ranks, &digests)?,
            digests,
            num_parameters: checkpoint.num_parameters(),
            name: model.to_owned(),
        })
    }

    /// Goes on in another group of ranks, after one of the old group was lost: the weights stay where they are. All ranks of the new
    /// group make this call together, or [`Self::load_on`] where a process begins anew: both exchange the same. What failed in the
    /// old group, or in an earlier call of this, leaves nothing behind.
    ///
    /// What this rank hashed when it loaded is compared with what a rank that loads now finds in the files.
    ///
    /// # Errors
    /// [`Error::Regroup`] if this rank would have another place or device in the new group, or another rank has other weights; also
    /// if the files are gone, or an exchange of the new group fails.
    pub fn regroup(&mut self, ranks: &Arc<Ranks>) -> Result<()> {
        self.engine.check_place(ranks)?;
        let dir = directory(&self.name, ranks)?;
        self.engine.regroup(ranks)?;
        let checkpoint = Checkpoint::open(&dir, self.engine.model().dtype())?;
        if fingerprint(&checkpoint, ranks, &self.digests)? != self.fingerprint {
            let what = format!("another rank has other weights of {}; were its files changed?", self.name);
            return Err(Error::Regroup { what });
        }
        Ok(())
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

/// Where the model's files lie. What is on the hub is fetched by one rank of each machine, and found in the cache by the others.
fn directory(model: &str, ranks: &Ranks) -> Result<PathBuf> {
    if !ranks::any(ranks, !Path::new(model).is_dir())? {
        return Ok(incipit_weights::resolve(model)?);
    }
    ranks::in_turns(ranks, || Ok(incipit_weights::resolve(model)?))
}

/// What each rank of a replica hashes: what it reads anyway.
fn own_digests(checkpoint: &Checkpoint, ranks: &Ranks) -> Digests {
    let shard = ranks.shard(Axis::Tensor);
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
