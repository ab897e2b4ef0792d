//! Whole runs: what they leave does not depend on how often they were disturbed.

use std::{fs, path::Path};

use incipit_tune::{
    backbone::Backbone,
    checkpoint,
    control::Control,
    engine::Recompute,
    log::{self, Line},
    npy,
    optimizer::OptimizerKind,
    prompt::Prompt,
    recipe::{LossReduction, OptimizerName, Recipe},
    schedule::Schedule,
    spec::{PartialSpec, TrainSpec},
    train::{End, Event, Observer, Outcome, train_on},
};

use crate::support::{Files, StopAfter, backbone, engine, losses, resolve, tree};

fn run(backbone: &Backbone, spec: &TrainSpec) -> Outcome {
    train_on(backbone, spec, &Control::new(), &mut ()).unwrap()
}

fn run_until(backbone: &Backbone, spec: &TrainSpec, step: u64) -> Outcome {
    let control = Control::new();
    train_on(backbone, spec, &control, &mut StopAfter { step, control: &control }).unwrap()
}

fn resuming(spec: &TrainSpec) -> TrainSpec {
    TrainSpec { resume: true, ..spec.clone() }
}

#[test]
fn tuning_lowers_the_loss_and_leaves_every_file() {
    let (files, backbone) = (Files::new(), backbone());
    let spec = resolve(PartialSpec { steps: Some(120), ..files.flags("out") });
    let outcome = run(&backbone, &spec);
    assert_eq!((outcome.end, outcome.step), (End::Steps, 120));
    let losses = losses(&spec.out);
    let mean = |losses: &[f64]| losses.iter().sum::<f64>() / losses.len() as f64;
    let (first, last) = (mean(&losses[..5]), mean(&losses[115..]));
    assert!(last < 0.6 * first, "from {first} to {last}");
    for name in ["run.toml", "metrics.jsonl", "prompt.npy", "adapter/adapter_config.json", "best", "last"] {
        assert!(spec.out.join(name).exists(), "{name}");
    }
    let best = outcome.best.unwrap();
    let kept = checkpoint::load(&spec.out.join("best")).unwrap();
    assert_eq!(kept.state.step, best.step);
    assert_eq!(npy::read(&spec.out.join("prompt.npy")).unwrap(), *kept.trained.prompt().unwrap());
    assert_eq!(Prompt::read(&spec.out.join("adapter")).unwrap(), *kept.trained.prompt().unwrap());
    assert_eq!(TrainSpec::read(&spec.out.join("run.toml")).unwrap(), spec);
}

#[test]
fn a_run_stopped_anywhere_and_resumed_leaves_the_same_bytes() {
    let (files, backbone) = (Files::new(), backbone());
    for recipe in [Recipe::Paper, Recipe::ReleasedCode] {
        // Every checkpoint is kept, so that those made by stopping can be told from the others.
        let flags = |out: &str| PartialSpec { recipe: Some(recipe), keep: Some(100), ..files.flags(out) };
        let undisturbed = resolve(flags(&format!("undisturbed-{recipe}")));
        run(&backbone, &undisturbed);
        let expected = tree(&undisturbed.out);
        for stop in [1, 3, 4, 5, 7, 11, 12, 13, 20, 23] {
            let spec = resolve(flags(&format!("stopped-{recipe}-{stop}")));
            let outcome = run_until(&backbone, &spec, stop);
            assert_eq!((outcome.end, outcome.step), (End::Requested, stop));
            assert_eq!(run(&backbone, &resuming(&spec)).end, End::Steps);
            let extra = format!("checkpoints/step-{stop:08}/");
            let was_due = expected.iter().any(|(name, _)| name.starts_with(&extra));
            let mut left = tree(&spec.out);
            left.retain(|(name, _)| was_due || !name.starts_with(&extra));
            assert_eq!(names(&left), names(&expected), "stopped after {stop}");
            assert!(left == expected, "stopped after {stop}: {:?}", differing(&left, &expected));
        }
    }
}

/// The moment after the last checkpoint was renamed to its place, and before anything pointed to it.
#[test]
fn a_run_killed_right_after_its_last_checkpoint_is_finished_by_resuming() {
    let (files, backbone) = (Files::new(), backbone());
    let spec = resolve(files.flags("out"));
    run(&backbone, &spec);
    let expected = tree(&spec.out);
    let kept = checkpoint::Store::open(&spec.out).unwrap().steps().unwrap();
    let [.., before, last] = kept[..] else { panic!("two checkpoints are kept: {kept:?}") };
    for name in ["last", "best"] {
        let link = spec.out.join(name);
        fs::remove_file(&link).unwrap();
        std::os::unix::fs::symlink(format!("checkpoints/step-{before:08}"), &link).unwrap();
    }
    fs::remove_file(spec.out.join("prompt.npy")).unwrap();
    fs::remove_dir_all(spec.out.join("adapter")).unwrap();
    let outcome = run(&backbone, &resuming(&spec));
    assert_eq!((outcome.end, outcome.step), (End::Steps, last));
    let left = tree(&spec.out);
    assert_eq!(names(&left), names(&expected));
    assert!(left == expected, "{:?}", differing(&left, &expected));
}

fn names(tree: &[(String, Vec<u8>)]) -> Vec<&str> {
    tree.iter().map(|(name, _)| name.as_str()).collect()
}

fn differing<'a>(one: &'a [(String, Vec<u8>)], other: &[(String, Vec<u8>)]) -> Vec<&'a str> {
    one.iter().zip(other).filter(|(a, b)| a != b).map(|(a, _)| a.0.as_str()).collect()
}

/// What a process that is killed leaves: a copy of the directory at a moment of the run.
struct CopyAfter<'a> {
    event: usize,
    seen: usize,
    from: &'a Path,
    to: &'a Path,
}

impl Observer for CopyAfter<'_> {
    fn on(&mut self, _: &Event<'_>) {
        if self.seen == self.event {
            copy(self.from, self.to);
        }
        self.seen += 1;
    }
}

fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let path = entry.unwrap().path();
        let place = to.join(path.file_name().unwrap());
        if path.is_symlink() {
            std::os::unix::fs::symlink(fs::read_link(&path).unwrap(), place).unwrap();
        } else if path.is_dir() {
            copy(&path, &place);
        } else {
            fs::copy(&path, place).unwrap();
        }
    }
}

#[test]
fn a_run_killed_at_any_event_and_resumed_leaves_the_same_bytes() {
    let (files, backbone) = (Files::new(), backbone());
    let undisturbed = files.spec("undisturbed");
    run(&backbone, &undisturbed);
    let expected = tree(&undisturbed.out);
    for event in [1, 2, 3, 5, 6, 9, 14, 20, 27, 33, 38] {
        let (spec, killed) = (files.spec(&format!("run-{event}")), files.path(&format!("killed-{event}")));
        let mut observer = CopyAfter { event, seen: 0, from: &spec.out, to: &killed };
        train_on(&backbone, &spec, &Control::new(), &mut observer).unwrap();
        assert!(observer.seen > event, "only {} events", observer.seen);
        // A line that was being written, and a file that was being put in its place.
        let metrics = killed.join("metrics.jsonl");
        let mut torn = fs::read(&metrics).unwrap();
        torn.extend(b"{\"event\": \"step\", \"st");
        fs::write(&metrics, torn).unwrap();
        fs::create_dir_all(killed.join("checkpoints/.tmp-step-00000099-1")).unwrap();
        let again = TrainSpec { out: killed.clone(), ..resuming(&spec) };
        run(&backbone, &again);
        let left = tree(&killed);
        assert_eq!(names(&left), names(&expected), "killed after event {event}");
        assert!(left == expected, "killed after event {event}: {:?}", differing(&left, &expected));
    }
}

#[test]
fn a_damaged_checkpoint_is_told_and_an_earlier_one_goes_on() {
    let (files, backbone) = (Files::new(), backbone());
    let undisturbed = files.spec("undisturbed");
    run(&backbone, &undisturbed);
    let spec = files.spec("damaged");
    run_until(&backbone, &spec, 14);
    let newest = fs::canonicalize(spec.out.join("last")).unwrap();
    fs::write(newest.join("prompt.safetensors"), b"damaged").unwrap();
    let mut warnings = Warnings::default();
    train_on(&backbone, &resuming(&spec), &Control::new(), &mut warnings).unwrap();
    assert!(
        warnings.0.iter().any(|w| w.contains("step-00000014") && w.contains("prompt.safetensors")),
        "{:?}",
        warnings.0
    );
    for name in ["prompt.npy", "best/prompt.safetensors", "last/optimizer.safetensors", "last/state.json"] {
        let read = |spec: &TrainSpec| fs::read(spec.out.join(name)).unwrap();
        assert!(read(&spec) == read(&undisturbed), "{name}");
    }
}

#[derive(Default)]
struct Warnings(Vec<String>);

impl Observer for Warnings {
    fn on(&mut self, event: &Event<'_>) {
        if let Event::Warning(warning) = event {
            self.0.push((*warning).to_owned());
        }
    }
}

#[test]
fn a_finished_run_goes_on_to_a_later_end_as_if_it_had_never_stopped() {
    let (files, backbone) = (Files::new(), backbone());
    let long = files.spec("long");
    run(&backbone, &long);
    let short = TrainSpec { steps: 12, ..files.spec("short") };
    run(&backbone, &short);
    run(&backbone, &TrainSpec { steps: 24, ..resuming(&short) });
    assert!(tree(&short.out) == tree(&long.out));
}

#[test]
fn threads_microbatches_and_recomputation_leave_the_same_bytes() {
    let files = Files::new();
    let mut trees = Vec::new();
    for (n, (threads, tokens, recompute)) in
        [(1, 30, Recompute::Off), (2, 30, Recompute::On), (3, 10_000, Recompute::Off)].into_iter().enumerate()
    {
        let backbone = Backbone { engine: engine(tokens, recompute), ..backbone() };
        let spec = files.spec(&format!("out-{n}"));
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| run(&backbone, &spec));
        trees.push(tree(&spec.out));
    }
    assert!(trees[0] == trees[1] && trees[0] == trees[2]);
}

#[test]
fn the_best_checkpoint_is_the_earliest_with_the_highest_score_and_patience_counts_from_it() {
    let (files, backbone) = (Files::new(), backbone());
    let flags = |out: &str| PartialSpec {
        steps: Some(400),
        patience: Some(3),
        eval_every: Some(2),
        ..files.flags(out)
    };
    let spec = resolve(flags("out"));
    let outcome = run(&backbone, &spec);
    assert_eq!(outcome.end, End::Patience);
    let eval = |line: Line| match line {
        Line::Eval { step, score, .. } => Some((step, score)),
        Line::Step { .. } => None,
    };
    let lines = log::read(&spec.out.join("metrics.jsonl")).unwrap();
    let evaluations: Vec<(u64, f64)> = lines.into_iter().filter_map(eval).collect();
    let highest = evaluations.iter().map(|(_, score)| *score).fold(f64::MIN, f64::max);
    let (first, _) = *evaluations.iter().find(|(_, score)| *score == highest).unwrap();
    let best = outcome.best.unwrap();
    assert_eq!((best.step, best.score), (first, highest));
    assert_eq!(outcome.step, first + 3 * 2, "three evaluations after the best one");
    assert_eq!(checkpoint::load(&spec.out.join("best")).unwrap().state.step, first);
    // Patience is part of the state: stopped within it and resumed, the run ends at the same step.
    let spec = resolve(flags("stopped"));
    run_until(&backbone, &spec, first + 3);
    let outcome = run(&backbone, &resuming(&spec));
    assert_eq!((outcome.end, outcome.step), (End::Patience, first + 6));
    // And a run that was ended by it stays ended.
    assert_eq!(run(&backbone, &resuming(&spec)).step, first + 6);
    // With more of it the run goes on, and what it had waited for counts.
    let more = TrainSpec { patience: Some(5), ..resuming(&spec) };
    let outcome = run(&backbone, &more);
    let best = outcome.best.unwrap();
    assert!(outcome.step > first + 6);
    assert!(outcome.end == End::Steps || outcome.step == best.step + 5 * 2, "{outcome:?}");
}

#[test]
fn a_stop_during_an_evaluation_is_made_good_on_resume() {
    let (files, backbone) = (Files::new(), backbone());
    let undisturbed = files.spec("undisturbed");
    run(&backbone, &undisturbed);
    let spec = files.spec("stopped");
    // Step 8 is to be evaluated, and the stop is asked for before that.
    run_until(&backbone, &spec, 8);
    let state = checkpoint::load(&spec.out.join("last")).unwrap().state;
    assert_eq!((state.step, state.evaluated), (8, 4));
    run(&backbone, &resuming(&spec));
    let metrics =
        |spec: &TrainSpec| tree(&spec.out).into_iter().find(|(name, _)| name == "metrics.jsonl").unwrap();
    assert_eq!(metrics(&spec), metrics(&undisturbed));
}

#[test]
fn without_an_evaluation_file_the_last_prompt_is_shown() {
    let (files, backbone) = (Files::new(), backbone());
    let spec = TrainSpec { eval: None, ..files.spec("out") };
    let outcome = run(&backbone, &spec);
    assert_eq!(outcome.best, None);
    let last = checkpoint::load(&spec.out.join("last")).unwrap();
    assert_eq!(last.state.step, 24);
    assert_eq!(npy::read(&outcome.trained.unwrap()).unwrap(), *last.trained.prompt().unwrap());
    assert!(!spec.out.join("best").exists());
}

#[test]
fn old_checkpoints_go_and_the_best_stays() {
    let (files, backbone) = (Files::new(), backbone());
    let spec = resolve(PartialSpec { keep: Some(2), ..files.flags("out") });
    let best = run(&backbone, &spec).best.unwrap().step;
    let mut steps: Vec<String> = fs::read_dir(spec.out.join("checkpoints"))
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    steps.sort();
    assert!((2..=3).contains(&steps.len()), "{steps:?}");
    assert!(
        steps.contains(&format!("step-{best:08}")) && steps.contains(&"step-00000024".to_owned()),
        "{steps:?}"
    );
}

#[test]
fn the_seed_and_the_recipe_decide_the_prompt() {
    let (files, backbone) = (Files::new(), backbone());
    let last = |name: &str, change: PartialSpec| {
        let spec = resolve(change.over(files.flags(name)));
        run(&backbone, &spec);
        checkpoint::load(&spec.out.join("last")).unwrap().trained
    };
    let plain = last("plain", PartialSpec::default());
    assert_eq!(last("again", PartialSpec::default()), plain);
    let changes = [
        PartialSpec { seed: Some(1), ..Default::default() },
        PartialSpec { recipe: Some(Recipe::ReleasedCode), ..Default::default() },
        PartialSpec { shuffle: Some(false), ..Default::default() },
        PartialSpec { optimizer: Some(OptimizerName::AdamW), ..Default::default() },
        PartialSpec { optimizer: Some(OptimizerName::Sgd), ..Default::default() },
        PartialSpec { schedule: Some(Schedule::Cosine), ..Default::default() },
        PartialSpec { dropout: Some(0.3), ..Default::default() },
        PartialSpec { prompt_init: Some("uniform".to_owned()), ..Default::default() },
    ];
    for (n, change) in changes.into_iter().enumerate() {
        assert_ne!(last(&format!("changed-{n}"), change.clone()), plain, "{change:?}");
    }
}

#[test]
fn the_released_codes_recipe_is_what_its_files_say() {
    let files = Files::new();
    let spec = resolve(PartialSpec {
        recipe: Some(Recipe::ReleasedCode),
        prompt_init: Some("uniform".to_owned()),
        ..files.flags("out")
    });
    assert_eq!((spec.dropout, spec.z_loss, spec.loss), (0.1, 1e-4, LossReduction::Sum));
    assert_eq!(spec.optimizer_kind(), OptimizerKind::adafactor(1e-5, 1_100_000));
    assert_eq!(spec.prompt_init.to_string(), "uniform:0,0.5");
    let paper = resolve(PartialSpec { prompt_init: Some("uniform".to_owned()), ..files.flags("out") });
    assert_eq!((paper.dropout, paper.z_loss, paper.loss), (0.0, 0.0, LossReduction::Mean));
    assert_eq!(paper.optimizer_kind(), OptimizerKind::adafactor(1e-5, 0));
    assert_eq!(paper.prompt_init.to_string(), "uniform:-0.5,0.5");
}
