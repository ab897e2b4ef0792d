//! A backbone with what belongs to it: loaded once, for as many jobs as come.

use std::sync::Arc;

use incipit_model::{Config, T5};
use incipit_weights::{Checkpoint, Fingerprint};
use tokenizers::Tokenizer;

use crate::{
    Error, Result,
    engine::{Engine, EngineOptions},
    peft::BaseModel,
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
    /// How many numbers it has.
    pub num_parameters: u64,
    /// What it was asked for as: a directory, or a name on the hub.
    pub name: String,
}

impl Backbone {
    /// Loads a directory, or a model of the Hugging Face hub.
    ///
    /// # Errors
    /// If there is no such model, or one of its files is missing, damaged or of an unknown kind; the message names the file.
    pub fn load(model: &str, dtype: Precision, options: EngineOptions) -> Result<Self> {
        let checkpoint = Checkpoint::open(&incipit_weights::resolve(model)?, dtype.into())?;
        let config = Config::from_json(&checkpoint.config_json()?).map_err(|source| Error::ModelConfig {
            dir: checkpoint.dir().to_owned(),
            source: Box::new(source),
        })?;
        let tokenizer = incipit_weights::load_tokenizer(checkpoint.dir())?;
        let t5 = T5::load(config, &checkpoint, dtype.into())?;
        Ok(Self {
            engine: Engine::new(Arc::new(t5), options),
            tokenizer,
            fingerprint: checkpoint.fingerprint()?,
            num_parameters: checkpoint.num_parameters(),
            name: model.to_owned(),
        })
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
