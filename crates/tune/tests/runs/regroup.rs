//! A rank is lost: the others keep their weights, join a new group, and go on as if nothing had happened.

use std::{
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
};

use candle_core::Device;
use incipit_collective::{Axis, Mesh, Options, Ranks, local};
use incipit_model::{Example, Microbatch};
use incipit_tune::{
    Error, Result,
    backbone::{Backbone, Opened, Part},
    checkpoint::Checkpoint,
    engine::{Engine, EngineOptions, Recompute},
    ranks::on_threads,
    spec::{PartialSpec, Precision, TrainSpec},
    task::Task,
    tenant::{Due, Tenant},
};

use crate::support;

pub(crate) fn demo(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../demo").join(name)
}

const OPTIONS: EngineOptions = EngineOptions { microbatch_tokens: Some(4000), recompute: Recompute::Off };

/// This rank's part of the model, loaded by itself.
fn part(ranks: &Ranks) -> Result<Part> {
    Opened::at(&demo("model"), "demo", Precision::Bf16, Device::Cpu)?.part(ranks.shard(Axis::Tensor))
}

fn spec() -> TrainSpec {
    support::resolve(PartialSpec {
        model: Some("demo".to_owned()),
        train: Some(demo("data/train.jsonl")),
        out: Some("nothing is written".into()),
        prompt_length: Some(6),
        batch_size: Some(8),
        max_input_length: Some(40),
        steps: Some(7),
        checkpoint_every: Some(2),
        ..PartialSpec::default()
    })
}

fn task(backbone: &Backbone) -> Result<Task> {
    Task::load(&spec(), &backbone.tokenizer, backbone.config().vocab_size)
}

/// Carries a job on to its end, or until it has made `until` steps; its last checkpoint.
fn carry_on(backbone: &Backbone, tenant: &mut Tenant, until: u64) -> Result<Option<Checkpoint>> {
    let mut last = None;
    while tenant.num_steps() < until || tenant.due() != Due::Step {
        match tenant.due() {
            Due::Step => tenant.step(backbone).map(|_| ())?,
            Due::Checkpoint => last = Some(tenant.checkpoint()),
            Due::End(_) => break,
            Due::Evaluate => unreachable!("there is nothing to evaluate on"),
        }
    }
    Ok(last)
}

fn undisturbed(mesh: Mesh) -> Vec<Vec<u8>> {
    let results = on_threads(mesh, None, &Options::default(), |ranks| {
        let backbone = part(&ranks)?.meet(OPTIONS, &Arc::new(ranks))?;
        let mut tenant = Tenant::start(&backbone, &spec(), task(&backbone)?)?;
        carry_on(&backbone, &mut tenant, u64::MAX)?.expect("a checkpoint at the end").to_bytes()
    });
    results.into_iter().collect::<Result<_>>().unwrap()
}

/// Half of a step: what the encoder exchanges.
fn half_a_step(engine: &Engine, tenant: &Tenant) {
    let batch = tenant.batch().unwrap();
    let examples = batch.examples.iter().zip(&batch.keys);
    let examples: Vec<Example<'_>> = examples
        .map(|(example, key)| Example {
            prompt: Some(0),
            input: &example.input,
            target: &example.target,
            key: *key,
        })
        .collect();
    let prompts = [batch.prompt.clone()];
    engine.model().encoded(&Microbatch { prompts: &prompts, examples: &examples }).unwrap();
}

/// A rank of the second group, for each rank of the first.
struct Second(Mutex<Vec<Option<Ranks>>>);

impl Second {
    fn of(mesh: Mesh) -> Self {
        let ranks = local::ranks(mesh, &Options { epoch: 1, ..Options::default() });
        Self(Mutex::new(ranks.into_iter().map(Some).collect()))
    }

    fn take(&self, rank: usize) -> Arc<Ranks> {
        Arc::new(self.0.lock().unwrap()[rank].take().unwrap())
    }
}

/// The last rank aborts the group in the middle of the fourth step. It goes on with its weights as all others do, or begins anew.
fn disturbed(mesh: Mesh, begins_anew: bool) -> Vec<Vec<u8>> {
    let second = Second::of(mesh);
    let results = on_threads(mesh, None, &Options::default(), |ranks| {
        let ranks = Arc::new(ranks);
        let (rank, aborts) = (ranks.rank(), ranks.rank() + 1 == mesh.world());
        let mut part = part(&ranks)?;
        let backbone = part.meet(OPTIONS, &ranks)?;
        let mut tenant = Tenant::start(&backbone, &spec(), task(&backbone)?)?;
        let last = carry_on(&backbone, &mut tenant, 3)?.expect("a checkpoint after two steps").to_bytes()?;
        if aborts {
            half_a_step(&backbone.engine, &tenant);
            ranks.abort("as the test asks");
        } else {
            let error = tenant.step(&backbone).expect_err("the step cannot be made");
            assert!(error.is_echo() && error.to_string().contains("as the test asks"), "{error}");
        }
        assert_eq!(tenant.num_steps(), 3);
        let old = Arc::downgrade(&ranks);
        drop((ranks, backbone));
        let ranks = second.take(rank);
        if aborts && begins_anew {
            part = self::part(&ranks)?;
        }
        let backbone = part.meet(OPTIONS, &ranks)?;
        assert!(old.upgrade().is_none(), "somebody holds on to the old group");
        let earlier = Checkpoint::from_bytes(&last)?;
        assert_eq!(earlier.state.step, 2);
        let mut tenant = Tenant::resume(&backbone, &spec(), task(&backbone)?, &earlier)?;
        carry_on(&backbone, &mut tenant, u64::MAX)?.expect("a checkpoint at the end").to_bytes()
    });
    results.into_iter().collect::<Result<_>>().unwrap()
}

#[test]
fn a_group_aborted_in_a_step_is_followed_by_another_that_ends_in_the_same_bytes() {
    for (tp, dp) in [(2, 1), (1, 2)] {
        let mesh = Mesh::new(tp, dp, 2).unwrap();
        let expected = undisturbed(mesh);
        assert!(expected[0] == expected[1], "tp {tp}, dp {dp}: the ranks differ");
        for begins_anew in [false, true] {
            assert!(disturbed(mesh, begins_anew) == expected, "tp {tp}, dp {dp}, anew {begins_anew}");
        }
    }
}

#[test]
fn a_group_that_is_lost_while_it_is_joined_is_followed_by_yet_another() {
    let mesh = Mesh::new(2, 1, 2).unwrap();
    let (lost, third) = (Second::of(mesh), Second::of(mesh));
    let results = on_threads(mesh, None, &Options::default(), |ranks| {
        let ranks = Arc::new(ranks);
        let rank = ranks.rank();
        let mut part = part(&ranks)?;
        // Rank 1 leaves it before it is met.
        let lost = lost.take(rank);
        if rank == 0 {
            let error = part.meet(OPTIONS, &lost).err().expect("rank 1 is not there");
            assert!(matches!(error, Error::Collective(_)), "{error}");
        }
        drop(lost);
        let backbone = part.meet(OPTIONS, &third.take(rank))?;
        let mut tenant = Tenant::start(&backbone, &spec(), task(&backbone)?)?;
        carry_on(&backbone, &mut tenant, u64::MAX)?.expect("a checkpoint at the end").to_bytes()
    });
    assert!(results.into_iter().collect::<Result<Vec<_>>>().unwrap() == undisturbed(mesh));
}

#[test]
fn a_group_in_which_the_rank_has_another_part_is_refused() {
    let mesh = Mesh::new(2, 1, 2).unwrap();
    let results = on_threads(mesh, None, &Options::default(), |ranks| {
        let ranks = Arc::new(ranks);
        let mut part = part(&ranks)?;
        let others = [(mesh, 1 - ranks.rank()), (Mesh::new(1, 2, 2)?, ranks.rank())];
        for (mesh, rank) in others {
            let error = part.meet(OPTIONS, &Second::of(mesh).take(rank)).err().expect("another part");
            assert!(matches!(error, Error::Regroup { .. }), "{error}");
            let message = error.to_string();
            let place = format!("would have part {} of {} here", rank % mesh.tp(), mesh.tp());
            assert!(message.contains(&place), "{message}");
        }
        // And it can still join the right one, one at a time.
        let backbone = part.meet(OPTIONS, &ranks)?;
        let error =
            part.meet(OPTIONS, &Second::of(mesh).take(ranks.rank())).err().expect("two groups at once");
        assert!(matches!(error, Error::Regroup { .. }), "{error}");
        let mut tenant = Tenant::start(&backbone, &spec(), task(&backbone)?)?;
        tenant.step(&backbone)
    });
    results.into_iter().collect::<Result<Vec<_>>>().unwrap();
}

#[test]
fn a_run_goes_on_with_fewer_replicas_and_with_more_again_to_the_same_bytes() {
    let two = Mesh::new(1, 2, 2).unwrap();
    let (alone, both) = (Second::of(Mesh::new(1, 1, 1).unwrap()), Second::of(two));
    let last = Mutex::new(Vec::new());
    let resumed = |backbone: &Backbone, from: &[u8]| {
        Tenant::resume(backbone, &spec(), task(backbone)?, &Checkpoint::from_bytes(from)?)
    };
    let results = on_threads(two, None, &Options::default(), |ranks| {
        let ranks = Arc::new(ranks);
        let rank = ranks.rank();
        let mut part = part(&ranks)?;
        let backbone = part.meet(OPTIONS, &ranks)?;
        let mut tenant = Tenant::start(&backbone, &spec(), task(&backbone)?)?;
        let after_two =
            carry_on(&backbone, &mut tenant, 3)?.expect("a checkpoint after two steps").to_bytes()?;
        ranks.abort("replica 1 is lost");
        drop((ranks, backbone));
        let ranks = both.take(rank);
        if rank == 0 {
            let backbone = part.meet(OPTIONS, &alone.take(0))?;
            let mut tenant = resumed(&backbone, &after_two)?;
            let checkpoint = carry_on(&backbone, &mut tenant, 5)?.expect("a checkpoint after four steps");
            *last.lock().unwrap() = checkpoint.to_bytes()?;
        } else {
            part = self::part(&ranks)?;
        }
        let backbone = part.meet(OPTIONS, &ranks)?;
        let after_four = last.lock().unwrap().clone();
        let mut tenant = resumed(&backbone, &after_four)?;
        carry_on(&backbone, &mut tenant, u64::MAX)?.expect("a checkpoint at the end").to_bytes()
    });
    assert!(results.into_iter().collect::<Result<Vec<_>>>().unwrap() == undisturbed(two));
}
