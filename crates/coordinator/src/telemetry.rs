//! What is counted for Prometheus.

use std::{collections::BTreeMap, fmt, time::Duration};

use incipit_proto::v1::{BackboneState, JobState, WorkerState, metric_point::Point};
use prometheus_client::{
    encoding::text::encode,
    metrics::{
        counter::Counter,
        family::Family,
        gauge::Gauge,
        histogram::{Histogram, exponential_buckets},
    },
    registry::{Registry, Unit},
};

use crate::core::{
    effects::{Change, Resource},
    rows::Rows,
};

type Labels = [(&'static str, String); 1];
type Gauges = Family<Labels, Gauge>;

/// The counters of a coordinator.
pub struct Telemetry {
    registry: Registry,
    jobs: Gauges,
    backbones: Gauges,
    ranks: Gauges,
    ranks_wanted: Gauges,
    workers: Gauges,
    revision: Gauge,
    commits: Histogram,
    queue_wait: Histogram,
    steps: Counter,
}

impl fmt::Debug for Telemetry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Telemetry").finish_non_exhaustive()
    }
}

impl Default for Telemetry {
    fn default() -> Self {
        let this = Self {
            registry: Registry::with_prefix("incipit"),
            jobs: Family::default(),
            backbones: Family::default(),
            ranks: Family::default(),
            ranks_wanted: Family::default(),
            workers: Family::default(),
            revision: Gauge::default(),
            commits: Histogram::new(exponential_buckets(0.000_25, 2.0, 14)),
            queue_wait: Histogram::new(exponential_buckets(0.1, 4.0, 10)),
            steps: Counter::default(),
        };
        this.registered()
    }
}

impl Telemetry {
    fn registered(mut self) -> Self {
        let registry = &mut self.registry;
        registry.register("jobs", "Jobs, by state", self.jobs.clone());
        registry.register("backbone_ready", "1 where all ranks have loaded, else 0", self.backbones.clone());
        registry.register("backbone_ranks_ready", "Ranks that have loaded", self.ranks.clone());
        let help = "Ranks that it is to have, where there is room for all of its replicas";
        registry.register("backbone_ranks_wanted", help, self.ranks_wanted.clone());
        registry.register("workers", "Workers, by state", self.workers.clone());
        registry.register("revision", "Newest revision", self.revision.clone());
        let help = "How long it takes until a batch of changes is on the disk";
        registry.register_with_unit("commit", help, Unit::Seconds, self.commits.clone());
        let help = "How long jobs wait until they run";
        registry.register_with_unit("queue_wait", help, Unit::Seconds, self.queue_wait.clone());
        registry.register("steps", "Training steps of all jobs", self.steps.clone());
        self
    }

    /// Counts what was committed.
    pub fn committed(&self, changes: &[Change], duration: Duration) {
        self.commits.observe(duration.as_secs_f64());
        for change in changes {
            match change {
                Change::AppendMetrics(_, points) => {
                    let steps = points.iter().filter(|point| matches!(point.point, Some(Point::Training(_))));
                    self.steps.inc_by(steps.count() as u64);
                }
                Change::Put(stamp, Resource::Job(job)) => {
                    let began = job.open_attempt().filter(|attempt| attempt.start_time == stamp.time);
                    if let Some(attempt) = began {
                        // One that was thrown off keeps its place of before, and did not wait while it ran.
                        let before =
                            job.attempts.iter().rev().nth(1).and_then(|attempt| attempt.end.as_ref());
                        let since = before.map_or(job.enqueue_time, |end| end.time.max(job.enqueue_time));
                        let waited = Duration::from_millis(attempt.start_time.since(since));
                        self.queue_wait.observe(waited.as_secs_f64());
                    }
                }
                _ => {}
            }
        }
    }

    /// The text that Prometheus reads.
    #[must_use]
    pub fn text(&self, snapshot: &Snapshot) -> String {
        fill(&self.jobs, "state", &snapshot.jobs);
        fill(&self.backbones, "backbone", &snapshot.backbones);
        fill(&self.ranks, "backbone", &snapshot.ranks);
        fill(&self.ranks_wanted, "backbone", &snapshot.ranks_wanted);
        fill(&self.workers, "state", &snapshot.workers);
        self.revision.set(snapshot.revision.cast_signed());
        let mut text = String::new();
        if encode(&mut text, &self.registry).is_err() {
            text.clear(); // Writing to a string does not fail.
        }
        text
    }
}

fn fill(gauges: &Gauges, label: &'static str, values: &BTreeMap<String, i64>) {
    gauges.clear();
    for (name, value) in values {
        gauges.get_or_create(&[(label, name.clone())]).set(*value);
    }
}

/// What is counted when somebody looks.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Snapshot {
    jobs: BTreeMap<String, i64>,
    backbones: BTreeMap<String, i64>,
    ranks: BTreeMap<String, i64>,
    ranks_wanted: BTreeMap<String, i64>,
    workers: BTreeMap<String, i64>,
    revision: u64,
    /// What is not as it should be, a line each.
    pub ills: Vec<String>,
}

impl Snapshot {
    /// Counts.
    #[must_use]
    pub fn of(rows: &Rows) -> Self {
        let mut this = Self { revision: rows.revision, ..Self::default() };
        let states = [
            JobState::Queued,
            JobState::Running,
            JobState::Paused,
            JobState::Succeeded,
            JobState::Failed,
            JobState::Cancelled,
        ];
        this.jobs.extend(states.map(|state| (word(state.as_str_name(), "JOB_STATE_"), 0)));
        let states = [WorkerState::Online, WorkerState::Draining, WorkerState::Lost];
        this.workers.extend(states.map(|state| (word(state.as_str_name(), "WORKER_STATE_"), 0)));
        for job in rows.jobs.values() {
            *this.jobs.entry(word(job.state.as_str_name(), "JOB_STATE_")).or_default() += 1;
        }
        for worker in rows.workers.values() {
            *this.workers.entry(word(worker.state.as_str_name(), "WORKER_STATE_")).or_default() += 1;
        }
        for backbone in rows.backbones.values() {
            let ready = backbone.ranks.iter().filter(|rank| rank.ready && !rank.lost).count();
            let wanted = (backbone.dp() * backbone.spec.tp) as usize;
            let serves = backbone.state == BackboneState::Ready && ready == wanted;
            let id = backbone.name.id().to_owned();
            if !serves {
                let state = word(backbone.state.as_str_name(), "BACKBONE_STATE_");
                let line =
                    format!("{}: {state}, {ready} of {wanted} ranks: {}", backbone.name, backbone.message);
                this.ills.push(line);
            }
            this.backbones.insert(id.clone(), i64::from(serves));
            this.ranks_wanted.insert(id.clone(), i64::from(backbone.spec.num_ranks()));
            this.ranks.insert(id, i64::try_from(ready).unwrap_or(i64::MAX));
        }
        this
    }
}

fn word(name: &str, prefix: &str) -> String {
    name.strip_prefix(prefix).unwrap_or(name).to_ascii_lowercase()
}
