//! What cannot be used gives one line of error that names the thing and the mend, the documented exit code, and no half-written file.

mod common;

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use candle_core::{DType, Device, Tensor};
use incipit_tune::prompt::Prompt;
use serde_json::{Value, json};

use common::{Ran, arg, copy, demo, few, incipit, same, tree};

/// Exit codes, as `incipit --help` lists them.
const FAILED: i32 = 1;
const UNUSABLE: i32 = 2;
const NOT_FINITE: i32 = 3;

/// A directory with a copy of the demo's model and some of its data, to be spoilt.
struct Spoilt {
    dir: tempfile::TempDir,
}

impl Spoilt {
    fn new() -> Result<Self> {
        let dir = tempfile::tempdir()?;
        copy(demo("model").as_ref(), &dir.path().join("model"))?;
        std::fs::rename(few(dir.path(), "data/train.jsonl", 40)?, dir.path().join("train.jsonl"))?;
        Ok(Self { dir })
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn write(&self, name: &str, text: &str) -> Result<()> {
        Ok(std::fs::write(self.path(name), text)?)
    }

    /// Trains on the copy, in `out` beside it.
    fn train(&self, more: &[&str]) -> Result<Ran> {
        self.train_in(&self.path("out"), more)
    }

    /// A short run into `out`; `more` overrides what it is told besides.
    fn train_in(&self, out: &Path, more: &[&str]) -> Result<Ran> {
        let (model, train, out) = (arg(self.path("model")), arg(self.path("train.jsonl")), arg(out));
        let values = [("--model", &*model), ("--train", &train), ("--out", &out), ("--steps", "3")];
        let sizes = [("--prompt-length", "8"), ("--batch-size", "4")];
        let mut args = vec!["train"];
        for (flag, value) in values.into_iter().chain(sizes) {
            if !more.contains(&flag) {
                args.extend([flag, value]);
            }
        }
        args.extend(more);
        incipit(&args)
    }

    /// Training is refused in these words, and leaves no directory.
    fn refused(&self, more: &[&str], parts: &[&str]) -> Result<()> {
        self.train(more)?.refused(UNUSABLE, parts)?;
        ensure!(!self.path("out").exists(), "a refused run leaves its directory");
        Ok(())
    }

    fn change_config(&self, change: impl FnOnce(&mut Value)) -> Result<()> {
        let path = self.path("model/config.json");
        let mut config = serde_json::from_str(&std::fs::read_to_string(&path)?)?;
        change(&mut config);
        Ok(std::fs::write(path, config.to_string())?)
    }

    fn change_weights(&self, change: impl FnOnce(&mut HashMap<String, Tensor>) -> Result<()>) -> Result<()> {
        let path = self.path("model/model.safetensors");
        let mut tensors = candle_core::safetensors::load(&path, &Device::Cpu)?;
        change(&mut tensors)?;
        // Beside it first: what was read may still be mapped.
        let changed = self.path("changed.safetensors");
        candle_core::safetensors::save(&tensors, &changed)?;
        Ok(std::fs::rename(changed, path)?)
    }

    /// Puts `value` into every element of a row of a matrix of the model.
    fn fill_row(&self, name: &str, row: usize, value: f32) -> Result<()> {
        self.change_weights(|tensors| {
            let matrix = tensors.get(name).with_context(|| name.to_owned())?;
            let mut rows = matrix.to_dtype(DType::F32)?.to_vec2::<f32>()?;
            rows[row].fill(value);
            let changed = Tensor::new(rows, &Device::Cpu)?.to_dtype(matrix.dtype())?;
            tensors.insert(name.to_owned(), changed);
            Ok(())
        })
    }
}

#[test]
fn missing_weights_are_named_with_what_was_expected() -> Result<()> {
    let spoilt = Spoilt::new()?;
    std::fs::remove_file(spoilt.path("model/model.safetensors"))?;
    spoilt.refused(&[], &["model has no weights", "model.safetensors", "tokenizer.json", "download"])?;
    let inspected = incipit(&["inspect", "model", &arg(spoilt.path("model"))])?;
    inspected.refused(UNUSABLE, &["model has no weights"])?;
    let spoilt = Spoilt::new()?;
    std::fs::remove_file(spoilt.path("model/config.json"))?;
    spoilt.refused(&[], &["model has no config.json", "copy the one that was published"])
}

#[test]
fn a_missing_shard_is_named() -> Result<()> {
    let spoilt = Spoilt::new()?;
    let (model, sharded) = (arg(spoilt.path("model")), spoilt.path("sharded"));
    incipit(&["convert", "model", &model, &arg(&sharded), "--max-shard-size", "1MB"])?.ok()?;
    let shards: Vec<PathBuf> = std::fs::read_dir(&sharded)?
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| path.extension().is_some_and(|e| e == "safetensors"))
        .collect();
    ensure!(shards.len() > 2, "{shards:?}");
    std::fs::remove_file(&shards[1])?;
    let name = arg(shards[1].strip_prefix(&sharded)?);
    let index = "model.safetensors.index.json";
    spoilt.refused(&["--model", &arg(&sharded)], &[index, &name, "download the missing shard"])
}

#[test]
fn truncated_weights_are_told_from_whole_ones() -> Result<()> {
    let spoilt = Spoilt::new()?;
    let path = spoilt.path("model/model.safetensors");
    let whole = std::fs::read(&path)?;
    for kept in [whole.len() - 1, whole.len() / 2, 1000, 5, 0] {
        std::fs::write(&path, &whole[..kept])?;
        spoilt.refused(&[], &["model.safetensors is cut short", "download it again"])?;
    }
    Ok(())
}

#[test]
fn a_tensor_of_another_shape_is_named_with_both_shapes() -> Result<()> {
    let spoilt = Spoilt::new()?;
    spoilt.change_config(|config| config["d_ff"] = json!(321))?;
    spoilt.refused(&[], &["DenseReluDense.wi_0.weight", "[320, 128]", "[321, 128]", "config.json"])
}

#[test]
fn a_tensor_that_is_not_there_is_named_with_its_neighbours() -> Result<()> {
    let spoilt = Spoilt::new()?;
    spoilt.change_config(|config| config["num_decoder_layers"] = json!(4))?;
    spoilt.refused(&[], &["no tensor decoder.block.3.", "decoder.block.2.", "config.json and the weights"])
}

#[test]
fn f16_is_refused_with_the_reason_and_the_way_out() -> Result<()> {
    let spoilt = Spoilt::new()?;
    spoilt.change_weights(|tensors| {
        for tensor in tensors.values_mut() {
            *tensor = tensor.to_dtype(DType::F16)?;
        }
        Ok(())
    })?;
    spoilt.refused(&[], &["f16", "overflow", "incipit convert model", "model.safetensors"])?;
    let (model, converted) = (arg(spoilt.path("model")), arg(spoilt.path("converted")));
    incipit(&["convert", "model", &model, &converted])?.ok()?;
    spoilt.train(&["--model", &converted])?.ok()?;
    Ok(())
}

#[test]
fn an_unknown_activation_is_named_with_the_known_ones() -> Result<()> {
    let spoilt = Spoilt::new()?;
    spoilt.change_config(|config| {
        config["feed_forward_proj"] = json!("gated-mish");
        config["dense_act_fn"] = json!("mish");
    })?;
    spoilt.refused(&[], &["mish", "gated-gelu", "relu"])
}

#[test]
fn a_configuration_that_is_none_is_named() -> Result<()> {
    let spoilt = Spoilt::new()?;
    spoilt.change_config(|config| config["d_model"] = json!("wide"))?;
    spoilt.refused(&[], &["model: config.json", "\"wide\"", "line 1", "published with the model"])?;
    spoilt.write("model/config.json", "{ \"d_model\": 12")?;
    spoilt.refused(&[], &["config.json", "line 1"])?;
    spoilt.write("model/config.json", r#"{ "model_type": "llama", "hidden_size": 64 }"#)?;
    spoilt.refused(&[], &["llama", "\"t5\""])
}

#[test]
fn a_tokenizer_of_another_model_is_noticed() -> Result<()> {
    let spoilt = Spoilt::new()?;
    spoilt.change_config(|config| config["vocab_size"] = json!(500))?;
    spoilt.change_weights(|tensors| {
        for name in ["shared.weight", "lm_head.weight"] {
            let rows = tensors.get(name).context(name)?.narrow(0, 0, 500)?.contiguous()?;
            tensors.insert(name.to_owned(), rows);
        }
        Ok(())
    })?;
    spoilt.refused(&[], &["the tokenizer does not match", "ends at 499", "came with the model"])
}

#[test]
fn a_tokenizer_that_is_missing_or_none_is_named() -> Result<()> {
    let spoilt = Spoilt::new()?;
    spoilt.write("model/tokenizer.json", "{}")?;
    spoilt.refused(&[], &["tokenizer.json is not a tokenizer", "take the tokenizer.json of"])?;
    std::fs::remove_file(spoilt.path("model/tokenizer.json"))?;
    spoilt.write("model/spiece.model", "no protobuf")?;
    spoilt.refused(&[], &["spiece.model is not a tokenizer"])?;
    std::fs::remove_file(spoilt.path("model/spiece.model"))?;
    spoilt.refused(&[], &["neither tokenizer.json nor spiece.model", "copy"])
}

#[test]
fn data_without_records_are_refused() -> Result<()> {
    let spoilt = Spoilt::new()?;
    spoilt.write("train.jsonl", "")?;
    spoilt.refused(&[], &["train.jsonl is empty", "one record a line"])?;
    spoilt.write("train.jsonl", "\n\n")?;
    spoilt.refused(&[], &["train.jsonl holds no records"])?;
    spoilt.write("eval.csv", "inputs,targets\n")?;
    spoilt.write("train.jsonl", &std::fs::read_to_string(demo("data/eval.jsonl"))?)?;
    spoilt.refused(&["--eval", &arg(spoilt.path("eval.csv"))], &["eval.csv holds no records"])
}

#[test]
fn a_malformed_record_is_named_with_its_line() -> Result<()> {
    let spoilt = Spoilt::new()?;
    let good = std::fs::read_to_string(spoilt.path("train.jsonl"))?;
    spoilt.write("train.jsonl", &format!("{good}{{\"inputs\": \"half a rec\n"))?;
    spoilt.refused(&[], &["train.jsonl, line 41"])?;
    let skipped = spoilt.train(&["--skip-bad-records"])?.ok()?;
    ensure!(skipped.stderr.contains("1 training records were left out"), "{}", skipped.stderr);
    std::fs::remove_dir_all(spoilt.path("out"))?;
    spoilt.write("train.jsonl", &format!("{good}[1, 2]\n"))?;
    spoilt.refused(&[], &["train.jsonl, line 41"])?;
    spoilt.write("train.jsonl", "{\"inputs\": 1\n")?;
    spoilt.refused(&["--skip-bad-records"], &["train.jsonl", "all 1 records are bad", "line 1"])
}

#[test]
fn what_is_wrong_with_examples_is_said_before_the_weights_are_read() -> Result<()> {
    let spoilt = Spoilt::new()?;
    spoilt.change_config(|config| config["num_decoder_layers"] = json!(4))?;
    let (model, data) = (arg(spoilt.path("model")), arg(spoilt.path("train.jsonl")));
    let out = arg(spoilt.path("out"));
    let training = ["--model", &model, "--train", &data, "--out", &out, "--prompt-length", "8"];
    let commands = [
        [&["train"][..], &training].concat(),
        [&["ensemble", "train"][..], &training].concat(),
        vec!["eval", "--model", &model, "--data", &data],
        vec!["generate", "--model", &model, "--data", &data],
    ];
    for command in &commands {
        incipit(command)?.refused(UNUSABLE, &["no tensor decoder.block.3."])?;
    }
    spoilt.write("train.jsonl", "{\"inputs\": 1\n")?;
    for command in &commands {
        incipit(command)?.refused(UNUSABLE, &["train.jsonl, line 1"])?;
    }
    Ok(())
}

#[test]
fn settings_that_do_not_fit_the_examples_are_refused_before_the_weights_are_read() -> Result<()> {
    let spoilt = Spoilt::new()?;
    spoilt.change_config(|config| config["num_decoder_layers"] = json!(4))?;
    let free: Vec<_> =
        (0..40).map(|i| format!("{{\"inputs\": \"number {i}\", \"targets\": \"{i}\"}}\n")).collect();
    spoilt.write("train.jsonl", &free.concat())?;
    let prompt = Prompt::new(3, 128, vec![0.5; 3 * 128])?;
    incipit_tune::npy::write(&spoilt.path("p.npy"), &prompt)?;
    let (model, data) = (arg(spoilt.path("model")), arg(spoilt.path("train.jsonl")));
    let (out, file) = (arg(spoilt.path("out")), format!("file:{}", arg(spoilt.path("p.npy"))));
    let common = ["--model", &model, "--train", &data, "--out", &out, "--prompt-length", "8"];
    let cases = [
        (&[][..], &["class-label", "no labels", "--prompt-init vocab"][..]),
        (&["--prompt-init", &file], &["p.npy", "has 3 rows, not 8; give --prompt-length 3"]),
        (&["--prompt-init", "text:\u{200b}"], &["no pieces"]),
        (&["--prompt-init", "vocab", "--batch-size", "41"], &["--batch-size is 41", "pass at most 40"]),
        (&["--prompt-init", "vocab", "--eval", &data, "--predict", "rank"], &["--predict rank", "--labels"]),
        (&["--prompt-init", "vocab"], &["no tensor decoder.block.3."]),
    ];
    for (given, parts) in cases {
        for command in [&["train"][..], &["ensemble", "train"]] {
            incipit(&[command, &common, given].concat())?.refused(UNUSABLE, parts)?;
        }
    }
    Ok(())
}

#[test]
fn a_label_outside_of_the_label_set_is_named_with_the_set() -> Result<()> {
    let spoilt = Spoilt::new()?;
    spoilt.write("train.jsonl", "{\"text\": \"a\", \"label\": 0}\n{\"text\": \"b\", \"label\": 2}\n")?;
    let format = ["--inputs", "{text}", "--targets", "{label}", "--labels", "0=no,1=yes"];
    spoilt.refused(&format, &["train.jsonl, line 2", "2", "0", "1"])?;
    spoilt.refused(&["--labels", "0=no,0=yes"], &["--labels", "0"])
}

#[test]
fn a_field_that_no_record_has_is_named_with_those_there_are() -> Result<()> {
    let spoilt = Spoilt::new()?;
    spoilt.refused(&["--inputs", "say: {inptus}"], &["train.jsonl, line 1", "inptus", "inputs"])?;
    spoilt.refused(&["--inputs", "say: {inputs"], &["--inputs", "not closed"])?;
    spoilt.refused(&["--inputs", "say"], &["--inputs", "no field"])
}

#[test]
fn a_prompt_that_does_not_fit_is_refused() -> Result<()> {
    let spoilt = Spoilt::new()?;
    spoilt.refused(&["--prompt-length", "100000"], &["--prompt-length 100000", "does not fit"])?;
    spoilt.refused(&["--prompt-length", "0"], &["--prompt-length", "at least 1"])?;
    let file = spoilt.path("p.npy");
    let init = format!("file:{}", arg(&file));
    let write = |rows: usize, cols: usize, value: f32| -> Result<()> {
        let header = format!("{{'descr': '<f4', 'fortran_order': False, 'shape': ({rows}, {cols}), }}");
        let header = format!("{header:<117}\n");
        let numbers = vec![value; rows * cols].into_iter().flat_map(f32::to_le_bytes);
        let bytes = b"\x93NUMPY\x01\x00v\x00".iter().copied().chain(header.bytes()).chain(numbers);
        Ok(std::fs::write(&file, bytes.collect::<Vec<u8>>())?)
    };
    write(8, 64, 1.0)?;
    spoilt.refused(&["--prompt-init", &init], &["p.npy", "64 columns", "128"])?;
    write(9, 128, 1.0)?;
    spoilt.refused(&["--prompt-init", &init], &["p.npy", "9 rows", "--prompt-length 9"])?;
    write(8, 128, f32::NAN)?;
    spoilt.refused(&["--prompt-init", &init], &["p.npy", "row 0, column 0 is NaN"])?;
    let eval =
        ["eval", "--model", &demo("model"), "--prompt", &arg(&file), "--data", &demo("data/eval.jsonl")];
    incipit(&eval)?.refused(UNUSABLE, &["p.npy", "NaN"])?;
    std::fs::write(&file, &std::fs::read(&file)?[..500])?;
    spoilt.refused(&["--prompt-init", &init], &["p.npy"])?;
    write(8, 128, 1.0)?;
    spoilt.train(&["--prompt-init", &init])?.ok()?;
    Ok(())
}

#[test]
fn a_run_does_not_go_on_with_another_backbone_or_recipe() -> Result<()> {
    let spoilt = Spoilt::new()?;
    spoilt.train(&[])?.ok()?;
    let before = tree(&spoilt.path("out"))?;
    let refused = |more: &[&str], parts: &[&str]| -> Result<()> {
        spoilt.train(&[&["--resume", "--steps", "6"], more].concat())?.refused(UNUSABLE, parts)?;
        same(&tree(&spoilt.path("out"))?, &before)
    };
    refused(&["--recipe", "released-code"], &["the run began with --", "another --out"])?;
    refused(&["--lr", "0.1"], &["--lr 0.3", "0.1"])?;
    refused(&["--prompt-length", "9"], &["--prompt-length 8", "9"])?;
    spoilt.fill_row("lm_head.weight", 1000, 0.25)?;
    refused(&[], &["the run began on the backbone", "--model", "--allow-other-backbone"])?;
    spoilt.train(&["--resume", "--steps", "6", "--allow-other-backbone"])?.ok()?;
    Ok(())
}

#[test]
fn a_weight_that_is_not_a_number_stops_the_first_step() -> Result<()> {
    let spoilt = Spoilt::new()?;
    spoilt.fill_row("encoder.block.1.layer.1.DenseReluDense.wo.weight", 7, f32::NAN)?;
    let ran = spoilt.train(&["--checkpoint-every", "1"])?;
    ran.refused(
        NOT_FINITE,
        &["step 1 was stopped before the update", "NaN", "line ", "the model's weights"],
    )?;
    for absent in ["prompt.npy", "adapter", "last", "best"] {
        ensure!(!spoilt.path("out").join(absent).exists(), "{absent} was written");
    }
    Ok(())
}

#[test]
fn a_number_that_is_none_in_the_middle_leaves_the_state_before_it() -> Result<()> {
    let spoilt = Spoilt::new()?;
    // The embedding of what the vocabulary does not have; one record alone has such a sign.
    spoilt.fill_row("shared.weight", 2, f32::NAN)?;
    let good = std::fs::read_to_string(spoilt.path("train.jsonl"))?;
    let lines: Vec<&str> = good.lines().collect();
    let bad = r#"{"inputs": "a sign ☃", "targets": "repair"}"#;
    spoilt.write("train.jsonl", &([&lines[..9], &[bad], &lines[9..]].concat().join("\n") + "\n"))?;
    let order = ["--shuffle", "false", "--checkpoint-every", "1", "--steps", "5"];
    let stopped = spoilt.train(&order)?;
    stopped.refused(NOT_FINITE, &["step 3 was stopped before the update", "NaN", "line 10"])?;
    let out = spoilt.path("out");
    let kept = std::fs::read(out.join("prompt.npy"))?;
    ensure!(std::fs::read_link(out.join("last"))?.ends_with("step-00000002"), "another last step");
    spoilt.train_in(&spoilt.path("two"), &["--shuffle", "false", "--steps", "2"])?.ok()?;
    ensure!(std::fs::read(spoilt.path("two/prompt.npy"))? == kept, "not the prompt of two steps");
    Ok(())
}

/// A small file system of its own; unmounted when dropped.
struct Disk(tempfile::TempDir);

impl Disk {
    /// None, with a message, where mounting is not permitted.
    fn new(options: &str) -> Result<Option<Self>> {
        let dir = tempfile::tempdir()?;
        let mount =
            Command::new("mount").args(["-t", "tmpfs", "-o", options, "tmpfs"]).arg(dir.path()).output();
        if mount.is_ok_and(|output| output.status.success()) {
            return Ok(Some(Self(dir)));
        }
        eprintln!("skipped: mounting a file system is not permitted here");
        Ok(None)
    }

    fn path(&self) -> &Path {
        self.0.path()
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(self.path()).status();
    }
}

#[test]
fn a_full_disk_stops_the_run_which_goes_on_when_there_is_space() -> Result<()> {
    let Some(disk) = Disk::new("size=512k")? else { return Ok(()) };
    let spoilt = Spoilt::new()?;
    let out = disk.path().join("out");
    let every = ["--steps", "60", "--checkpoint-every", "1"];
    let full = spoilt.train_in(&out, &[&every[..], &["--keep", "1000"]].concat())?;
    full.refused(FAILED, &["No space left", "free some space", "out"])?;
    let half_written = |name: &String| name.contains(".tmp-");
    ensure!(!tree(&out)?.keys().any(half_written), "{:?}", tree(&out)?.keys());
    let prompt = incipit(&["inspect", "prompt", &arg(&out), "--json"])?.ok()?;
    ensure!(prompt.stdout.contains("\"rows\": 8"), "{}", prompt.stdout);
    let mut checkpoints: Vec<PathBuf> =
        std::fs::read_dir(out.join("checkpoints"))?.filter_map(|entry| Some(entry.ok()?.path())).collect();
    checkpoints.sort();
    let (last, older) = checkpoints.split_last().context("a checkpoint")?;
    println!("full with {} checkpoints; going on from {}", checkpoints.len(), last.display());
    ensure!(older.len() > 2, "the disk is full at once");
    for checkpoint in older {
        std::fs::remove_dir_all(checkpoint)?;
    }
    spoilt.train_in(&out, &[&every[..], &["--keep", "2", "--resume"]].concat())?.ok()?;
    spoilt.train_in(&spoilt.path("elsewhere"), &[&every[..], &["--keep", "2"]].concat())?.ok()?;
    same(&tree(&out)?, &tree(&spoilt.path("elsewhere"))?)
}

#[test]
fn a_directory_that_may_not_be_written_to_is_named() -> Result<()> {
    let spoilt = Spoilt::new()?;
    spoilt.write("taken", "a file")?;
    spoilt.train_in(&spoilt.path("taken"), &[])?.refused(UNUSABLE, &["taken", "choose another directory"])?;
    let under = spoilt.path("taken/out");
    spoilt.train_in(&under, &[])?.refused(UNUSABLE, &["taken/out", "choose another directory"])?;
    ensure!(std::fs::read_to_string(spoilt.path("taken"))? == "a file");
    let Some(disk) = Disk::new("ro,size=64k")? else { return Ok(()) };
    let parts = ["Read-only", "a directory that you may write to", "out"];
    spoilt.train_in(&disk.path().join("out"), &[])?.refused(FAILED, &parts)?;
    let to = arg(disk.path().join("model"));
    let parts = ["read-only", "choose a directory that you may use"];
    incipit(&["convert", "model", &demo("model"), &to])?.refused(FAILED, &parts)
}
