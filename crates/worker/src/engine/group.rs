//! One group of ranks, from their meeting to its end.

use std::path::PathBuf;
use std::str::FromStr as _;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::Sender;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use incipit_collective::store::Store;
use incipit_collective::{Axis, Mesh, Options, Ranks};
use incipit_proto::v1::{EngineAssignment, EngineLossCause, EngineReady};
use incipit_tune::backbone::{Backbone, Part};
use incipit_tune::device::DeviceChoice;
use incipit_tune::engine::EngineOptions;
use incipit_tune::ranks::on_threads;
use incipit_tune::spec::{Backend, Precision};

use crate::engine::failure::{Failure, Result};
use crate::engine::lead::{Leader, State};
use crate::engine::load::Loader;
use crate::engine::machine::Machine;
use crate::engine::parts::{Parts, Reader, Whose, device_failed, told};
use crate::engine::plan::Plan;
use crate::engine::rendezvous::Answers;
use crate::engine::resident::sent;
use crate::engine::residents::Residents;
use crate::engine::saver::Saver;
use crate::engine::voice::Voice;
use crate::engine::watch::{Farewell, Watch, Watches};
use crate::engine::{Inbox, Loss, Mail, Next, newest_join};
use crate::frames::{Join, Notice, Ready};

/// How long a rank waits for the others in an exchange. A rank that is gone is found by its agent or by the coordinator long before, and one
/// that waits for it in vain leaves when there is a new group.
const DEADLINE: Duration = Duration::from_secs(600);
/// How long it waits for them to load what they have to, which may be a download over a slow line. What does not get on is found by
/// [`Watches`] long before; this is for a process that cannot be started, since the one before does not end.
const LOADING: Duration = Duration::from_secs(24 * 3600);
/// How long a pass through the backbone may take in any case: on a CPU other programs may have the cores, and its weights may have to be read
/// from a disk again.
const HANG_AFTER_ON_CPU: Duration = Duration::from_secs(60);
/// As above, on a GPU, which has the weights: some of its first kernels may have to be compiled.
const HANG_AFTER_ON_GPU: Duration = Duration::from_secs(10);

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
    /// Loads what is not loaded, meets the other ranks, and works until the agent wants something else.
    ///
    /// # Errors
    /// If the model cannot be loaded, or the ranks cannot go on together. What is loaded stays.
    pub(crate) fn stay(&self, parts: &mut Parts, inbox: &Inbox) -> std::result::Result<Next, Loss> {
        let bad = |message: String| (EngineLossCause::BadModel, message);
        let assignment =
            self.join.assignment.as_ref().ok_or_else(|| bad("no backbone was named".to_owned()))?;
        let settings = settings(assignment, self.join.local_rank as usize).map_err(bad)?;
        let parts = parts.places(settings.mesh.world());
        if settings.backend == Backend::Local {
            return self.stay_as_threads(&settings, parts, inbox);
        }
        let rank = self.join.rank;
        let named = move |_| format!("rank {rank}");
        let threads = threads(self.join.neighbours);
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).thread_name(named).build();
        let pool = pool.map_err(|error| bad(format!("cannot start {threads} threads: {error}")))?;
        pool.install(|| self.stay_as_process(&settings, parts, inbox))
    }

    fn stay_as_process(
        &self,
        settings: &Settings,
        parts: &[Mutex<Option<Part>>],
        inbox: &Inbox,
    ) -> std::result::Result<Next, Loss> {
        let (rank, local_rank) = (self.join.rank as usize, self.join.local_rank as usize);
        let whose = Whose { rank, shard: settings.mesh.shard(rank, Axis::Tensor), local_rank };
        let load = || self.reader(settings).load(whose, &parts[rank]);
        if let Some(next) = self.unless_there_is_another(settings.options.epoch, inbox, load)? {
            return Ok(next);
        }
        let ranks = self.connect(settings).map_err(Loss::from)?;
        self.work(settings, ranks, parts, inbox)
    }

    fn stay_as_threads(
        &self,
        settings: &Settings,
        parts: &[Mutex<Option<Part>>],
        inbox: &Inbox,
    ) -> std::result::Result<Next, Loss> {
        let load = |ranks: Ranks| {
            let (rank, local_rank) = (ranks.rank(), ranks.local_rank());
            let whose = Whose { rank, shard: ranks.shard(Axis::Tensor), local_rank };
            self.reader(settings).load(whose, &parts[rank])
        };
        let load_all = || self.on_threads(settings, load).try_for_each(|loaded| loaded);
        if let Some(next) = self.unless_there_is_another(settings.options.epoch, inbox, load_all)? {
            return Ok(next);
        }
        first_cause(self.on_threads(settings, |ranks| self.work(settings, ranks, parts, inbox)))
    }

    /// Does something on each rank, all of them threads of this process. What is lost names its rank.
    fn on_threads<T: Send>(
        &self,
        settings: &Settings,
        work: impl Fn(Ranks) -> std::result::Result<T, Loss> + Sync,
    ) -> impl Iterator<Item = std::result::Result<T, Loss>> {
        let threads = threads(self.join.neighbours);
        let results = on_threads(settings.mesh, Some(threads), &settings.options, |ranks| {
            Ok::<_, incipit_tune::Error>(work(ranks))
        });
        let of_rank = |(rank, result): (usize, incipit_tune::Result<_>)| {
            let result = result.unwrap_or_else(|error| Err(Failure::from(error).into()));
            result.map_err(|(cause, message): Loss| (cause, format!("rank {rank}: {message}")))
        };
        results.into_iter().enumerate().map(of_rank)
    }

    fn reader<'a>(&'a self, settings: &'a Settings) -> Reader<'a> {
        let Settings { machine, options, .. } = settings;
        let (backbone, epoch) = (&*options.job, options.epoch);
        Reader { machine, backbone, epoch, voice: self.voice, watches: self.watches }
    }

    /// Has this process's parts loaded. If there is another group meanwhile, that is next, whatever became of loading: its parts are the same.
    fn unless_there_is_another(
        &self,
        epoch: u64,
        inbox: &Inbox,
        load: impl FnOnce() -> std::result::Result<(), Loss>,
    ) -> std::result::Result<Option<Next>, Loss> {
        let loading = self.watches.load(epoch);
        let loaded = load();
        drop(loading);
        let another = newest_join(inbox);
        if another.is_none() {
            loaded?;
        }
        Ok(another)
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
        await_loads(&*store, rank, settings.mesh.world())?;
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
        parts: &[Mutex<Option<Part>>],
        inbox: &Inbox,
    ) -> std::result::Result<Next, Loss> {
        let ranks = Arc::new(ranks);
        self.watches.met(settings.options.epoch, &ranks);
        let mut part = parts[ranks.rank()].lock().unwrap_or_else(PoisonError::into_inner);
        let Some(part) = &mut *part else { unreachable!("it was loaded first") };
        let worked = self
            .meet(settings, &ranks, part)
            .and_then(|backbone| self.serve(settings, &ranks, &backbone, inbox).map_err(Loss::from));
        let worked = worked.map_err(|loss| {
            let works = loss.0 == EngineLossCause::Exited || part.device_works();
            if works { loss } else { device_failed(&loss.1) }
        });
        if let Err(loss) = &worked
            && settings.backend != Backend::Local
        {
            // Before the others lose this rank, which is all that they could tell. Of threads the weightiest cause is told.
            self.farewell.say(loss);
        }
        // Those that wait for this rank learn that it comes no more.
        ranks.abort(worked.as_ref().err().map_or("the group has come to its end", |(_, message)| message));
        worked
    }

    fn meet(
        &self,
        settings: &Settings,
        ranks: &Arc<Ranks>,
        part: &mut Part,
    ) -> std::result::Result<Backbone, Loss> {
        let (backbone, epoch) = (&*settings.options.job, settings.options.epoch);
        let _span = tracing::info_span!("meet", backbone, epoch, rank = ranks.rank()).entered();
        part.meet(settings.engine, ranks).map_err(told)
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
        let turns = Arc::<AtomicU64>::default();
        let watch = Watch::new(ranks, (backbone.engine.pace(), &turns), hang_after, &self.farewell);
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
            return self.follow(settings, ranks, backbone, &turns);
        }
        let leader = Leader {
            backbone,
            ranks,
            voice: self.voice,
            saver: Saver::start(PathBuf::from(&self.join.outbox), self.voice.clone()),
            loader: Loader::new(backbone, settings.machine.clone(), self.loaded.clone()),
            name: settings.options.job.clone(),
            epoch,
            turns,
            state: State::default(),
        };
        leader.lead(&inbox.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Carries out the leader's plans, until it has no more.
    fn follow(
        &self,
        settings: &Settings,
        ranks: &Ranks,
        backbone: &Backbone,
        turns: &AtomicU64,
    ) -> Result<Next> {
        let mut residents = Residents::default();
        loop {
            turns.fetch_add(1, Ordering::Relaxed);
            let plan = Plan::hear(ranks)?;
            residents.carry_out(&plan, backbone, |admission| {
                turns.fetch_add(1, Ordering::Relaxed);
                sent(admission, &settings.machine)
            })?;
            if settings.backend != Backend::Local {
                self.voice.advance();
            }
        }
    }
}

/// Waits until all ranks have loaded what they have to.
fn await_loads(store: &dyn Store, rank: usize, world: usize) -> Result<()> {
    const ALL: &str = "all ranks have loaded";
    let key = |rank| format!("rank {rank} has loaded");
    if rank > 0 {
        store.set(&key(rank), &[])?;
        store.get(ALL, LOADING)?;
        return Ok(());
    }
    for other in 1..world {
        store.get(&key(other), LOADING)?;
    }
    Ok(store.set(ALL, &[])?)
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

/// What the leader came to; or, if a rank failed, why: the ranks that only lost another one know less.
fn first_cause(
    results: impl Iterator<Item = std::result::Result<Next, Loss>>,
) -> std::result::Result<Next, Loss> {
    let mut failure: Option<Loss> = None;
    let mut next = None;
    for result in results {
        match result {
            Ok(found) => next = Some(found),
            Err((cause, message)) => {
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
            assert_eq!((cause, message), (told, format!("{told:?}")));
        }
    }

    #[test]
    fn a_leader_that_goes_on_is_not_held_by_a_rank_that_lost_it() {
        let lost = Err((EngineLossCause::GroupFailed, "the leader is gone".to_owned()));
        assert!(matches!(first_cause([Ok(Next::End), lost].into_iter()), Ok(Next::End)));
    }
}
