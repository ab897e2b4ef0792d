//! One group of ranks, from their meeting to its end.

use std::path::PathBuf;
use std::str::FromStr as _;
use std::sync::mpsc::Sender;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use incipit_collective::{Mesh, Options, Ranks};
use incipit_proto::v1::{EngineAssignment, EngineLossCause, EngineReady};
use incipit_tune::backbone::Backbone;
use incipit_tune::device::DeviceChoice;
use incipit_tune::engine::EngineOptions;
use incipit_tune::ranks::on_threads;
use incipit_tune::spec::{Backend, Precision};

use crate::engine::failure::{Failure, Result};
use crate::engine::lead::{Leader, State};
use crate::engine::load::Loader;
use crate::engine::machine::Machine;
use crate::engine::plan::Plan;
use crate::engine::rendezvous::Answers;
use crate::engine::resident::sent;
use crate::engine::residents::Residents;
use crate::engine::saver::Saver;
use crate::engine::voice::Voice;
use crate::engine::watch::{Farewell, Watch, Watches};
use crate::engine::{Inbox, Loss, Mail, Next};
use crate::frames::{Join, Notice, Ready};

/// How long a rank waits for the others: as long as the slowest disk takes to load a model. A rank that is gone is found by its agent or
/// by the coordinator long before, and one that waits for it in vain leaves when there is a new group.
const DEADLINE: Duration = Duration::from_secs(600);
/// How long a pass through the backbone may take in any case: on a CPU other programs may have the cores, and its weights may have to be read
/// from a disk again.
const HANG_AFTER_ON_CPU: Duration = Duration::from_secs(60);
/// As above, on a GPU, which has the weights: some of its first kernels may have to be compiled.
const HANG_AFTER_ON_GPU: Duration = Duration::from_secs(10);

/// What outlives a group: the backbones of this process, by rank.
#[derive(Default)]
pub(crate) struct Held {
    backbones: Vec<Mutex<Option<Backbone>>>,
}

/// A group that this process takes part in.
pub(crate) struct Group<'a> {
    pub(crate) join: &'a Join,
    pub(crate) voice: &'a Voice,
    pub(crate) answers: &'a Arc<Answers>,
    /// The inbox's other end.
    pub(crate) loaded: &'a Sender<Mail>,
    pub(crate) watches: &'a Watches,
    /// How long a pass through the backbone may take in any case, if that was given.
    pub(crate) hang_after: Option<Duration>,
    pub(crate) farewell: Arc<Farewell>,
}

/// What an assignment says, read.
struct Settings {
    mesh: Mesh,
    machine: Machine,
    backend: Backend,
    engine: EngineOptions,
    options: Options,
}

impl Group<'_> {
    /// Meets the other ranks, loads what is not loaded, and works until the agent wants something else.
    ///
    /// # Errors
    /// If the model cannot be loaded, or the ranks cannot go on together. What is loaded stays.
    pub(crate) fn stay(&self, held: &mut Held, inbox: &Inbox) -> std::result::Result<Next, Loss> {
        let bad = |message: String| (EngineLossCause::BadModel, message);
        let assignment =
            self.join.assignment.as_ref().ok_or_else(|| bad("no backbone was named".to_owned()))?;
        let settings = settings(assignment, self.join.local_rank as usize).map_err(bad)?;
        let world = settings.mesh.world();
        held.backbones.resize_with(world, Mutex::default);
        let threads = threads(self.join.neighbours);
        if settings.backend == Backend::Local {
            let work = |ranks: Ranks| self.work(&settings, ranks, &held.backbones, inbox);
            let results = on_threads(settings.mesh, Some(threads), &settings.options, |ranks| {
                Ok::<_, incipit_tune::Error>(work(ranks))
            });
            return first_cause(
                results
                    .into_iter()
                    .map(|result| result.unwrap_or_else(|error| Err(Failure::from(error).into()))),
            );
        }
        let rank = self.join.rank;
        let named = move |_| format!("rank {rank}");
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).thread_name(named).build();
        let pool = pool.map_err(|error| bad(format!("cannot start {threads} threads: {error}")))?;
        pool.install(|| {
            let ranks = self.connect(&settings).map_err(Loss::from)?;
            self.work(&settings, ranks, &held.backbones, inbox)
        })
    }

    /// Meets the ranks that are processes.
    fn connect(&self, settings: &Settings) -> Result<Ranks> {
        let store = Arc::new(crate::engine::rendezvous::CoordinatorStore {
            voice: self.voice.clone(),
            answers: self.answers.clone(),
            backbone: settings.options.job.clone(),
            epoch: settings.options.epoch,
            address: self.join.address.parse().ok(),
        });
        let rank = self.join.rank as usize;
        match settings.backend {
            #[cfg(feature = "gloo")]
            Backend::Gloo => {
                Ok(incipit_collective::gloo::connect(settings.mesh, rank, store, &settings.options)?)
            }
            #[cfg(feature = "cuda")]
            Backend::Nccl => connect_nccl(settings, rank, store),
            _ => {
                let _ = (store, rank);
                unreachable!("what is not built in was refused with the assignment")
            }
        }
    }

    fn work(
        &self,
        settings: &Settings,
        ranks: Ranks,
        held: &[Mutex<Option<Backbone>>],
        inbox: &Inbox,
    ) -> std::result::Result<Next, Loss> {
        let ranks = Arc::new(ranks);
        self.watches.met(settings.options.epoch, &ranks);
        let mut held = held[ranks.rank()].lock().unwrap_or_else(PoisonError::into_inner);
        let worked = self.load(settings, &ranks, &mut held).and_then(|()| {
            let Some(backbone) = &*held else { unreachable!("it is loaded") };
            self.serve(settings, &ranks, backbone, inbox).map_err(Loss::from)
        });
        let works = || held.as_ref().is_none_or(|backbone| backbone.engine.device_works());
        let worked = worked.map_err(|loss| {
            if loss.0 == EngineLossCause::Exited || works() { loss } else { device_failed(&loss.1) }
        });
        if let Err(loss) = &worked
            && settings.backend != Backend::Local
        {
            // Before the others lose this rank, which is all that they could tell. Of threads the weightiest cause is told.
            self.farewell.say(loss);
        }
        // Those that wait for this rank learn that it comes no more: the backbone keeps the group from being dropped.
        ranks.abort(worked.as_ref().err().map_or("the group has come to its end", |(_, message)| message));
        worked
    }

    /// Loads the backbone, or has the one that is loaded join the new group.
    fn load(
        &self,
        settings: &Settings,
        ranks: &Arc<Ranks>,
        held: &mut Option<Backbone>,
    ) -> std::result::Result<(), Loss> {
        let Machine { model, dtype, device } = &settings.machine;
        let (backbone, epoch) = (&*settings.options.job, settings.options.epoch);
        let resident = held.is_some();
        let _span = tracing::info_span!("load", backbone, epoch, rank = ranks.rank(), resident).entered();
        let told = |error: incipit_tune::Error| {
            if error.is_of_gpu() {
                return device_failed(&error.to_string());
            }
            let failure = Failure::from(error);
            if failure.of_group { Loss::from(failure) } else { (EngineLossCause::BadModel, failure.message) }
        };
        if let Some(backbone) = held {
            return backbone.regroup(ranks).map_err(told);
        }
        *held = Some(Backbone::load_on(model, *dtype, *device, settings.engine, ranks).map_err(told)?);
        Ok(())
    }

    fn serve(
        &self,
        settings: &Settings,
        ranks: &Arc<Ranks>,
        backbone: &Backbone,
        inbox: &Inbox,
    ) -> Result<Next> {
        // Every rank has loaded once all have come here.
        ranks.world().barrier()?;
        let epoch = settings.options.epoch;
        let of_device = || match backbone.engine.model().device().is_cpu() {
            true => HANG_AFTER_ON_CPU,
            false => HANG_AFTER_ON_GPU,
        };
        let hang_after = self.hang_after.unwrap_or_else(of_device);
        let watch = Watch::new(ranks, backbone.engine.pace(), hang_after, &self.farewell);
        let _watched = self.watches.add(watch);
        if ranks.leads() || settings.backend != Backend::Local {
            let engine = EngineReady {
                pid: std::process::id(),
                fingerprint: backbone.fingerprint.to_string(),
                num_parameters: backbone.num_parameters,
                d_model: backbone.config().d_model as u32,
                num_layers: backbone.config().num_layers as u32,
                microbatch_tokens: backbone.engine.microbatch_tokens() as u32,
            };
            self.voice.say(Notice::Ready(Ready { epoch, engine: Some(engine) }));
        }
        if !ranks.leads() {
            return self.follow(settings, ranks, backbone);
        }
        let leader = Leader {
            backbone,
            ranks,
            voice: self.voice,
            saver: Saver::start(PathBuf::from(&self.join.outbox), self.voice.clone()),
            loader: Loader::new(backbone, settings.machine.clone(), self.loaded.clone()),
            name: settings.options.job.clone(),
            epoch,
            state: State::default(),
        };
        leader.lead(&inbox.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Carries out the leader's plans, until it has no more.
    fn follow(&self, settings: &Settings, ranks: &Ranks, backbone: &Backbone) -> Result<Next> {
        let mut residents = Residents::default();
        loop {
            let plan = Plan::hear(ranks)?;
            residents.carry_out(&plan, backbone, |admission| sent(admission, &settings.machine))?;
            if settings.backend != Backend::Local {
                self.voice.advance();
            }
        }
    }
}

#[cfg(feature = "cuda")]
fn connect_nccl(
    settings: &Settings,
    rank: usize,
    store: Arc<dyn incipit_collective::store::Store>,
) -> Result<Ranks> {
    let number = settings.options.local_rank.unwrap_or(rank);
    let device = settings.machine.device.open_for(number)?;
    Ok(incipit_collective::nccl::connect(settings.mesh, rank, store, &device, &settings.options)?)
}

impl From<Failure> for Loss {
    fn from(failure: Failure) -> Self {
        (EngineLossCause::GroupFailed, failure.message)
    }
}

/// The loss of a rank whose device failed: only a new process can use the device again, if it works again.
fn device_failed(message: &str) -> Loss {
    (EngineLossCause::Exited, format!("its device has failed, and so its process ends: {message}"))
}

/// What the leader came to; or, if a rank failed, why: the ranks that only lost another one know less.
fn first_cause(
    results: impl Iterator<Item = std::result::Result<Next, Loss>>,
) -> std::result::Result<Next, Loss> {
    let mut failure: Option<Loss> = None;
    let mut next = None;
    for (rank, result) in results.enumerate() {
        match result {
            Ok(found) => next = Some(found),
            Err((cause, message)) => {
                let message = format!("rank {rank}: {message}");
                if failure.as_ref().is_none_or(|(known, _)| weight(cause) > weight(*known)) {
                    failure = Some((cause, message));
                }
            }
        }
    }
    // When the leader goes on, the others lose it.
    match (next, failure) {
        (Some(next), _) => Ok(next),
        (None, Some(failure)) => Err(failure),
        (None, None) => Ok(Next::End),
    }
}

/// Of two ranks' causes, the one that explains the other.
fn weight(cause: EngineLossCause) -> u8 {
    match cause {
        EngineLossCause::BadModel => 2,
        EngineLossCause::Exited => 1,
        _ => 0,
    }
}

/// A process's share of the machine's cores.
fn threads(neighbours: u32) -> usize {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    (cores / neighbours.max(1) as usize).max(1)
}

fn settings(assignment: &EngineAssignment, local_rank: usize) -> std::result::Result<Settings, String> {
    let (tp, dp) = (assignment.tp.max(1) as usize, assignment.dp.max(1) as usize);
    let backend = Backend::from_str(&assignment.collective).map_err(|error| error.to_string())?;
    let built = match backend {
        Backend::Local => true,
        Backend::Gloo => cfg!(feature = "gloo"),
        Backend::Nccl => cfg!(feature = "cuda"),
    };
    if !built {
        return Err(format!(
            "this worker was built without {backend}; build it with that feature, or choose another collective"
        ));
    }
    Ok(Settings {
        mesh: Mesh::new(tp, dp, tp.saturating_mul(dp)).map_err(|error| error.to_string())?,
        machine: Machine {
            model: assignment.model.clone(),
            dtype: Precision::from_str(&assignment.dtype).map_err(|error| error.to_string())?,
            device: DeviceChoice::from_str(&assignment.device).map_err(|error| error.to_string())?,
        },
        backend,
        engine: EngineOptions {
            microbatch_tokens: (assignment.microbatch_tokens > 0)
                .then_some(assignment.microbatch_tokens as usize),
            ..EngineOptions::default()
        },
        options: Options {
            deadline: DEADLINE,
            connect_deadline: DEADLINE,
            epoch: assignment.epoch,
            job: assignment.backbone.clone(),
            local_rank: Some(local_rank),
        },
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_several_ranks_the_one_that_explains_the_others_is_told() {
        use EngineLossCause::{BadModel, Exited, GroupFailed};
        for (causes, told) in [
            ([GroupFailed, Exited, GroupFailed], Exited),
            ([Exited, GroupFailed, BadModel], BadModel),
            ([GroupFailed, GroupFailed, GroupFailed], GroupFailed),
        ] {
            let results = causes.map(|cause| Err((cause, format!("{cause:?}"))));
            let Err((cause, message)) = first_cause(results.into_iter()) else { panic!("{causes:?}") };
            let rank = causes.iter().position(|cause| *cause == told).unwrap();
            assert_eq!((cause, message), (told, format!("rank {rank}: {told:?}")));
        }
    }

    #[test]
    fn a_leader_that_goes_on_is_not_held_by_a_rank_that_lost_it() {
        let lost = Err((EngineLossCause::GroupFailed, "the leader is gone".to_owned()));
        assert!(matches!(first_cause([Ok(Next::End), lost].into_iter()), Ok(Next::End)));
    }
}
