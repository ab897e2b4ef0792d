//! Whole runs of the program, from data to prompt and back, on the bundled demo model.

mod common;

use std::path::Path;
use std::process::Stdio;
use std::time::{Duration, Instant};

use common::{
    Ran, assert_needs_nothing_else, command, demo, few_examples, incipit, path, refused, text, train,
    train_args, with_stdin,
};

/// The labels of the demo's data.
const LABELS: &str = "praise=praise,delivery=delivery,exchange=exchange,billing=billing,repair=repair";

#[test]
fn a_run_leaves_its_files_and_tells_what_came_of_it() {
    let dir = tempfile::tempdir().expect("a directory");
    let summary = train(dir.path(), "run", &["--steps", "4", "--eval-every", "2"]).ok().json();
    assert_eq!(summary["end"], "all-steps");
    assert_eq!(summary["steps"], 4);
    assert!(summary["metrics"]["accuracy"].is_number(), "{summary}");
    let run = dir.path().join("run");
    for name in [
        "run.toml",
        "metrics.jsonl",
        "prompt.npy",
        "adapter/adapter_config.json",
        "best",
        "last",
        "predictions.jsonl",
    ] {
        assert!(run.join(name).exists(), "{name}");
    }
    assert_eq!(text(run.join("predictions.jsonl")).lines().count(), 12);
    let report = text(run.join("report.html"));
    assert!(report.contains("<svg") && report.contains("Evaluations"));
    assert_needs_nothing_else(&report);
}

#[test]
fn a_run_that_goes_on_ends_in_the_same_bytes_as_one_in_one_piece() {
    let dir = tempfile::tempdir().expect("a directory");
    let every = ["--eval-every", "2", "--checkpoint-every", "1"];
    train(dir.path(), "whole", &[&every[..], &["--steps", "6"]].concat()).ok();
    train(dir.path(), "parts", &[&every[..], &["--steps", "3"]].concat()).ok();
    let resumed = incipit(&["train", "--out", &path(dir.path(), "parts"), "--resume", "--steps", "6"]).ok();
    assert!(resumed.stderr.contains("going on after step 3"), "{}", resumed.stderr);
    // What it has made is not unmade, and `run.toml` says what was made.
    let parts = path(dir.path(), "parts");
    let written = text(dir.path().join("parts/run.toml"));
    let fewer = incipit(&["train", "--out", &parts, "--resume", "--steps", "5"]);
    refused(&fewer, &["--steps is 5", "has made 6 steps"]);
    assert_eq!(text(dir.path().join("parts/run.toml")), written);
    let last = |run: &str| {
        std::fs::read(dir.path().join(run).join("last/prompt.safetensors")).expect("a checkpoint")
    };
    assert_eq!(last("whole"), last("parts"));
}

#[test]
fn threads_do_not_change_the_bytes() {
    let dir = tempfile::tempdir().expect("a directory");
    train(dir.path(), "one", &["--steps", "2", "--threads", "1"]).ok();
    train(dir.path(), "two", &["--steps", "2", "--threads", "2"]).ok();
    let prompt = |run: &str| std::fs::read(dir.path().join(run).join("prompt.npy")).expect("a prompt");
    assert_eq!(prompt("one"), prompt("two"));
}

#[test]
fn replicas_do_not_change_the_bytes_and_a_run_goes_on_with_another_number_of_them() {
    let dir = tempfile::tempdir().expect("a directory");
    train(dir.path(), "one", &["--steps", "4", "--eval-every", "2"]).ok();
    train(dir.path(), "two", &["--steps", "2", "--eval-every", "2", "--dp", "2"]).ok();
    let two = path(dir.path(), "two");
    incipit(&["train", "--out", &two, "--resume", "--steps", "4", "--dp", "3"]).ok();
    for file in ["prompt.npy", "predictions.jsonl", "last/prompt.safetensors"] {
        let bytes = |run: &str| std::fs::read(dir.path().join(run).join(file)).expect("a file");
        assert!(bytes("one") == bytes("two"), "{file} differs");
    }
}

#[test]
fn a_model_in_parts_answers_as_in_one_piece() {
    let model = demo("model");
    let texts =
        (0..5).map(|i| format!("I was charged {i} times for a red lamp.")).collect::<Vec<_>>().join("\n");
    let answers = |more: &[&str]| {
        let args = ["generate", "--json", "--model", &model, "--dtype", "f32", "--max-new-tokens", "5"];
        let ran = with_stdin(&[&args[..], more].concat(), &texts).ok();
        assert_eq!(ran.stdout.lines().count(), 5, "{}", ran.stdout);
        let output =
            |line: &str| serde_json::from_str::<serde_json::Value>(line).expect("JSON")["output"].clone();
        ran.stdout.lines().map(output).collect::<Vec<_>>()
    };
    let whole = answers(&[]);
    for more in [["--tp", "2", "--dp", "1"], ["--tp", "1", "--dp", "3"], ["--tp", "2", "--dp", "2"]] {
        assert_eq!(answers(&more), whole, "{more:?}");
    }
}

#[test]
fn bench_times_what_ranks_exchange() {
    let args = ["bench", "collective", "--json", "--sizes", "1KB..16KB", "--ranks", "3", "--steps", "2"];
    let seen = incipit(&args).ok().json();
    assert_eq!((&seen["collective"], &seen["ranks"]), (&"local".into(), &3.into()));
    let rows = seen["operations"].as_array().expect("operations");
    assert_eq!(rows.len(), 1 + 3 + 3, "{seen}");
    assert!(rows.iter().all(|row| row["latency_us"].as_f64().expect("a time") > 0.0), "{seen}");
    assert_eq!(rows[3]["bytes"], 16_384, "{seen}");
}

#[test]
fn eval_of_a_run_measures_what_the_run_measured() {
    let dir = tempfile::tempdir().expect("a directory");
    let (data, output) = (few_examples(dir.path()), path(dir.path(), "p.jsonl"));
    for predict in ["decode", "rank"] {
        let steps = ["--steps", "2", "--eval-every", "2", "--predict", predict];
        let trained = train(dir.path(), predict, &steps).ok().json();
        let run = path(dir.path(), predict);
        let ran = incipit(&["eval", "--json", "--prompt", &run, "--data", &data, "--output", &output]).ok();
        let summary = ran.json();
        assert_eq!(summary["metrics"], trained["metrics"]);
        assert_eq!(summary["loss"], trained["eval_loss"]);
        let predictions = dir.path().join(predict).join("predictions.jsonl");
        assert!(text(&output) == text(predictions), "the predictions differ");
    }
    // The few examples do not show every label that the run chose among.
    let shown = text(&data).lines().filter(|line| line.contains("\"advice\"")).count();
    assert!(shown == 0 && text(&output).contains("\"advice\":"), "{}", text(&output));
    let run = path(dir.path(), "decode");
    for (place, part) in [("none/p.jsonl", "there is no directory"), ("decode", "name a file in it")] {
        let place = path(dir.path(), place);
        let ran = incipit(&["eval", "--prompt", &run, "--data", &data, "--output", &place]);
        refused(&ran, &["--output is ", &place, part]);
        assert!(!ran.stderr.contains("loading"), "{}", ran.stderr);
    }
    let named = incipit(&["eval", "--prompt", &run, "--data", &data, "--metrics", "macro-f1,token-f1"]).ok();
    assert!(named.stdout.contains("macro F1") && named.stdout.contains("token F1"), "{}", named.stdout);
}

#[test]
fn a_prompt_is_used_on_another_backbone_than_its_own_only_where_that_is_meant() {
    let dir = tempfile::tempdir().expect("a directory");
    let other = path(dir.path(), "other");
    incipit(&["convert", "model", &demo("model"), &other, "--dtype", "f32"]).ok();
    train(dir.path(), "run", &["--steps", "1", "--checkpoint-every", "1"]).ok();
    let at = |place: &str| path(dir.path(), place);
    let data = few_examples(dir.path());
    for place in ["run", "run/prompt.npy", "run/adapter", "run/last"] {
        let prompt = at(place);
        let args = ["eval", "--data", &data, "--prompt", &prompt, "--model", &other];
        refused(&incipit(&args), &[&prompt, "was trained on the backbone", "--allow-other-backbone"]);
        incipit(&[&args[..], &["--allow-other-backbone"]].concat()).ok();
    }
    let prompt = at("run");
    refused(&incipit(&["generate", "--input", "x", "--prompt", &prompt, "--model", &other]), &["--model"]);
    let vote = ["ensemble", "eval", "--data", &data, "--prompt", &prompt, "--model", &other];
    refused(&incipit(&vote), &[&prompt, "--allow-other-backbone"]);
    // Nothing tells on which backbone this was trained: a file of this name alone is no checkpoint.
    std::fs::write(at("state.json"), "{}").expect("a file");
    std::fs::copy(at("run/prompt.npy"), at("alone.npy")).expect("a copy");
    incipit(&["eval", "--data", &data, "--prompt", &at("alone.npy"), "--model", &other]).ok();
}

#[test]
fn the_members_of_an_ensemble_are_runs_of_their_own_and_vote() {
    let dir = tempfile::tempdir().expect("a directory");
    let every = ["--eval-every", "1", "--checkpoint-every", "1"];
    let mut args = train_args(dir.path(), "two", &[&every[..], &["--steps", "1", "--members", "2"]].concat());
    args.insert(0, "ensemble".to_owned());
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    let begun = incipit(&args).ok().json();
    assert_eq!((&begun["members"][1]["seed"], &begun["members"][1]["steps"]), (&1.into(), &1.into()));
    let two = path(dir.path(), "two");
    let resumed =
        incipit(&["ensemble", "train", "--out", &two, "--resume", "--steps", "2", "--dp", "2"]).ok();
    assert!(resumed.stderr.contains("member 1: going on after step 1"), "{}", resumed.stderr);
    assert!(resumed.stdout.contains("best accuracy"), "{}", resumed.stdout);
    train(dir.path(), "alone", &[&every[..], &["--steps", "2", "--seed", "1"]].concat()).ok();
    for file in ["prompt.npy", "predictions.jsonl", "best/prompt.safetensors", "last/optimizer.safetensors"] {
        let bytes = |run: &str| std::fs::read(dir.path().join(run).join(file)).expect("a file");
        assert!(bytes("two/member-1") == bytes("alone"), "{file} differs");
    }
    assert!(dir.path().join("two/member-1/report.html").exists());

    let (data, votes) = (few_examples(dir.path()), path(dir.path(), "v.jsonl"));
    let eval = |more: &[&str]| incipit(&[&["ensemble", "eval", "--data", &data], more].concat());
    let seen = eval(&["--json", "--ensemble", &two, "--output", &votes]).ok().json();
    let members = ["two/member-0", "two/member-1"].map(|member| path(dir.path(), member));
    for (i, member) in members.iter().enumerate() {
        let alone = incipit(&["eval", "--json", "--prompt", member, "--data", &data]).ok().json();
        assert_eq!(seen["members"][i]["metrics"], alone["metrics"]);
    }
    let vote: serde_json::Value =
        serde_json::from_str(text(&votes).lines().next().expect("a vote")).expect("JSON");
    assert_eq!(vote["votes"].as_array().map(Vec::len), Some(2));
    assert_eq!(vote["prediction"], vote["votes"][0], "the first of two wins whatever the second says");
    assert_eq!(seen["ensemble"], seen["members"][0]["metrics"]);
    let named = eval(&["--json", "--prompt", &members[0], "--prompt", &members[1]]).ok().json();
    assert_eq!((&named["ensemble"], &named["average"]), (&seen["ensemble"], &seen["average"]));
    let file = path(dir.path(), "two/ensemble.safetensors");
    let table =
        eval(&["--ensemble", &file, "--model", &demo("model"), "--max-input-length", "32"]).ok().stdout;
    assert!(table.contains("average") && table.contains("ensemble"), "{table}");
    refused(&eval(&[]), &["--ensemble"]);
}

#[test]
fn labels_are_ranked_alike_by_a_whole_model_by_its_parts_and_by_copies() {
    let dir = tempfile::tempdir().expect("a directory");
    let (model, data) = (demo("model"), few_examples(dir.path()));
    let eval = |more: &[&str]| {
        let args = ["eval", "--json", "--model", &model, "--data", &data, "--dtype", "f32"];
        incipit(&[&args[..], &["--predict", "rank", "--labels", LABELS], more].concat())
    };
    let lines = |name: &str, more: &[&str]| {
        let output = path(dir.path(), name);
        let legal = eval(&[more, &["--output", &output]].concat()).ok().json()["legal_share"].clone();
        assert_eq!(legal, 1.0);
        let line = |line: &str| serde_json::from_str::<serde_json::Value>(line).expect("JSON");
        text(output).lines().map(line).collect::<Vec<_>>()
    };
    let whole = lines("whole", &[]);
    assert_eq!(lines("copies", &["--dp", "3", "--microbatch-tokens", "50"]), whole);
    for (part, whole) in lines("parts", &["--tp", "2"]).iter().zip(&whole) {
        assert_eq!(part["prediction"], whole["prediction"]);
        let scores = |line: &serde_json::Value| line["scores"].as_object().expect("scores").clone();
        for (label, score) in scores(whole) {
            let (a, b) = (score.as_f64().expect("one"), part["scores"][&label].as_f64().expect("one"));
            assert!(a < 0.0 && (a - b).abs() < 1e-4 * a.abs(), "{label}: {a} and {b}");
        }
    }
    std::fs::write(path(dir.path(), "free.jsonl"), "{\"inputs\": \"a\", \"targets\": \"b\"}\n")
        .expect("a file");
    let free = path(dir.path(), "free.jsonl");
    let ran = incipit(&["eval", "--model", &model, "--data", &free, "--predict", "rank"]);
    refused(&ran, &["--predict rank chooses among labels", "--labels"]);
}

#[test]
fn generate_answers_arguments_lines_and_records_alike_and_in_order() {
    let model = demo("model");
    let texts = ["Dear all, this is Rosa in Pinewood.", "I was charged twice for a red lamp."];
    let greedy = ["generate", "--model", &model, "--max-new-tokens", "5"];
    let arguments = incipit(&[&greedy[..], &["--input", texts[0], "--input", texts[1]]].concat()).ok();
    let lines = with_stdin(&greedy, &(texts.join("\n") + "\n")).ok();
    assert_eq!(arguments.stdout, lines.stdout);
    assert_eq!(lines.stdout.lines().count(), 2);
    let dir = tempfile::tempdir().expect("a directory");
    let records = texts.map(|t| format!("{}\n", serde_json::json!({ "text": t })));
    std::fs::write(dir.path().join("d.jsonl"), records.concat()).expect("a file");
    let data = path(dir.path(), "d.jsonl");
    let recorded = incipit(&[&greedy[..], &["--data", &data, "--inputs", "{text}", "--json"]].concat()).ok();
    let answers: Vec<serde_json::Value> =
        recorded.stdout.lines().map(|line| serde_json::from_str(line).expect("a line of JSON")).collect();
    assert_eq!(answers[1]["input"], texts[1]);
    let outputs: Vec<&str> = answers.iter().map(|a| a["output"].as_str().expect("text")).collect();
    assert_eq!(outputs.join("\n") + "\n", lines.stdout);
}

#[test]
fn draws_are_the_same_for_the_same_seed() {
    let model = demo("model");
    let draw = |seed: &str| {
        let args = [
            "generate",
            "--model",
            &model,
            "--input",
            "Hello",
            "--top-p",
            "0.95",
            "--temperature",
            "1.5",
            "--seed",
            seed,
        ];
        incipit(&args).ok().stdout
    };
    assert_eq!(draw("7"), draw("7"));
    let seeds = ["1", "2", "3", "4", "5", "6"].map(draw);
    assert!(seeds.iter().any(|text| *text != seeds[0]), "six seeds drew the same: {}", seeds[0]);
}

#[test]
fn a_reader_that_leaves_early_is_no_failure() {
    let lines = "Hello\n".repeat(400);
    let model = demo("model");
    let mut child = command(&["generate", "--model", &model, "--max-new-tokens", "2"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("the program starts");
    drop(child.stdout.take());
    // The program may leave before it has read all.
    let _ = std::io::Write::write_all(&mut child.stdin.take().expect("a pipe"), lines.as_bytes());
    let ran: Ran = child.wait_with_output().expect("the program ends").into();
    assert_eq!(ran.code, 0, "{}", ran.stderr);
    assert!(!ran.stderr.contains("panicked") && !ran.stderr.contains("error"), "{}", ran.stderr);
}

#[test]
fn a_prompt_survives_the_way_to_peft_and_back() {
    let dir = tempfile::tempdir().expect("a directory");
    train(dir.path(), "run", &["--steps", "1"]).ok();
    let (run, peft, npy) = (path(dir.path(), "run"), path(dir.path(), "peft"), path(dir.path(), "back.npy"));
    let written = incipit(&["convert", "prompt", &run, &peft, "--json"]).ok().json();
    assert_eq!(written["kind"], "peft");
    assert_eq!(written["rows"], 4);
    incipit(&["convert", "prompt", &peft, &npy]).ok();
    let original = std::fs::read(dir.path().join("run/prompt.npy")).expect("the run's prompt");
    assert_eq!(std::fs::read(&npy).expect("the converted prompt"), original);
    let checkpoint = path(dir.path(), "from-checkpoint.npy");
    incipit(&["convert", "prompt", &path(dir.path(), "run/last"), &checkpoint]).ok();
    assert_eq!(std::fs::read(&checkpoint).expect("the converted prompt"), original);
}

#[test]
fn a_peft_directory_needs_to_know_its_backbone() {
    let dir = tempfile::tempdir().expect("a directory");
    train(dir.path(), "run", &["--steps", "1"]).ok();
    let alone = dir.path().join("a/b/c/alone.npy");
    std::fs::create_dir_all(alone.parent().expect("a parent")).expect("directories");
    std::fs::rename(dir.path().join("run/prompt.npy"), &alone).expect("a moved file");
    let (alone, peft) = (alone.display().to_string(), path(dir.path(), "peft"));
    let ran = incipit(&["convert", "prompt", &alone, &peft]);
    assert_eq!(ran.code, 2);
    assert!(ran.stderr.contains("--model") && !Path::new(&peft).exists(), "{}", ran.stderr);
    incipit(&["convert", "prompt", &alone, &peft, "--model", &demo("model")]).ok();
}

#[test]
fn a_converted_model_keeps_its_numbers_and_is_cut_into_shards() {
    let dir = tempfile::tempdir().expect("a directory");
    let (f32_dir, back) = (path(dir.path(), "f32"), path(dir.path(), "bf16"));
    incipit(&["convert", "model", &demo("model"), &f32_dir, "--dtype", "f32", "--max-shard-size", "1MB"])
        .ok();
    assert!(Path::new(&f32_dir).join("model.safetensors.index.json").exists());
    incipit(&["convert", "model", &f32_dir, &back]).ok();
    let inspect = |dir: &str| incipit(&["inspect", "model", dir, "--json"]).ok().json();
    let (original, wide, again) = (inspect(&demo("model")), inspect(&f32_dir), inspect(&back));
    assert_eq!(original["fingerprint"], again["fingerprint"]);
    assert_ne!(original["fingerprint"], wide["fingerprint"]);
    assert_eq!(original["parameters"], wide["parameters"]);
    assert_eq!(original["tokenizer"], again["tokenizer"]);
}

#[test]
fn doctor_tells_what_this_build_lacks() {
    let seen = incipit(&["doctor", "--json"]).ok().json();
    assert_eq!(
        seen["build"],
        serde_json::json!({ "cpu": true, "cuda": false, "nccl": false, "gloo": cfg!(feature = "gloo") })
    );
    let told = incipit(&["doctor"]).ok().stdout;
    assert!(
        told.contains("built for the CPU alone") && told.contains(seen["kernels"].as_str().expect("a name")),
        "{told}"
    );
}

#[test]
fn bench_times_steps_and_counts_their_work() {
    let args =
        ["bench", "step", "--shape", &demo("model"), "--lengths", "3x10", "--jobs", "2", "--steps", "2"];
    let seen = incipit(&[&args[..], &["--prompt-length", "5", "--json"]].concat()).ok().json();
    assert_eq!(seen["tokens"], 3 * (10 + 5) + 3 * 4);
    assert_eq!(seen["seconds"].as_array().map(Vec::len), Some(2));
    let number = |key: &str| seen[key].as_f64().unwrap_or_else(|| panic!("{key} in {seen}"));
    assert!(number("min_s") > 0.0 && number("min_s") <= number("median_s"));
    assert!(number("peak_rss_mb") > 1.0 && number("loss").is_finite());
    let rate = number("useful_tflop") / number("median_s");
    assert!((number("tflop_s") / rate - 1.0).abs() < 1e-9, "{seen}");
}

#[test]
fn the_demo_shows_its_climb_and_where_the_report_is() {
    let dir = tempfile::tempdir().expect("a directory");
    let out = path(dir.path(), "demo");
    let seen = incipit(&["demo", "--out", &out, "--steps", "2", "--json"]).ok().json();
    assert_eq!(seen["accuracy"][0]["step"], 0);
    assert_eq!(seen["accuracy"][1]["step"], 2);
    assert!(Path::new(seen["report"].as_str().expect("a path")).exists());
    assert_eq!(incipit(&["demo", "--out", &out]).code, 2, "a directory that is taken");
}

/// A copy of the demo's model with a NaN in the norm after the encoder.
fn damaged_model(dir: &Path) -> String {
    const NAN: [u8; 2] = [0xc0, 0x7f];
    let copy = dir.join("damaged");
    std::fs::create_dir(&copy).expect("a directory");
    for name in ["config.json", "tokenizer.json"] {
        std::fs::copy(demo(&format!("model/{name}")), copy.join(name)).expect("a copy");
    }
    let mut bytes = std::fs::read(demo("model/model.safetensors")).expect("the demo's weights");
    let length = u64::from_le_bytes(bytes[..8].try_into().expect("8 bytes")) as usize;
    let header: serde_json::Value = serde_json::from_slice(&bytes[8..8 + length]).expect("a header");
    let begin = &header["encoder.final_layer_norm.weight"]["data_offsets"][0];
    let at = 8 + length + begin.as_u64().expect("an offset") as usize;
    bytes[at..at + 2].copy_from_slice(&NAN);
    std::fs::write(copy.join("model.safetensors"), bytes).expect("a file");
    copy.display().to_string()
}

#[test]
fn a_loss_that_is_not_finite_stops_the_run_with_an_exit_code_of_its_own() {
    let dir = tempfile::tempdir().expect("a directory");
    let model = damaged_model(dir.path());
    let (data, out) = (demo("data/train.jsonl"), path(dir.path(), "run"));
    let ran = incipit(&[
        "train",
        "--model",
        &model,
        "--train",
        &data,
        "--out",
        &out,
        "--prompt-length",
        "4",
        "--steps",
        "3",
    ]);
    assert_eq!(ran.code, 3, "{}", ran.stderr);
    for part in ["step 1", "before the update", "line"] {
        assert!(ran.stderr.contains(part), "no {part:?} in {}", ran.stderr);
    }
    assert!(ran.stdout.is_empty(), "{}", ran.stdout);
}

#[cfg(unix)]
#[test]
fn a_directory_below_a_file_is_bad_input_and_named() {
    let dir = tempfile::tempdir().expect("a directory");
    std::fs::write(dir.path().join("file"), "").expect("a file");
    let ran = train(dir.path(), "file/run", &["--steps", "1"]);
    assert_eq!(ran.code, 2, "{}", ran.stderr);
    assert!(ran.stderr.contains("file/run"), "{}", ran.stderr);
}

#[cfg(unix)]
#[test]
fn ctrl_c_saves_a_checkpoint_and_the_run_can_go_on() {
    use rustix::process::{Pid, Signal, kill_process};

    let dir = tempfile::tempdir().expect("a directory");
    let (model, data, out) = (demo("model"), demo("data/train.jsonl"), path(dir.path(), "run"));
    let args = [
        "train",
        "--model",
        &model,
        "--train",
        &data,
        "--out",
        &out,
        "--steps",
        "100000",
        "--prompt-length",
        "4",
        "--batch-size",
        "2",
        "--max-input-length",
        "16",
    ];
    let mut child =
        command(&args).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("the program starts");
    let steps = || {
        std::fs::read_to_string(Path::new(&out).join("metrics.jsonl")).map_or(0, |text| text.lines().count())
    };
    let start = Instant::now();
    while steps() < 3 && start.elapsed() < Duration::from_secs(60) {
        std::thread::sleep(Duration::from_millis(20));
        assert!(child.try_wait().expect("its state").is_none(), "the run ended by itself");
    }
    kill_process(Pid::from_child(&child), Signal::INT).expect("a signal");
    let ran: Ran = child.wait_with_output().expect("the program ends").into();
    assert_eq!(ran.code, 130, "{}", ran.stderr);
    assert!(ran.stderr.contains("--resume"), "{}", ran.stderr);
    let made = steps();
    assert!(Path::new(&out).join("last/MANIFEST").exists() && made >= 3);
    let more = (made + 2).to_string();
    let resumed = incipit(&["train", "--out", &out, "--resume", "--steps", &more]).ok();
    assert!(resumed.stderr.contains(&format!("going on after step {made}")), "{}", resumed.stderr);
}
