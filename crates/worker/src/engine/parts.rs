//! This process's parts of a model. They are loaded before the process meets others, and outlive its groups: a rank that is lost meanwhile
//! costs nobody what was read.

use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use incipit_collective::Shard;
use incipit_proto::v1::EngineLossCause;
use incipit_tune::Error;
use incipit_tune::backbone::{self, Opened, Part};

use crate::engine::Loss;
use crate::engine::failure::Failure;
use crate::engine::machine::Machine;
use crate::engine::voice::Voice;
use crate::engine::watch::Watches;

/// The parts, by rank.
#[derive(Default)]
pub(crate) struct Parts(Vec<Mutex<Option<Part>>>);

impl Parts {
    /// A place for the part of each of so many ranks. What is there stays.
    pub(crate) fn places(&mut self, world: usize) -> &[Mutex<Option<Part>>] {
        self.0.resize_with(world, Mutex::default);
        &self.0
    }
}

/// Which part a rank has, and where it lies.
#[derive(Clone, Copy)]
pub(crate) struct Whose {
    pub(crate) rank: usize,
    pub(crate) shard: Shard,
    /// The rank's number on its machine: that of its GPU.
    pub(crate) local_rank: usize,
}

/// Loads parts.
pub(crate) struct Reader<'a> {
    pub(crate) machine: &'a Machine,
    /// Name of the backbone, and epoch of the group, for which it is.
    pub(crate) backbone: &'a str,
    pub(crate) epoch: u64,
    pub(crate) voice: &'a Voice,
    pub(crate) watches: &'a Watches,
}

impl Reader<'_> {
    /// Loads a rank's part, unless it is there.
    ///
    /// # Errors
    /// If it cannot be loaded.
    pub(crate) fn load(&self, whose: Whose, place: &Mutex<Option<Part>>) -> Result<(), Loss> {
        let mut place = place.lock().unwrap_or_else(PoisonError::into_inner);
        if place.is_none() {
            *place = Some(self.read(whose).map_err(told)?);
        }
        Ok(())
    }

    fn read(&self, Whose { rank, shard, local_rank }: Whose) -> incipit_tune::Result<Part> {
        let Machine { model, dtype, device } = self.machine;
        let _span = tracing::info_span!("load", backbone = self.backbone, epoch = self.epoch, rank).entered();
        let start = Instant::now();
        let reading = self.watches.read(rank, model);
        let dir = backbone::find_watched(model, &|| reading.gets_on())?;
        let opened = Opened::at(&dir, model, *dtype, device.open_for(local_rank)?)?;
        reading.tells_of(opened.loading());
        let part = opened.part(shard)?;
        let (number, count, seconds) = (shard.index() + 1, shard.count(), start.elapsed().as_secs_f64());
        self.voice.log(
            "",
            "INFO",
            format!("rank {rank} has loaded part {number} of {count} of {model} in {seconds:.1} s"),
        );
        Ok(part)
    }
}

/// What the loss of a rank is that could not load, or not join others with what it has loaded.
pub(crate) fn told(error: Error) -> Loss {
    if error.is_of_gpu() {
        return device_failed(&error.to_string());
    }
    let failure = Failure::from(error);
    if failure.of_group { Loss::from(failure) } else { (EngineLossCause::BadModel, failure.message) }
}

/// The loss of a rank whose device failed: only a new process can use the device again, if it works again.
pub(crate) fn device_failed(message: &str) -> Loss {
    (EngineLossCause::Exited, format!("its device has failed, and so its process ends: {message}"))
}
