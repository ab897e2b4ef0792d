//! Runs that train something else than a soft prompt: what they leave does not depend on how often they were disturbed, and other ranks
//! come to nearly the same.

use std::{
    ops::Range,
    path::{Path, PathBuf},
    sync::Arc,
};

use incipit_collective::Options;
use incipit_kernels::Frozen;
use incipit_model::{Example, Microbatch};
use incipit_tune::{
    Error,
    backbone::Backbone,
    checkpoint,
    control::Control,
    engine::{EngineOptions, Recompute},
    evaluate::{EvalOptions, evaluate},
    optimizer::NamedTensor,
    prompt::Prompt,
    spec::{Method, PartialSpec, Precision, PrefixPart, TrainSpec},
    task::Task,
    train::{Event, Observer, Outcome, train, train_on},
    trained::Trained,
};

use incipit_weights::{Source, TensorInfo};

use crate::support::{Last, StopAfter, losses, resolve, tree};

/// Each way to train weights, by a name.
fn ways() -> Vec<(&'static str, Method, PartialSpec)> {
    let none = PartialSpec::default;
    let mlp = PartialSpec { prefix_projection: Some(12), ..none() };
    let decoder = PartialSpec { prefix_part: Some(PrefixPart::Decoder), ..none() };
    vec![
        ("model", Method::Model, none()),
        ("adapter", Method::Adapter, none()),
        ("prefix", Method::Prefix, none()),
        ("prefix-mlp", Method::Prefix, mlp.clone()),
        ("prefix-decoder", Method::Prefix, decoder.clone()),
        ("prefix-decoder-mlp", Method::Prefix, mlp.over(decoder)),
    ]
}

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
    for (way, method, change) in
        ways().into_iter().chain([("search", Method::Search, PartialSpec::default())])
    {
        let spec_of = |out: &str| resolve(change.clone().over(flags(method, &dir.path().join(out))));
        let undisturbed = spec_of(way);
        run(&backbone, &undisturbed);
        let spec = spec_of(&format!("{way}-stopped"));
        let control = Control::new();
        train_on(&backbone, &spec, &control, &mut StopAfter { step: 4, control: &control }).unwrap();
        run(&backbone, &TrainSpec { resume: true, ..spec.clone() });
        let (expected, left) = (tree(&undisturbed.out), tree(&spec.out));
        let names =
            |tree: &[(String, Vec<u8>)]| tree.iter().map(|(name, _)| name.clone()).collect::<Vec<_>>();
        assert_eq!(names(&left), names(&expected), "{way}");
        let differing: Vec<_> =
            left.iter().zip(&expected).filter(|(a, b)| a != b).map(|(a, _)| &a.0).collect();
        assert!(differing.is_empty(), "{way}: {differing:?}");
    }
}

#[test]
fn training_lowers_the_loss_and_what_is_left_computes_what_the_run_measured() {
    let (dir, backbone) = (tempfile::tempdir().unwrap(), load(&demo("model")));
    for (way, method, change) in ways() {
        let out = dir.path().join(way);
        let longer = PartialSpec { steps: Some(24), eval_every: Some(24), ..change };
        let spec = resolve(longer.over(flags(method, &out)));
        let mut last = Last::default();
        let outcome = train_on(&backbone, &spec, &Control::new(), &mut last).unwrap();
        let losses = losses(&out);
        let mean = |losses: &[f64]| losses.iter().sum::<f64>() / losses.len() as f64;
        let (first, end) = (mean(&losses[..5]), mean(&losses[19..]));
        println!("{way}: from {first} to {end}");
        assert!(end < 0.8 * first, "{way}: from {first} to {end}");

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
        assert_eq!(Some(evaluation), last.0, "{way}: {:?}", outcome.trained);
    }
}

#[test]
fn ranks_that_share_the_work_come_to_nearly_the_same() {
    let dir = tempfile::tempdir().unwrap();
    for (way, method, change) in ways() {
        let losses_of = |name: &str, tp: usize, dp: usize| {
            let out = dir.path().join(format!("{way}-{name}"));
            let ranks = PartialSpec { tp: Some(tp), dp: Some(dp), ..change.clone() };
            let spec = resolve(ranks.over(flags(method, &out)));
            train(&spec, &Options::default(), &Control::new(), &mut ()).unwrap();
            losses(&out)
        };
        let alone = losses_of("alone", 1, 1);
        for (name, tp, dp) in [("tp", 2, 1), ("dp", 1, 2)] {
            let shared = losses_of(name, tp, dp);
            let apart = alone.iter().zip(&shared).map(|(a, b)| (a / b - 1.0).abs()).fold(0.0, f64::max);
            println!("{way} {name}: {apart:.1e}");
            assert!(apart < 1e-4 && shared.len() == 6, "{way} {name}: {alone:?} {shared:?}");
        }
    }
}

/// The MLP is in checkpoints, and goes no further.
#[test]
fn of_a_prefix_trained_through_an_mlp_the_keys_and_values_are_kept() {
    let (dir, backbone) = (tempfile::tempdir().unwrap(), load(&demo("model")));
    let [plain, projected] = [None, Some(12)].map(|width| {
        let out = dir.path().join(format!("{width:?}"));
        let change = PartialSpec {
            prefix_projection: width,
            steps: Some(2),
            eval_every: Some(2),
            ..PartialSpec::default()
        };
        let spec = resolve(change.over(flags(Method::Prefix, &out)));
        let mut counts = Counts::default();
        train_on(&backbone, &spec, &Control::new(), &mut counts).unwrap();
        (out, counts)
    });
    let shapes = |path: &Path| match Trained::read(path).unwrap() {
        Trained::Weights(weights) => weights.into_iter().map(|w| (w.name, w.shape)).collect::<Vec<_>>(),
        Trained::Prompt(_) => panic!("weights were trained"),
    };
    assert_eq!(shapes(&projected.0), shapes(&plain.0));
    let [shown, best] =
        ["weights.safetensors", "best"].map(|name| Trained::read(&projected.0.join(name)).unwrap());
    assert!(shown == best, "a checkpoint is read as what it makes");
    assert_eq!((plain.1.trained, plain.1.kept), (shown.num_parameters(), shown.num_parameters()));
    let (attentions, inner, d) = (3 + 2 * 3, 128, 128);
    assert_eq!(projected.1.kept, 2 * 4 * inner * attentions);
    assert_eq!(projected.1.trained, 4 * d + 12 * d + 12 + 2 * attentions * (inner * 12 + inner));
    let held = checkpoint::load(&projected.0.join("last")).unwrap().trained;
    assert_eq!(held.num_parameters(), projected.1.trained);
}

/// The two counts that a run begins with.
#[derive(Default)]
struct Counts {
    trained: u64,
    kept: u64,
}

impl Observer for Counts {
    fn on(&mut self, event: &Event<'_>) {
        if let Event::Loaded(loaded) = event {
            (self.trained, self.kept) = (loaded.num_trained, loaded.num_kept);
        }
    }
}

#[test]
fn a_prefix_of_the_decoder_is_left_for_peft_and_read_again() {
    let (dir, backbone) = (tempfile::tempdir().unwrap(), load(&demo("model")));
    let out = dir.path().join("out");
    let decoder = PartialSpec { prefix_part: Some(PrefixPart::Decoder), ..PartialSpec::default() };
    run(&backbone, &resolve(decoder.over(flags(Method::Prefix, &out))));
    let adapter = out.join("adapter");
    let loss = |path: &Path| {
        let Trained::Weights(weights) = Trained::read(path).unwrap() else { panic!("weights were trained") };
        let engine = backbone.engine_with(&weights).unwrap();
        let (input, target) = ([9, 12, 30, 1], [7, 5, 1]);
        let example = Example { prompt: None, input: &input, target: &target, key: 0 };
        engine.model().loss(&Microbatch { prompts: &[], examples: &[example] }).unwrap()[0]
    };
    assert_eq!(loss(&out), loss(&adapter));
    assert_eq!(loss(&out), loss(&adapter.join("adapter_model.safetensors")));
    let error = Prompt::read(&adapter).unwrap_err().to_string();
    assert!(error.contains("PREFIX_TUNING") && error.contains("eval, generate"), "{error}");

    let other = |change: &dyn Fn(&mut Vec<NamedTensor>)| {
        let Trained::Weights(mut weights) = Trained::read(&out).unwrap() else {
            panic!("weights were trained")
        };
        change(&mut weights);
        backbone.engine_with(&weights).err().unwrap().to_string()
    };
    let narrow = |weights: &mut Vec<NamedTensor>| {
        for weight in weights {
            weight.shape = vec![4, 64];
            weight.data.truncate(4 * 64);
        }
    };
    for error in [other(&|weights| weights.truncate(4)), other(&narrow)] {
        assert!(
            error.contains("3 layers of 128") && error.contains("the model that it was trained on"),
            "{error}"
        );
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
    let error = refused(PartialSpec { prefix_projection: Some(8), ..none() });
    assert!(
        error.contains("--prefix-projection is of --method prefix") && error.contains("leave one"),
        "{error}"
    );
    let error = refused(PartialSpec { prefix_part: Some(PrefixPart::All), ..none() });
    assert!(error.contains("--prefix-part is of --method prefix"), "{error}");
    let prefix = PartialSpec { method: Some(Method::Prefix), ..none() };
    let error = refused(PartialSpec { prefix_projection: Some(0), ..prefix });
    assert!(error.contains("--prefix-projection is 0"), "{error}");
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

/// A source from which a model can be trained, and not written.
struct Unwritable(Arc<dyn Source>);

impl Source for Unwritable {
    fn tensors(&self) -> Vec<TensorInfo> {
        self.0.tensors()
    }

    fn contains(&self, name: &str) -> bool {
        self.0.contains(name)
    }

    fn frozen(&self, name: &str, shape: &[usize]) -> incipit_weights::Result<Frozen> {
        self.0.frozen(name, shape)
    }

    fn part(
        &self,
        name: &str,
        shape: &[usize],
        rows: Range<usize>,
        cols: Range<usize>,
    ) -> incipit_weights::Result<Frozen> {
        self.0.part(name, shape, rows, cols)
    }

    fn side_files(&self) -> incipit_weights::Result<Vec<(String, Vec<u8>)>> {
        Err(incipit_weights::Error::NoConfig("gone".into()))
    }
}

#[test]
fn a_model_that_cannot_be_written_leaves_the_one_that_a_run_showed_before() {
    let (dir, mut backbone) = (tempfile::tempdir().unwrap(), load(&demo("model")));
    let out = dir.path().join("out");
    // Without evaluations, it shows the last one.
    let spec = |steps| {
        let all = flags(Method::Model, &out);
        resolve(PartialSpec { steps: Some(steps), eval: None, eval_every: None, ..all })
    };
    run(&backbone, &spec(2));
    let shown = tree(&out.join("model"));
    assert!(!shown.is_empty());

    let further = TrainSpec { resume: true, ..spec(4) };
    let source = backbone.source.clone();
    backbone.source = Arc::new(Unwritable(source.clone()));
    let error = train_on(&backbone, &further, &Control::new(), &mut ()).unwrap_err();
    assert!(error.to_string().contains("gone"), "{error}");
    assert!(tree(&out.join("model")) == shown, "another model, or a part of one");

    backbone.source = source;
    run(&backbone, &further);
    let now = tree(&out.join("model"));
    assert!(now.len() == shown.len() && now != shown, "it shows what it showed before");
    let left = std::fs::read_dir(&out).unwrap().map(|entry| entry.unwrap().file_name());
    let partial: Vec<_> = left.filter(|name| name.to_string_lossy().starts_with('.')).collect();
    assert!(partial.is_empty(), "{partial:?}");
}
