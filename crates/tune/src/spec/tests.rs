use super::*;
use std::fs;

/// The least that a run needs.
fn least() -> PartialSpec {
    PartialSpec {
        model: Some("google/t5-small-lm-adapt".to_owned()),
        train: Some("/data/train.jsonl".into()),
        out: Some("/runs/out".into()),
        ..PartialSpec::default()
    }
}

fn whole(change: PartialSpec) -> TrainSpec {
    TrainSpec::resolve(change.over(least()), None, false).unwrap()
}

fn refusal(change: PartialSpec) -> String {
    TrainSpec::resolve(change.over(least()), None, false).unwrap_err().to_string()
}

fn file(text: &str) -> tempfile::NamedTempFile {
    let file = tempfile::NamedTempFile::new().unwrap();
    fs::write(file.path(), text).unwrap();
    file
}

fn file_refusal(text: &str) -> String {
    TrainSpec::resolve(least(), Some(file(text).path()), false).unwrap_err().to_string()
}

#[test]
fn the_defaults_are_the_papers() {
    let spec = whole(PartialSpec::default());
    assert_eq!((spec.prompt_length, spec.batch_size, spec.steps, spec.lr), (100, 32, 30_000, 0.3));
    assert_eq!((spec.max_input_length, spec.max_target_length), (512, 16));
    assert_eq!(spec.prompt_init, PromptInit::ClassLabel);
    assert_eq!(spec.optimizer_kind(), OptimizerKind::adafactor(1e-5, 0));
    assert_eq!((spec.schedule, spec.warmup_steps), (Schedule::Constant, 0));
    assert_eq!(
        spec.engine_objective(),
        Objective { reduction: LossReduction::Mean, dropout: 0.0, z_loss: 0.0 }
    );
}

/// A field more here, and no run of an earlier version could go on.
#[test]
fn what_a_prompts_numbers_depend_on_is_what_it_was() {
    let keys: Vec<String> = whole(PartialSpec::default()).identity().keys().cloned().collect();
    let known = [
        "batch-size",
        "dropout",
        "dtype",
        "eval-every",
        "loss",
        "lr",
        "max-input-length",
        "max-target-length",
        "method",
        "metrics",
        "optimizer",
        "prompt-init",
        "prompt-length",
        "recipe",
        "schedule",
        "seed",
        "shuffle",
        "warmup-steps",
        "weight-decay",
        "z-loss",
    ];
    assert_eq!(keys, known);
    let model = whole(PartialSpec { method: Some(Method::Model), ..PartialSpec::default() });
    assert!(model.identity().contains_key("parameter-scaling"));
}

#[test]
fn flags_go_over_the_file_the_file_over_the_recipe_and_the_recipe_over_the_defaults() {
    let file = file("recipe = \"released-code\"\nbatch-size = 7\nlr = 1\nz-loss = 0.5\n");
    let flags = PartialSpec { batch_size: Some(9), dropout: Some(0.25), ..least() };
    let spec = TrainSpec::resolve(flags, Some(file.path()), false).unwrap();
    assert_eq!((spec.batch_size, spec.dropout), (9, 0.25), "flags");
    assert_eq!((spec.recipe, spec.lr, spec.z_loss), (Recipe::ReleasedCode, 1.0, 0.5), "the file");
    assert_eq!(spec.loss, LossReduction::Sum, "the recipe");
    assert_eq!(spec.steps, 30_000, "the defaults");
}

#[test]
fn what_is_written_is_read_back_the_same() {
    let changed = PartialSpec {
        eval: Some("/data/eval.jsonl".into()),
        inputs: Some("question: {question}\tpassage: \"{passage}\" \\".to_owned()),
        labels: Some("0=False,1=True".to_owned()),
        prompt_init: Some("text:Is it \"true\" or not?".to_owned()),
        recipe: Some(Recipe::ReleasedCode),
        seed: Some(i64::MAX as u64),
        patience: Some(4),
        metrics: Some(vec![Metric::Accuracy, Metric::MacroF1]),
        microbatch_tokens: Some(4096),
        recompute: Some(Recompute::On),
        threads: Some(3),
        lr: Some(1.0 / 3.0),
        ..PartialSpec::default()
    };
    for spec in [whole(PartialSpec::default()), whole(changed)] {
        let file = file(&spec.to_toml());
        assert_eq!(TrainSpec::read(file.path()).unwrap(), spec);
        spec.continues(&TrainSpec::read(file.path()).unwrap()).unwrap();
    }
}

#[test]
fn with_resume_the_runs_own_file_lies_under_the_flags() {
    let out = tempfile::tempdir().unwrap();
    let began = whole(PartialSpec {
        out: Some(out.path().to_owned()),
        lr: Some(0.1),
        recipe: Some(Recipe::ReleasedCode),
        ..PartialSpec::default()
    });
    fs::write(out.path().join(RUN_FILE), began.to_toml()).unwrap();
    let flags =
        PartialSpec { out: Some(out.path().to_owned()), steps: Some(40_000), ..PartialSpec::default() };
    let spec = TrainSpec::resolve(flags, None, true).unwrap();
    assert_eq!(spec, TrainSpec { steps: 40_000, resume: true, ..began });
}

#[test]
fn an_unknown_key_is_told_with_the_one_that_is_near() {
    let message = file_refusal("promt-length = 5");
    assert!(message.contains("no key `promt-length`; is `prompt-length` meant?"), "{message}");
    let message = file_refusal("batch_size = 5");
    assert!(message.contains("is `batch-size` meant?"), "{message}");
    let message = file_refusal("zebra = 5");
    assert!(message.contains("no key `zebra`; `incipit train --help`"), "{message}");
}

#[test]
fn a_value_of_the_wrong_kind_is_told_with_its_place() {
    for (text, parts) in [
        ("seed = 1\nsteps = \"many\"", &["line 2", "steps"][..]),
        ("optimizer = \"adam\"", &["line 1", "adafactor", "adamw", "sgd"]),
        ("metrics = [\"bleu\"]", &["line 1", "bleu", "accuracy"]),
        ("steps = -1", &["line 1", "steps"]),
        ("steps 5", &["line 1"]),
    ] {
        let message = file_refusal(text);
        for part in parts {
            assert!(message.contains(part), "{part:?} is not in {message:?}");
        }
    }
    let missing = TrainSpec::resolve(least(), Some(Path::new("/no/such/file.toml")), false).unwrap_err();
    assert!(missing.to_string().contains("/no/such/file.toml"), "{missing}");
}

#[test]
fn each_missing_field_is_named_as_its_flag() {
    for (without, flag) in [
        (PartialSpec { model: None, ..least() }, "--model"),
        (PartialSpec { train: None, ..least() }, "--train"),
        (PartialSpec { out: None, ..least() }, "--out"),
    ] {
        let message = TrainSpec::resolve(without, None, false).unwrap_err().to_string();
        assert!(message.starts_with(&format!("{flag} is missing; pass ")), "{message}");
    }
}

#[test]
fn what_is_not_built_is_refused_in_plain_words() {
    let none = PartialSpec::default;
    for (change, parts) in [
        #[cfg(not(feature = "cuda"))]
        (PartialSpec { device: Some("cuda".to_owned()), ..none() }, ["--device cuda", "--device cpu"]),
        #[cfg(not(feature = "cuda"))]
        (PartialSpec { device: Some("cuda:1".to_owned()), ..none() }, ["--device cuda:1", "--device cpu"]),
        (PartialSpec { collective: Some(Backend::Nccl), ..none() }, ["--collective nccl", "--device cuda"]),
        (
            PartialSpec { device: Some("tpu".to_owned()), ..none() },
            ["--device tpu is unknown", "--device cpu"],
        ),
        (PartialSpec { tp: Some(0), ..none() }, ["--tp", "is 0"]),
        (PartialSpec { dp: Some(0), ..none() }, ["--dp", "is 0"]),
    ] {
        let message = refusal(change);
        assert!(parts.iter().all(|part| message.contains(part)), "{message}");
    }
    whole(PartialSpec { device: Some("cpu".to_owned()), tp: Some(1), dp: Some(1), ..none() });
    let methods = "lora".parse::<Method>().unwrap_err().to_string();
    assert!(methods.contains("lora") && methods.contains("prompt"), "{methods}");
}

#[test]
fn impossible_values_are_refused_with_the_flag_and_the_mend() {
    let none = PartialSpec::default;
    let nonsense = [
        (PartialSpec { prompt_length: Some(0), ..none() }, "--prompt-length is 0"),
        (PartialSpec { batch_size: Some(0), ..none() }, "--batch-size is 0"),
        (PartialSpec { steps: Some(0), ..none() }, "--steps is 0"),
        (PartialSpec { steps: Some(u64::MAX), ..none() }, "too many"),
        (PartialSpec { eval_every: Some(0), ..none() }, "--eval-every is 0"),
        (PartialSpec { checkpoint_every: Some(0), ..none() }, "--checkpoint-every is 0"),
        (PartialSpec { keep: Some(0), ..none() }, "--keep is 0"),
        (PartialSpec { threads: Some(0), ..none() }, "--threads is 0"),
        (PartialSpec { microbatch_tokens: Some(0), ..none() }, "--microbatch-tokens is 0"),
        (PartialSpec { seed: Some(u64::MAX), ..none() }, "--seed"),
        (PartialSpec { lr: Some(0.0), ..none() }, "--lr 0"),
        (PartialSpec { lr: Some(f64::NAN), ..none() }, "--lr NaN"),
        (PartialSpec { dropout: Some(1.0), ..none() }, "--dropout 1"),
        (PartialSpec { z_loss: Some(-0.1), ..none() }, "--z-loss -0.1"),
        (PartialSpec { weight_decay: Some(f64::INFINITY), ..none() }, "--weight-decay inf"),
        (PartialSpec { patience: Some(2), ..none() }, "--patience counts evaluations"),
        (PartialSpec { max_target_length: Some(20_000), ..none() }, "--max-target-length 20000 is more"),
        (PartialSpec { prompt_length: Some(20_000), ..none() }, "--prompt-length 20000 does not fit"),
        (PartialSpec { max_input_length: Some(usize::MAX), ..none() }, "--max-input-length"),
        (PartialSpec { metrics: Some(Vec::new()), ..none() }, "--metrics is empty"),
        (PartialSpec { metrics: Some(vec![Metric::Accuracy; 2]), ..none() }, "names accuracy twice"),
        (PartialSpec { inputs: Some("{sentence".to_owned()), ..none() }, "--inputs template"),
        (PartialSpec { targets: Some("label".to_owned()), ..none() }, "--targets template"),
        (PartialSpec { labels: Some("0".to_owned()), ..none() }, "--labels the entry"),
        (PartialSpec { prompt_init: Some("zeros".to_owned()), ..none() }, "zeros"),
        (
            PartialSpec {
                schedule: Some(Schedule::Cosine),
                warmup_steps: Some(50),
                steps: Some(50),
                ..none()
            },
            "--warmup-steps 50",
        ),
    ];
    for (change, part) in nonsense {
        let message = refusal(change);
        assert!(message.contains(part), "{part:?} is not in {message:?}");
    }
}

#[test]
fn paths_are_kept_so_that_they_mean_the_same_elsewhere() {
    let spec = whole(PartialSpec { train: Some("train.jsonl".into()), ..PartialSpec::default() });
    assert_eq!(spec.train, std::env::current_dir().unwrap().join("train.jsonl"));
    assert_eq!(spec.model, "google/t5-small-lm-adapt", "a name of the hub is no path");
}

/// A run of a named task, whose files are there.
fn of_task(task: &str, dir: &Path) -> PartialSpec {
    let (task, data_dir) = (Some(task.to_owned()), Some(dir.to_owned()));
    PartialSpec { train: None, task, data_dir, ..least() }
}

#[test]
fn a_named_task_brings_its_metrics_and_is_written_without_files() {
    let dir = tempfile::tempdir().unwrap();
    for name in ["train-v1.1.json", "dev-v1.1.json", "train.jsonl", "val.jsonl"] {
        fs::write(dir.path().join(name), "{}").unwrap();
    }
    let resolve = |partial: PartialSpec| TrainSpec::resolve(partial, None, false).unwrap();
    let squad = resolve(of_task("squad", dir.path()));
    assert_eq!(squad.metrics, [Metric::ExactMatch, Metric::TokenF1]);
    assert_eq!(squad.prompt_init, PromptInit::Vocab);
    let cb = resolve(of_task("cb", dir.path()));
    assert_eq!(cb.metrics, [Metric::MacroF1, Metric::Accuracy]);
    assert_eq!(cb.prompt_init, PromptInit::ClassLabel);
    let given = PartialSpec { metrics: Some(vec![Metric::Accuracy]), ..of_task("cb", dir.path()) };
    assert_eq!(resolve(given).metrics, [Metric::Accuracy]);
    let written = file(&squad.to_toml());
    assert_eq!(TrainSpec::read(written.path()).unwrap(), squad);
    assert!(squad.continues(&cb).is_err());
    // The files may have moved.
    let moved = PartialSpec { data_dir: Some("/elsewhere".into()), ..PartialSpec::default() };
    let moved = moved.over(PartialSpec::read(written.path()).unwrap()).whole(true).unwrap();
    moved.continues(&squad).unwrap();
}

#[test]
fn a_named_task_is_read_from_a_directory_or_from_its_splits_own_files() {
    let (train, eval) = (Some("/d/t.jsonl".into()), Some("/d/v.jsonl".into()));
    let files = PartialSpec { data_dir: None, train, eval, ..of_task("cb", Path::new("/d")) };
    let spec = TrainSpec::resolve(files, None, false).unwrap();
    assert_eq!((spec.task.map(|task| task.name), &spec.data_dir), (Some("cb"), &None));
    assert_eq!((spec.train.to_str(), spec.metrics.len()), (Some("/d/t.jsonl"), 2));
    let written = file(&spec.to_toml());
    assert_eq!(TrainSpec::read(written.path()).unwrap(), spec);
}

#[test]
fn a_named_task_and_files_at_once_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let refusal = |partial| TrainSpec::resolve(partial, None, false).unwrap_err().to_string();
    let task = || of_task("cb", dir.path());
    let text = || Some("{a}".to_owned());
    for (partial, other) in [
        (PartialSpec { train: Some("t.jsonl".into()), ..task() }, "--train"),
        (PartialSpec { eval: Some("e.jsonl".into()), ..task() }, "--eval"),
        (PartialSpec { inputs: text(), ..task() }, "--inputs"),
        (PartialSpec { targets: text(), ..task() }, "--targets"),
        (PartialSpec { labels: text(), ..task() }, "--labels"),
    ] {
        let message = refusal(partial);
        assert!(message.starts_with("--task cb has") && message.contains(other), "{message}");
    }
    assert!(refusal(PartialSpec { data_dir: None, ..task() }).starts_with("--data-dir is missing"));
    let eval_alone = PartialSpec { data_dir: None, eval: Some("e.jsonl".into()), ..task() };
    assert!(refusal(eval_alone).contains("--eval"));
    assert!(refusal(PartialSpec { data_dir: Some("d".into()), ..least() }).starts_with("--data-dir is"));
    assert!(refusal(task()).contains("train.jsonl"), "{}", refusal(task()));
}
