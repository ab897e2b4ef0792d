//! What cannot be used is refused with one message that says what to change, and exit code 2.

mod common;

use common::{Ran, command, demo, incipit, path, refused, train};

#[test]
fn flags_that_mean_nothing_are_refused() {
    refused(&incipit(&["tran"]), &["tran"]);
    refused(&incipit(&["train", "--modle", "x"]), &["--model"]);
    refused(&incipit(&["train", "--steps", "many"]), &["--steps"]);
    refused(&incipit(&["train", "--recipe", "mine"]), &["paper", "released-code"]);
    refused(&incipit(&["doctor", "--threads", "0"]), &["--threads"]);
    refused(&incipit(&["doctor", "-v", "-q"]), &["--quiet"]);
}

#[test]
fn what_a_run_lacks_is_named() {
    refused(&incipit(&["train"]), &["--model"]);
    refused(&incipit(&["train", "--model", &demo("model")]), &["--train"]);
    refused(&incipit(&["eval", "--data", "x.jsonl"]), &["--model"]);
}

#[test]
fn what_could_have_no_effect_is_refused() {
    let dir = tempfile::tempdir().expect("a directory");
    let (model, data) = (demo("model"), demo("data/train.jsonl"));
    let out = dir.path().join("run").display().to_string();
    let unevaluated = ["train", "--model", &model, "--train", &data, "--out", &out];
    for flags in [["--eval-every", "5"], ["--metrics", "accuracy"], ["--predict", "rank"]] {
        refused(&incipit(&[&unevaluated[..], &flags].concat()), &[flags[0], "--eval"]);
    }
    refused(&incipit(&["train", "--resume", "--out", &out]), &["--resume finds no run", &out, "--out"]);
    let many = ["generate", "--model", &model, "--input", "x", "--num-beams", "1000000"];
    refused(&incipit(&many), &["--num-beams is 1000000", "at most 256"]);
    assert!(!dir.path().join("run").exists(), "a refused run leaves nothing");
}

#[test]
fn what_is_not_built_is_refused_and_never_replaced() {
    let dir = tempfile::tempdir().expect("a directory");
    for (flag, value) in [("--device", "cuda:0"), ("--collective", "nccl"), ("--collective", "mpi")] {
        refused(&train(dir.path(), "run", &[flag, value]), &[flag]);
    }
    if !cfg!(feature = "gloo") {
        let ran = train(dir.path(), "run", &["--collective", "gloo"]);
        refused(&ran, &["without gloo", "--features gloo", "--collective local"]);
        refused(&incipit(&["launch", "--nproc", "2", "--", "train"]), &["without gloo", "--features gloo"]);
    }
    refused(&train(dir.path(), "run", &["--dtype", "f16"]), &["bf16", "f32"]);
    assert!(!dir.path().join("run").exists(), "a refused run leaves nothing");
}

#[test]
fn ranks_that_the_model_does_not_divide_by_are_refused_with_those_that_do() {
    let dir = tempfile::tempdir().expect("a directory");
    refused(&train(dir.path(), "run", &["--tp", "3"]), &["heads", "--tp of 1, 2 or 4"]);
    refused(&train(dir.path(), "run", &["--dp", "0"]), &["--dp is 0"]);
    let model = demo("model");
    refused(&incipit(&["generate", "--model", &model, "--input", "x", "--tp", "0"]), &["--tp is 0"]);
}

#[test]
fn one_of_several_processes_does_not_do_the_work_of_all() {
    let dir = tempfile::tempdir().expect("a directory");
    let args = common::train_args(dir.path(), "run", &[]);
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    let ran = command(&args).envs([("RANK", "0"), ("WORLD_SIZE", "2")]).output().expect("the program starts");
    refused(&ran.into(), &["RANK=0 and WORLD_SIZE=2", "--collective gloo"]);
    let slurm = [("SLURM_PROCID", "1"), ("SLURM_NTASKS", "2")];
    let ran: Ran = command(&args).envs(slurm).output().expect("the program starts").into();
    refused(&ran, &["[rank 1] error: SLURM_PROCID=1 and SLURM_NTASKS=2"]);
    assert!(!dir.path().join("run").exists(), "a refused run leaves nothing");
}

#[test]
fn files_that_are_not_there_are_named() {
    let model = demo("model");
    let absent = "/nowhere/at-all.jsonl";
    refused(&incipit(&["eval", "--model", &model, "--data", absent]), &[absent]);
    refused(&incipit(&["inspect", "prompt", "/nowhere/prompt.npy"]), &["/nowhere/prompt.npy"]);
    refused(&incipit(&["inspect", "model", "/nowhere/model"]), &["/nowhere/model"]);
    refused(&incipit(&["train", "--config", "/nowhere/run.toml"]), &["/nowhere/run.toml"]);
}

#[test]
fn a_configuration_with_an_unknown_key_is_refused_with_the_key_that_is_meant() {
    let dir = tempfile::tempdir().expect("a directory");
    let config = dir.path().join("run.toml");
    std::fs::write(&config, "batchsize = 4\n").expect("a file");
    refused(&incipit(&["train", "--config", &config.display().to_string()]), &["batchsize", "batch-size"]);
}

#[test]
fn a_directory_that_holds_something_is_not_written_to() {
    let dir = tempfile::tempdir().expect("a directory");
    std::fs::create_dir(dir.path().join("run")).expect("a directory");
    std::fs::write(dir.path().join("run/thesis.txt"), "years of work").expect("a file");
    refused(&train(dir.path(), "run", &["--steps", "1"]), &["not empty", "--resume"]);
    let entries = std::fs::read_dir(dir.path().join("run")).expect("the directory");
    assert_eq!(entries.count(), 1, "only what was there");
}

#[test]
fn sizes_of_a_benchmark_must_make_sense() {
    let bench = |more: &[&str]| incipit(&[&["bench", "step"], more].concat());
    refused(&bench(&["--shape", "tiny", "--lengths", "8"]), &["--shape tiny", "small, base"]);
    refused(&bench(&["--shape", "small", "--lengths", "8x"]), &["--lengths"]);
    refused(&bench(&["--shape", "small", "--lengths", "8,9", "--jobs", "3"]), &["--jobs", "1 to 2"]);
    refused(&bench(&["--shape", "small", "--lengths", "8", "--steps", "0"]), &["--steps"]);
}

#[test]
fn draws_and_beams_must_make_sense() {
    let generate =
        |more: &[&str]| incipit(&[&["generate", "--model", &demo("model"), "--input", "x"], more].concat());
    refused(&generate(&["--top-p", "1.5"]), &["--top-p"]);
    refused(&generate(&["--temperature", "0"]), &["--temperature"]);
    refused(&generate(&["--num-beams", "0"]), &["--num-beams"]);
    refused(&generate(&["--num-beams", "2", "--top-p", "0.5"]), &["--num-beams"]);
}

#[test]
fn a_kernel_path_that_does_not_exist_is_refused_without_a_panic() {
    let ran: Ran =
        command(&["doctor"]).env("INCIPIT_ISA", "quantum").output().expect("the program starts").into();
    refused(&ran, &["INCIPIT_ISA=quantum", "portable"]);
}

#[test]
fn a_destination_that_is_taken_is_left_alone() {
    let dir = tempfile::tempdir().expect("a directory");
    let taken = dir.path().join("p.npy");
    let other = dir.path().join("q.npy");
    std::fs::write(&taken, "mine").expect("a file");
    train(dir.path(), "run", &["--steps", "1"]).ok();
    let run = dir.path().join("run").display().to_string();
    refused(&incipit(&["convert", "prompt", &run, &taken.display().to_string()]), &["there already"]);
    assert_eq!(common::text(taken), "mine");
    incipit(&["convert", "prompt", &run, &other.display().to_string()]).ok();
}

#[test]
fn tasks_that_cannot_be_one_job_are_refused_before_a_coordinator_is_asked() {
    let dir = tempfile::tempdir().expect("a directory");
    let file = path(dir.path(), "tasks.toml");
    let (train, other) = (demo("data/train.jsonl"), demo("data/eval.jsonl"));
    let tables = |more: &str| format!("[a]\ntrain = '{train}'\n[b]\ntrain = '{other}'\n{more}");
    let refuse = |text: String, more: &[&str], words: &[&str]| {
        std::fs::write(&file, text).expect("a file");
        refused(
            &incipit(&[&["job", "submit", "--tasks", &file, "--prompt-length", "6"], more].concat()),
            words,
        );
    };
    let shared = ["--shared-length", "3"];
    refuse(tables(""), &[], &["--shared-length is missing"]);
    refuse(tables(""), &["--shared-length", "6"], &["--shared-length is 6", "less than --prompt-length"]);
    refuse(tables("lr = 0.1\n"), &shared, &["--lr differs between tasks", "once, on the command line"]);
    refuse(tables(""), &[&shared[..], &["--train", &train]].concat(), &["--train", "are for one task"]);
    refuse(tables(""), &[&shared[..], &["--patience", "2"]].concat(), &["--patience", "before the others"]);
    refuse(format!("[a]\ntrain = '{train}'\n"), &shared, &["fewer than two tasks"]);
    refuse(tables("").replace("[a]", "['../a']"), &shared, &["names a task \"../a\"", "letters"]);
    refuse(tables("").replace(&other, "/none.jsonl"), &shared, &["/none.jsonl"]);
    let alone = ["job", "submit", "--train", &train, "--shared-length", "3"].map(str::to_owned);
    refused(&incipit(&alone.iter().map(String::as_str).collect::<Vec<_>>()), &["--shared-length", "--tasks"]);
}
