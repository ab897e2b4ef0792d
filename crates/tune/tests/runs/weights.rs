//! Runs that train something else than a soft prompt: what they leave does not depend on how often they were disturbed, and other ranks
//! come to nearly the same.

use std::path::{Path, PathBuf};

use incipit_collective::Options;
use incipit_tune::{
    Error,
    backbone::Backbone,
    checkpoint,
    control::Control,
    engine::{EngineOptions, Recompute},
    evaluate::{EvalOptions, evaluate},
    optimizer::NamedTensor,
    prompt::Prompt,
    spec::{Method, PartialSpec, Precision, TrainSpec},
    task::Task,
    train::{Outcome, train, train_on},
    trained::Trained,
};

use crate::support::{Last, StopAfter, losses, resolve, tree};

const METHODS: [Method; 3] = [Method::Model, Method::Adapter, Method::Prefix];

fn demo(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../demo").join(name)
}

fn load(model: &Path) -> Backbone {
    let options = EngineOptions { microbatch_tokens: Some(300), recompute: Recompute::Off };
    Backbone::load(&model.display().to_string(), Precision::F32, options).unwrap()
}

/// A short run into `out`, on some of the demonstration's data, evaluated on few.
fn flags(method: Method, out: &Path) -> PartialSpec {
    let eval = out.with_file_name("eval.jsonl");
    let all = std::fs::read_to_string(demo("data/eval.jsonl")).unwrap();
    if out.is_absolute() {
        std::fs::write(&eval, all.split_inclusive('\n').take(24).collect::<String>()).unwrap();
    }
    PartialSpec {
        model: Some(demo("model").display().to_string()),
        method: Some(method),
        dtype: Some(Precision::F32),
        train: Some(demo("data/train.jsonl")),
        eval: Some(eval),
        out: Some(out.to_owned()),
        prompt_length: Some(4),
        adapter_width: (method == Method::Adapter).then_some(8),
        candidates: (method == Method::Search).then_some(4),
        batch_size: Some(8),
        max_input_length: Some(32),
        steps: Some(6),
        eval_every: Some(6),
        checkpoint_every: Some(2),
        keep: Some(10),
        microbatch_tokens: Some(300),
        ..PartialSpec::default()
    }
}

fn run(backbone: &Backbone, spec: &TrainSpec) -> Outcome {
    train_on(backbone, spec, &Control::new(), &mut ()).unwrap()
}

#[test]
fn a_run_stopped_and_resumed_leaves_the_same_bytes() {
    let (dir, backbone) = (tempfile::tempdir().unwrap(), load(&demo("model")));
    for method in METHODS.into_iter().chain([Method::Search]) {
        let undisturbed = resolve(flags(method, &dir.path().join(format!("{method}"))));
        run(&backbone, &undisturbed);
        let spec = resolve(flags(method, &dir.path().join(format!("{method}-stopped"))));
        let control = Control::new();
        train_on(&backbone, &spec, &control, &mut StopAfter { step: 4, control: &control }).unwrap();
        run(&backbone, &TrainSpec { resume: true, ..spec.clone() });
        let (expected, left) = (tree(&undisturbed.out), tree(&spec.out));
        let names =
            |tree: &[(String, Vec<u8>)]| tree.iter().map(|(name, _)| name.clone()).collect::<Vec<_>>();
        assert_eq!(names(&left), names(&expected), "{method}");
        let differing: Vec<_> =
            left.iter().zip(&expected).filter(|(a, b)| a != b).map(|(a, _)| &a.0).collect();
        assert!(differing.is_empty(), "{method}: {differing:?}");
    }
}

#[test]
fn training_lowers_the_loss_and_what_is_left_computes_what_the_run_measured() {
    let (dir, backbone) = (tempfile::tempdir().unwrap(), load(&demo("model")));
    for method in METHODS {
        let out = dir.path().join(method.to_string());
        let spec = resolve(PartialSpec { steps: Some(24), eval_every: Some(24), ..flags(method, &out) });
        let mut last = Last::default();
        let outcome = train_on(&backbone, &spec, &Control::new(), &mut last).unwrap();
        let losses = losses(&out);
        let mean = |losses: &[f64]| losses.iter().sum::<f64>() / losses.len() as f64;
        let (first, end) = (mean(&losses[..5]), mean(&losses[19..]));
        assert!(end < 0.8 * first, "{method}: from {first} to {end}");

        let mut again = load(&if method == Method::Model { out.join("model") } else { demo("model") });
        if method != Method::Model {
            let Trained::Weights(weights) = Trained::read(&out).unwrap() else {
                panic!("weights were trained")
            };
            again.engine = again.engine_with(&weights).unwrap();
        }
        let task = Task::load(&spec, &again.tokenizer, again.config().vocab_size).unwrap();
        let options = EvalOptions {
            metrics: spec.metrics.clone(),
            labels: task.labels.clone(),
            max_new_tokens: task.max_new_tokens,
            ..EvalOptions::default()
        };
        let set = task.eval.unwrap();
        let evaluation =
            evaluate(&again.engine, None, &set, &again.tokenizer, &options, &Control::new()).unwrap();
        assert_eq!(Some(evaluation), last.0, "{method}: {:?}", outcome.trained);
    }
}

#[test]
fn ranks_that_share_the_work_come_to_nearly_the_same() {
    let dir = tempfile::tempdir().unwrap();
    for method in METHODS {
        let losses_of = |name: &str, tp: usize, dp: usize| {
            let out = dir.path().join(format!("{method}-{name}"));
            let spec = resolve(PartialSpec { tp: Some(tp), dp: Some(dp), ..flags(method, &out) });
            train(&spec, &Options::default(), &Control::new(), &mut ()).unwrap();
            losses(&out)
        };
        let alone = losses_of("alone", 1, 1);
        for (name, tp, dp) in [("tp", 2, 1), ("dp", 1, 2)] {
            let shared = losses_of(name, tp, dp);
            let apart = alone.iter().zip(&shared).map(|(a, b)| (a / b - 1.0).abs()).fold(0.0, f64::max);
            println!("{method} {name}: {apart:.1e}");
            assert!(apart < 1e-4 && shared.len() == 6, "{method} {name}: {alone:?} {shared:?}");
        }
    }
}

#[test]
fn a_prompt_is_asked_for_where_there_are_weights_and_weights_must_fit_the_model() {
    let (dir, backbone) = (tempfile::tempdir().unwrap(), load(&demo("model")));
    let out = dir.path().join("out");
    run(&backbone, &resolve(flags(Method::Adapter, &out)));
    let error = Prompt::read(&out.join("last")).unwrap_err().to_string();
    assert!(error.contains("holds trained weights and no prompt"), "{error}");

    let damaged = out.join("last/weights.safetensors");
    let whole = std::fs::read(&damaged).unwrap();
    std::fs::write(&damaged, &whole[..whole.len() - 1]).unwrap();
    // The run evaluated itself: its best is its last.
    let error = Trained::read(&out).unwrap_err().to_string();
    assert!(error.contains("weights.safetensors is damaged"), "{error}");
    std::fs::write(&damaged, whole).unwrap();

    let mut weights = match checkpoint::load(&out.join("last")).unwrap().trained {
        Trained::Weights(weights) => weights,
        Trained::Prompt(_) => panic!("weights were trained"),
    };
    let refused = |weights: &[NamedTensor]| backbone.engine_with(weights).err().unwrap().to_string();
    let bias = weights.iter().position(|weight| weight.name.ends_with("adapter.up.bias")).unwrap();
    weights[bias].shape = vec![3];
    weights[bias].data = vec![0.0; 3];
    let error = refused(&weights);
    assert!(error.contains("adapter.up.bias") && error.contains("[3]"), "{error}");
    weights[bias].name = "encoder.block.0.lora".to_owned();
    let error = refused(&weights);
    assert!(error.contains("encoder.block.0.lora"), "{error}");
}

#[test]
fn flags_of_one_method_are_refused_with_another() {
    let refused = |change: PartialSpec| {
        let flags = change.over(flags(Method::Prompt, Path::new("nowhere")));
        TrainSpec::resolve(flags, None, false).unwrap_err().to_string()
    };
    let none = PartialSpec::default;
    let error = refused(PartialSpec { adapter_width: Some(8), ..none() });
    assert!(error.contains("--adapter-width") && error.contains("--method prompt"), "{error}");
    let error =
        refused(PartialSpec { method: Some(Method::Prefix), parameter_scaling: Some(true), ..none() });
    assert!(error.contains("--parameter-scaling") && error.contains("adamw"), "{error}");
    let error = refused(PartialSpec { method: Some(Method::Text), steps: Some(3), ..none() });
    assert!(error.contains("--steps") && error.contains("trains nothing"), "{error}");
    let error = refused(PartialSpec { noise_density: Some(0.2), ..none() });
    assert!(error.contains("--noise-density") && error.contains("incipit pretrain"), "{error}");
}

/// Lines in which each word foretells the next.
fn text(lines: usize) -> String {
    let words = ["the", "film", "is", "good", "and", "the", "story", "is", "bad"];
    let line = |n: usize| (0..12).map(|i| words[(n + i) % words.len()]).collect::<Vec<_>>().join(" ") + "\n";
    (0..lines).map(line).collect()
}

#[test]
fn pretraining_learns_from_text_and_resumes_to_the_same_bytes() {
    use incipit_data::pretrain::Objective;
    let (dir, backbone) = (tempfile::tempdir().unwrap(), load(&demo("model")));
    std::fs::write(dir.path().join("corpus.txt"), text(300)).unwrap();
    std::fs::write(dir.path().join("held-out.txt"), text(40)).unwrap();
    let flags = |out: &str| PartialSpec {
        objective: Some(Objective::PrefixLm),
        train: Some(dir.path().join("corpus.txt")),
        eval: Some(dir.path().join("held-out.txt")),
        eval_examples: Some(8),
        max_input_length: Some(12),
        max_target_length: Some(12),
        dropout: Some(0.0),
        eval_every: Some(3),
        ..flags(Method::Model, &dir.path().join(out))
    };
    let whole = resolve(flags("whole"));
    let mut last = Last::default();
    train_on(&backbone, &whole, &Control::new(), &mut last).unwrap();
    let measured = losses(&whole.out);
    assert!(measured[5] < 0.8 * measured[0], "{measured:?}");
    let evaluation = last.0.unwrap();
    assert_eq!((evaluation.predictions.len(), evaluation.score()), (8, -evaluation.loss));

    let spec = resolve(flags("stopped"));
    let control = Control::new();
    train_on(&backbone, &spec, &control, &mut StopAfter { step: 4, control: &control }).unwrap();
    // A corpus that has grown is another one.
    std::fs::write(dir.path().join("corpus.txt"), text(301)).unwrap();
    let resumed = TrainSpec { resume: true, ..spec.clone() };
    let error = train_on(&backbone, &resumed, &Control::new(), &mut ()).unwrap_err();
    assert!(matches!(error, Error::Data(_)), "{error}");
    std::fs::write(dir.path().join("corpus.txt"), text(300)).unwrap();
    run(&backbone, &resumed);
    assert!(tree(&spec.out) == tree(&whole.out));
}

/// The demonstration's model was never trained by span corruption; what is looked at is where the sentinel is, and where it is not.
#[test]
fn a_sentinel_before_targets_is_learnt_and_is_no_part_of_predictions() {
    let (dir, backbone) = (tempfile::tempdir().unwrap(), load(&demo("model")));
    let flags = flags(Method::Prompt, &dir.path().join("out"));
    let spec = resolve(PartialSpec { target_sentinel: Some(true), ..flags });
    let task = Task::load(&spec, &backbone.tokenizer, backbone.config().vocab_size).unwrap();
    let sentinel = backbone.tokenizer.token_to_id("<extra_id_0>").unwrap();
    assert!(task.train.examples.iter().all(|example| example.target[0] == sentinel));
    let mut last = Last::default();
    train_on(&backbone, &spec, &Control::new(), &mut last).unwrap();
    let evaluation = last.0.unwrap();
    assert!(evaluation.predictions.iter().all(|prediction| !prediction.prediction.contains("extra_id")));
    assert_eq!(TrainSpec::read(&spec.out.join("run.toml")).unwrap(), spec);
}
