//! Bad input: one clear message that names the thing and the mend, and nothing half-written.

use incipit_collective::Options;
use std::fs;

use incipit_tune::{
    Error,
    backbone::Backbone,
    control::Control,
    optimizer::OptimizerKind,
    schedule::Schedule,
    spec::{PartialSpec, TrainSpec},
    train::{train, train_on},
};

use crate::support::{Files, backbone, resolve, tree};

fn refusal(backbone: &Backbone, spec: &TrainSpec) -> String {
    train_on(backbone, spec, &Control::new(), &mut ()).unwrap_err().to_string()
}

fn contains(message: &str, parts: &[&str]) {
    for part in parts {
        assert!(message.contains(part), "{part:?} is not in {message:?}");
    }
}

#[test]
fn a_directory_with_something_in_it_is_not_trained_in() {
    let (files, backbone) = (Files::new(), backbone());
    let spec = files.spec("out");
    fs::create_dir(&spec.out).unwrap();
    files.write("out/thesis.tex", "precious");
    contains(&refusal(&backbone, &spec), &["out is not empty", "--resume", "--out"]);
    let resume = TrainSpec { resume: true, ..spec };
    contains(&refusal(&backbone, &resume), &["no run.toml", "--out"]);
    assert_eq!(tree(&resume.out).len(), 1);
}

#[test]
fn a_run_that_was_refused_leaves_nothing_and_can_be_mended() {
    let (files, backbone) = (Files::new(), backbone());
    let spec = resolve(PartialSpec { batch_size: Some(100), ..files.flags("out") });
    contains(&refusal(&backbone, &spec), &["--batch-size is 100", "44 training examples", "pass at most 44"]);
    assert!(!spec.out.exists());
    let missing = TrainSpec { model: files.path("no-such-model").display().to_string(), ..files.spec("out") };
    contains(
        &train(&missing, &Options::default(), &Control::new(), &mut ()).unwrap_err().to_string(),
        &["no-such-model"],
    );
    assert!(!spec.out.exists());
    train_on(&backbone, &files.spec("out"), &Control::new(), &mut ()).unwrap();
}

#[test]
fn a_run_does_not_go_on_as_another_one() {
    let (files, backbone) = (Files::new(), backbone());
    let spec = TrainSpec { steps: 6, resume: true, ..files.spec("out") };
    train_on(&backbone, &spec, &Control::new(), &mut ()).unwrap();
    let before = tree(&spec.out);
    let others = [
        (TrainSpec { lr: 0.5, ..spec.clone() }, ["--lr 0.3", "0.5"]),
        (TrainSpec { seed: 3, ..spec.clone() }, ["--seed 0", "3"]),
        (TrainSpec { batch_size: 4, ..spec.clone() }, ["--batch-size 8", "4"]),
        (TrainSpec { dropout: 0.1, ..spec.clone() }, ["--dropout 0.0", "0.1"]),
        (TrainSpec { schedule: Schedule::Linear, ..spec.clone() }, ["--schedule", "linear"]),
        (
            TrainSpec { inputs: Some("{inputs}!".to_owned()), ..spec.clone() },
            ["--inputs nothing", "{inputs}!"],
        ),
        (TrainSpec { eval_every: 5, ..spec.clone() }, ["--eval-every 4", "5"]),
    ];
    for (other, parts) in others {
        contains(&refusal(&backbone, &other), &parts);
    }
    let free = TrainSpec {
        keep: 9,
        patience: Some(7),
        microbatch_tokens: Some(31),
        threads: Some(1),
        ..spec.clone()
    };
    train_on(&backbone, &free, &Control::new(), &mut ()).unwrap();
    assert!(tree(&spec.out) == before);
}

#[test]
fn a_falling_schedule_does_not_get_another_end() {
    let (files, backbone) = (Files::new(), backbone());
    let flags = PartialSpec { schedule: Some(Schedule::Linear), steps: Some(6), ..files.flags("out") };
    let spec = resolve(flags);
    train_on(&backbone, &spec, &Control::new(), &mut ()).unwrap();
    let longer = TrainSpec { steps: 12, resume: true, ..spec };
    contains(&refusal(&backbone, &longer), &["--steps 6", "12"]);
}

#[test]
fn a_run_does_not_go_on_on_another_backbone_unless_allowed() {
    let (files, backbone) = (Files::new(), backbone());
    let spec = TrainSpec { steps: 6, resume: true, ..files.spec("out") };
    train_on(&backbone, &spec, &Control::new(), &mut ()).unwrap();
    let other =
        Backbone { fingerprint: "cd".repeat(32).parse().unwrap(), name: "other".to_owned(), ..backbone };
    contains(&refusal(&other, &spec), &["abab", "other", "cdcd", "--allow-other-backbone"]);
    let allowed = TrainSpec { allow_other_backbone: true, steps: 9, ..spec };
    assert_eq!(train_on(&other, &allowed, &Control::new(), &mut ()).unwrap().step, 9);
}

#[test]
fn a_run_does_not_start_from_a_prompt_of_another_backbone_unless_allowed() {
    let (files, backbone) = (Files::new(), backbone());
    train_on(&backbone, &files.spec("first"), &Control::new(), &mut ()).unwrap();
    let from = |place: &str| format!("file:{}", files.path("first").join(place).display()).parse().unwrap();
    let other =
        Backbone { fingerprint: "cd".repeat(32).parse().unwrap(), name: "other".to_owned(), ..backbone };
    let places = ["", "last", "last/prompt.safetensors", "adapter", "prompt.npy"];
    for (i, place) in places.into_iter().enumerate() {
        let spec = TrainSpec { prompt_init: from(place), ..files.spec("second") };
        contains(&refusal(&other, &spec), &["first", "abab", "other", "cdcd", "--allow-other-backbone"]);
        let out = files.path(&format!("allowed-{i}"));
        let allowed = TrainSpec { allow_other_backbone: true, steps: 1, out, ..spec };
        assert_eq!(train_on(&other, &allowed, &Control::new(), &mut ()).unwrap().step, 1, "{place}");
    }
    // A file that was taken out of its run does not tell.
    fs::copy(files.path("first/prompt.npy"), files.path("alone.npy")).unwrap();
    let init = format!("file:{}", files.path("alone.npy").display());
    let spec = TrainSpec { prompt_init: init.parse().unwrap(), steps: 1, ..files.spec("third") };
    assert_eq!(train_on(&other, &spec, &Control::new(), &mut ()).unwrap().step, 1);
}

#[test]
fn a_run_does_not_go_on_with_other_data() {
    let (files, backbone) = (Files::new(), backbone());
    let spec = TrainSpec { steps: 6, resume: true, ..files.spec("out") };
    train_on(&backbone, &spec, &Control::new(), &mut ()).unwrap();
    for name in ["train.jsonl", "eval.jsonl"] {
        let good = fs::read_to_string(files.path(name)).unwrap();
        files.write(name, &good.replacen("red", "blue", 1));
        contains(&refusal(&backbone, &spec), &[name, "has changed"]);
        files.write(name, &good);
    }
    // The same content elsewhere is the same data.
    fs::rename(files.path("train.jsonl"), files.path("moved.jsonl")).unwrap();
    let moved = TrainSpec { train: files.path("moved.jsonl"), steps: 7, ..spec };
    assert_eq!(train_on(&backbone, &moved, &Control::new(), &mut ()).unwrap().step, 7);
}

#[test]
fn a_changed_run_file_is_noticed() {
    let (files, backbone) = (Files::new(), backbone());
    let spec = TrainSpec { steps: 6, resume: true, ..files.spec("out") };
    train_on(&backbone, &spec, &Control::new(), &mut ()).unwrap();
    let run = fs::read_to_string(spec.out.join("run.toml")).unwrap();
    files.write("out/run.toml", &run.replace("lr = 0.3", "lr = 0.1"));
    contains(&refusal(&backbone, &TrainSpec { lr: 0.1, ..spec }), &["another specification", "run.toml"]);
}

#[test]
fn when_no_checkpoint_can_be_used_the_run_does_not_begin_anew() {
    let (files, backbone) = (Files::new(), backbone());
    let spec = TrainSpec { steps: 3, resume: true, ..files.spec("out") };
    train_on(&backbone, &spec, &Control::new(), &mut ()).unwrap();
    for entry in fs::read_dir(spec.out.join("checkpoints")).unwrap() {
        fs::write(entry.unwrap().path().join("state.json"), "{}").unwrap();
    }
    contains(&refusal(&backbone, &spec), &["step-00000003", "state.json", "damaged"]);
}

#[test]
fn a_number_that_is_none_stops_the_run_before_the_update_with_step_and_line() {
    let (files, backbone) = (Files::new(), backbone());
    let mut train: Vec<String> =
        fs::read_to_string(files.path("train.jsonl")).unwrap().lines().map(str::to_owned).collect();
    // In the order of the file, line 22 is in the third batch of eight.
    train[21] = r#"{"inputs": "red poison", "targets": "yes"}"#.to_owned();
    files.write("train.jsonl", &(train.join("\n") + "\n"));
    let flags = PartialSpec { shuffle: Some(false), checkpoint_every: Some(1), ..files.flags("out") };
    let spec = resolve(flags);
    let error = train_on(&backbone, &spec, &Control::new(), &mut ()).unwrap_err();
    assert!(matches!(error, Error::NonFinite { step: 3, index: 21, line: 22, .. }), "{error}");
    contains(&error.to_string(), &["step 3", "before the update", "NaN", "line 22"]);
    assert!(fs::read_link(spec.out.join("last")).unwrap().ends_with("step-00000002"));
}

#[test]
fn a_number_that_is_none_in_an_evaluation_names_the_line() {
    let (files, backbone) = (Files::new(), backbone());
    files.write(
        "eval.jsonl",
        "{\"inputs\": \"red\", \"targets\": \"yes\"}\n{\"inputs\": \"poison\", \"targets\": \"no\"}\n",
    );
    contains(&refusal(&backbone, &files.spec("out")), &["evaluation loss is NaN", "line 2"]);
}

#[test]
fn an_update_beyond_f32_is_not_made() {
    let (files, backbone) = (Files::new(), backbone());
    let flags = PartialSpec { optimizer: Some("sgd".parse().unwrap()), lr: Some(1e38), ..files.flags("out") };
    let spec = resolve(flags);
    assert_eq!(spec.optimizer_kind(), OptimizerKind::sgd(0.0, 1e-5));
    let message = refusal(&backbone, &spec);
    contains(&message, &["before the update", "--lr"]);
}

#[test]
fn data_that_do_not_fit_are_named() {
    let (files, backbone) = (Files::new(), backbone());
    let cases = [
        ("", &["train.jsonl", "empty"][..]),
        ("{\"inputs\": \"red\", \"targets\": \"yes\"}\n{\"inputs\": \n", &["train.jsonl", "line 2"]),
        ("{\"inputs\": \"red\"}\n", &["train.jsonl", "line 1", "targets"]),
    ];
    for (text, parts) in cases {
        files.write("train.jsonl", text);
        contains(&refusal(&backbone, &files.spec("out")), parts);
        assert!(!files.path("out").exists());
    }
}

#[test]
fn a_prompt_of_another_shape_is_refused() {
    let (files, backbone) = (Files::new(), backbone());
    let with = |path: &str, length| {
        let init = format!("file:{}", files.path(path).display());
        resolve(PartialSpec { prompt_init: Some(init), prompt_length: Some(length), ..files.flags("out") })
    };
    let prompt = |rows, cols| incipit_tune::prompt::Prompt::new(rows, cols, vec![0.5; rows * cols]).unwrap();
    incipit_tune::npy::write(&files.path("wide.npy"), &prompt(5, 32)).unwrap();
    contains(&refusal(&backbone, &with("wide.npy", 5)), &["wide.npy", "32 columns", "16"]);
    incipit_tune::npy::write(&files.path("long.npy"), &prompt(7, 16)).unwrap();
    contains(&refusal(&backbone, &with("long.npy", 5)), &["long.npy", "7 rows", "--prompt-length 7"]);
    train_on(&backbone, &with("long.npy", 7), &Control::new(), &mut ()).unwrap();
}

#[test]
fn what_was_cut_is_told() {
    let (files, backbone) = (Files::new(), backbone());
    #[derive(Default)]
    struct Warnings(Vec<String>);
    impl incipit_tune::train::Observer for Warnings {
        fn on(&mut self, event: &incipit_tune::train::Event<'_>) {
            if let incipit_tune::train::Event::Warning(warning) = event {
                self.0.push((*warning).to_owned());
            }
        }
    }
    let mut warnings = Warnings::default();
    let spec = resolve(PartialSpec { max_input_length: Some(3), ..files.flags("out") });
    train_on(&backbone, &spec, &Control::new(), &mut warnings).unwrap();
    let all = warnings.0.join("\n");
    contains(&all, &["training inputs were cut to 3 tokens", "evaluation inputs", "--max-input-length 5"]);
}
