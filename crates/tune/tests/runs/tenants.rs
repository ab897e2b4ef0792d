//! Jobs that are carried on by turns over one backbone end as if each had had it for itself.

use std::collections::BTreeMap;

use incipit_kernels::rng::Philox;
use incipit_tune::{
    backbone::Backbone,
    checkpoint::{self, Best, Checkpoint},
    control::Control,
    evaluate::{Evaluation, PartialEvaluation},
    job::Update,
    recipe::{OptimizerName, Recipe},
    spec::{PartialSpec, TrainSpec},
    task::Task,
    tenant::{Due, End, Tenant},
    train::{Event, Observer, train_on},
};

use crate::support::{Files, backbone, resolve};

/// Of the order of the turns.
const SEED: u64 = 7;

/// What a job did, as far as anybody could see.
#[derive(Default, Debug, PartialEq)]
struct Seen {
    updates: Vec<Update>,
    evaluations: Vec<(u64, Evaluation, bool)>,
    checkpoints: Vec<u64>,
    end: Option<(End, Option<Best>)>,
}

impl Observer for Seen {
    fn on(&mut self, event: &Event<'_>) {
        match event {
            Event::Step { update, .. } => self.updates.push((*update).clone()),
            Event::Evaluated { step, evaluation, best, .. } => {
                self.evaluations.push((*step, (*evaluation).clone(), *best));
            }
            Event::Checkpointed { step, .. } => self.checkpoints.push(*step),
            Event::Finished(outcome) => self.end = Some((outcome.end, outcome.best)),
            Event::Loading(_) | Event::Loaded(_) | Event::Warning(_) => {}
        }
    }
}

/// What `train` makes of it, and its last checkpoint as bytes.
fn trained_alone(backbone: &Backbone, spec: &TrainSpec) -> (Seen, Vec<u8>) {
    let mut seen = Seen::default();
    train_on(backbone, spec, &Control::new(), &mut seen).unwrap();
    let last = checkpoint::load(&spec.out.join("last")).unwrap();
    (seen, last.to_bytes().unwrap())
}

fn task(backbone: &Backbone, spec: &TrainSpec) -> Task {
    Task::load(spec, &backbone.tokenizer, backbone.config().vocab_size).unwrap()
}

/// A tenant with what it left.
struct Carried {
    tenant: Tenant,
    evaluation: Option<PartialEvaluation>,
    seen: Seen,
    saved: BTreeMap<u64, Vec<u8>>,
}

impl Carried {
    fn new(tenant: Tenant) -> Self {
        Self { tenant, evaluation: None, seen: Seen::default(), saved: BTreeMap::new() }
    }

    fn steps_next(&self) -> bool {
        self.tenant.due() == Due::Step
    }

    fn step(&self) -> u64 {
        self.tenant.num_steps()
    }

    /// Does what is due, unless it is a step: of an evaluation one round.
    fn turn(&mut self, backbone: &Backbone) {
        match self.tenant.due() {
            Due::Evaluate => {
                let mut evaluation =
                    self.evaluation.take().unwrap_or_else(|| self.tenant.evaluation(backbone).unwrap());
                let engine = self.tenant.engine(backbone);
                assert!(evaluation.next_cost() > 0);
                if evaluation.advance(engine).unwrap() {
                    let evaluation = evaluation.finish(engine, &backbone.tokenizer).unwrap();
                    let best = self.tenant.evaluated(&evaluation);
                    self.seen.evaluations.push((self.step(), evaluation, best));
                } else {
                    self.evaluation = Some(evaluation);
                }
            }
            Due::Checkpoint => {
                let checkpoint = self.tenant.checkpoint();
                assert!(self.tenant.is_saved());
                self.seen.checkpoints.push(self.step());
                self.saved.insert(self.step(), checkpoint.to_bytes().unwrap());
            }
            Due::End(end) => self.seen.end = Some((end, self.tenant.best())),
            Due::Step => {}
        }
    }

    fn last(&self) -> &[u8] {
        self.saved.last_key_value().unwrap().1
    }
}

/// Steps of those whose turn it is go through the backbone together.
fn carry_on_together(backbone: &Backbone, jobs: &mut [Carried]) {
    let mut random = Philox::new(SEED, &[jobs.len() as u64]);
    while jobs.iter().any(|job| job.seen.end.is_none()) {
        jobs.iter_mut().for_each(|job| {
            if random.uniform() < 0.6 {
                job.turn(backbone);
            }
        });
        let mut stepping: Vec<&mut Carried> =
            jobs.iter_mut().filter(|job| job.steps_next() && random.uniform() < 0.6).collect();
        let batches: Vec<_> = stepping.iter().map(|job| job.tenant.batch().unwrap()).collect();
        let gradients = backbone.engine.gradients(&batches).unwrap();
        for (job, gradient) in stepping.iter_mut().zip(gradients) {
            let update = job.tenant.stepped(gradient).unwrap();
            job.seen.updates.push(update);
        }
    }
}

/// Jobs that differ in what decides their turns; one is ended by its patience, one has nothing to evaluate on.
fn specs(files: &Files) -> Vec<TrainSpec> {
    let odd = PartialSpec {
        recipe: Some(Recipe::ReleasedCode),
        steps: Some(19),
        eval_every: Some(5),
        seed: Some(3),
        prompt_length: Some(9),
        ..PartialSpec::default()
    };
    let impatient = PartialSpec {
        steps: Some(400),
        patience: Some(2),
        eval_every: Some(3),
        optimizer: Some(OptimizerName::AdamW),
        ..PartialSpec::default()
    };
    let specs = [("plain", PartialSpec::default()), ("odd", odd), ("impatient", impatient)];
    let mut specs: Vec<_> =
        specs.map(|(out, change)| resolve(change.over(files.flags(out)))).into_iter().collect();
    specs.push(TrainSpec { eval: None, ..files.spec("unevaluated") });
    specs
}

#[test]
fn jobs_carried_on_by_turns_end_in_the_bytes_of_train() {
    println!("seed {SEED}");
    let (files, backbone) = (Files::new(), backbone());
    let specs = specs(&files);
    let start = |spec| Carried::new(Tenant::start(&backbone, spec, task(&backbone, spec)).unwrap());
    for count in [2, specs.len()] {
        let mut jobs: Vec<Carried> = specs[..count].iter().map(start).collect();
        carry_on_together(&backbone, &mut jobs);
        for (job, spec) in jobs.iter().zip(&specs) {
            let again =
                TrainSpec { out: files.path(&format!("{}-{count}", spec.out.display())), ..spec.clone() };
            let (seen, last) = trained_alone(&backbone, &again);
            assert_eq!(job.seen, seen, "{}", spec.out.display());
            assert!(job.last() == last, "{}", spec.out.display());
        }
    }
}

#[test]
fn a_tenant_goes_on_from_the_bytes_of_any_checkpoint_and_of_its_task() {
    let (files, backbone) = (Files::new(), backbone());
    for spec in specs(&files) {
        let task = task(&backbone, &spec);
        let mut whole = [Carried::new(Tenant::start(&backbone, &spec, task.clone()).unwrap())];
        carry_on_together(&backbone, &mut whole);
        let [whole] = whole;
        let bytes = task.to_bytes();
        for (step, saved) in &whole.saved {
            let (task, earlier) = (Task::from_bytes(&bytes).unwrap(), Checkpoint::from_bytes(saved).unwrap());
            let mut resumed = [Carried::new(Tenant::resume(&backbone, &spec, task, &earlier).unwrap())];
            assert!(resumed[0].tenant.is_saved());
            carry_on_together(&backbone, &mut resumed);
            let [resumed] = resumed;
            let later = whole.seen.evaluations.iter().filter(|(at, ..)| at > step);
            assert!(later.eq(&resumed.seen.evaluations), "from step {step}");
            assert_eq!(resumed.seen.end, whole.seen.end);
            assert!(resumed.saved.iter().all(|(at, bytes)| whole.saved[at] == *bytes), "from step {step}");
        }
    }
}

/// A backbone hands tenants from thread to thread, and data are loaded on others.
#[test]
fn tenants_and_their_parts_may_move_between_threads() {
    fn moves<T: Send + 'static>() {}
    moves::<Tenant>();
    moves::<PartialEvaluation>();
    moves::<Task>();
    moves::<Backbone>();
}

/// Another rank has no file to begin with: the task brings the prompt along.
#[test]
fn a_prompt_from_a_file_travels_with_the_task() {
    let (files, backbone) = (Files::new(), backbone());
    let prompt = incipit_tune::prompt::Prompt::new(5, 16, (0..80).map(|i| i as f32).collect()).unwrap();
    let path = files.path("first.npy");
    incipit_tune::npy::write(&path, &prompt).unwrap();
    let init = Some(format!("file:{}", path.display()));
    let spec = resolve(PartialSpec { prompt_init: init.clone(), ..files.flags("out") });
    let bytes = task(&backbone, &spec).to_bytes();
    std::fs::remove_file(&path).unwrap();
    let received = Task::from_bytes(&bytes).unwrap();
    let tenant = Tenant::start(&backbone, &spec, received.clone()).unwrap();
    assert_eq!(*tenant.prompt().unwrap(), prompt);
    let longer = resolve(PartialSpec { prompt_init: init, prompt_length: Some(6), ..files.flags("out") });
    let refused = Tenant::start(&backbone, &longer, received).err().unwrap().to_string();
    assert!(refused.contains("first.npy") && refused.contains("--prompt-length 5"), "{refused}");
    // Without the file nothing can be loaded, unless the job has begun.
    let load = |spec: &TrainSpec| Task::load(spec, &backbone.tokenizer, backbone.config().vocab_size);
    assert!(load(&spec).is_err());
    assert_eq!(load(&TrainSpec { resume: true, ..spec }).unwrap().initial, None);
}

#[test]
fn nothing_is_evaluated_without_examples_and_other_jobs_checkpoints_are_refused() {
    let (files, backbone) = (Files::new(), backbone());
    let spec = TrainSpec { eval: None, ..files.spec("out") };
    let task = task(&backbone, &spec);
    let mut tenant = Tenant::start(&backbone, &spec, task.clone()).unwrap();
    assert!(tenant.evaluation(&backbone).is_err());
    let earlier = tenant.checkpoint();
    let resume = |spec: &TrainSpec, task: &Task, earlier: &Checkpoint| {
        Tenant::resume(&backbone, spec, task.clone(), earlier).err().map(|error| error.to_string())
    };
    assert_eq!(resume(&spec, &task, &earlier), None);
    let other = |change: fn(&mut Checkpoint)| {
        let mut other = earlier.clone();
        change(&mut other);
        other
    };
    let backbone = other(|earlier| earlier.state.backbone = "cd".repeat(32));
    assert!(resume(&spec, &task, &backbone).unwrap().contains("--allow-other-backbone"));
    let data = Task { train_hash: "other".to_owned(), ..task.clone() };
    assert!(resume(&spec, &data, &earlier).unwrap().contains("train.jsonl has changed"));
    let seed = TrainSpec { seed: 5, ..spec };
    assert!(resume(&seed, &task, &earlier).unwrap().contains("another specification"));
}
