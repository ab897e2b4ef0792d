//! PEFT loads what we write and computes the same with it as with the adapter that it wrote itself, and we
//! read what it wrote.

mod common;

use incipit_tune::{
    npy,
    peft::{self, BaseModel},
    prompt::Prompt,
};
use serde_json::Value;
use std::{fs, path::PathBuf};

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../..")
}

fn golden(name: &str) -> PathBuf {
    root().join("tests/goldens/peft").join(name)
}

fn base() -> BaseModel {
    BaseModel { name: "v1_1_untied".to_owned(), num_layers: 2, num_heads: 3 }
}

#[test]
fn both_of_pefts_shapes_are_read() {
    for name in ["two_halves", "one_half"] {
        let prompt = Prompt::read(&golden(name)).unwrap();
        assert_eq!((prompt.length(), prompt.width()), (5, 24), "{name}");
    }
}

#[test]
fn an_adapter_of_peft_written_again_is_the_same_to_the_byte() {
    let dir = tempfile::tempdir().unwrap();
    let ours = dir.path().join("adapter");
    peft::write(&ours, &Prompt::read(&golden("one_half")).unwrap(), &base()).unwrap();
    for name in [peft::CONFIG, peft::WEIGHTS] {
        let (ours, theirs) =
            (fs::read(ours.join(name)).unwrap(), fs::read(golden("one_half").join(name)).unwrap());
        let same = ours.trim_ascii_end() == theirs.trim_ascii_end();
        assert!(same, "{name}:\n{}", String::from_utf8_lossy(&ours));
    }
}

/// The losses and the generated tokens with PEFT's own `[2P, D]` file, from the `[P, D]` file that we write
/// of it.
#[test]
fn peft_computes_the_same_with_our_file_as_with_its_own() {
    let Some(mut python) = common::python("peft, transformers, torch") else { return };
    let batch: Value = serde_json::from_slice(&fs::read(golden("batch.json")).unwrap()).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let data = dir.path().join("data.jsonl");
    let lines: Vec<String> = batch["examples"].as_array().unwrap().iter().map(Value::to_string).collect();
    fs::write(&data, lines.join("\n")).unwrap();
    let ours = dir.path().join("adapter");
    peft::write(&ours, &Prompt::read(&golden("two_halves")).unwrap(), &base()).unwrap();
    python.arg(root().join("scripts/goldens/check_peft_export.py"));
    python.arg("--model").arg(root().join("tests/goldens/v1_1_untied")).arg("--adapter").arg(&ours);
    python.arg("--data").arg(&data).args(["--max-new-tokens", "6"]);
    let found: Value = serde_json::from_str(common::output(&mut python).lines().last().unwrap()).unwrap();
    let expected = &batch["results"]["two_halves"];
    assert_eq!(found["greedy"], expected["greedy"]);
    for (found, expected) in
        found["losses"].as_array().unwrap().iter().zip(expected["losses"].as_array().unwrap())
    {
        let (found, expected) = (found.as_f64().unwrap(), expected.as_f64().unwrap());
        assert!((found - expected).abs() <= 1e-6 * expected, "{found} and {expected}");
    }
}

/// What PEFT computes with a prefix that it wrote, with the one that we write of the same keys and values: in twice as many layers.
#[test]
fn peft_computes_the_same_with_our_prefix_as_with_its_own() {
    let Some(mut python) = common::python("peft, transformers, torch") else { return };
    let golden = |name: &str| root().join("tests/goldens/peft_prefix").join(name);
    let batch: Value = serde_json::from_slice(&fs::read(golden("batch.json")).unwrap()).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let (data, ours) = (dir.path().join("data.jsonl"), dir.path().join("adapter"));
    let lines: Vec<String> = batch["examples"].as_array().unwrap().iter().map(Value::to_string).collect();
    fs::write(&data, lines.join("\n")).unwrap();
    let base = BaseModel { name: "model4".to_owned(), num_layers: 1, num_heads: 2 };
    peft::prefix::write(&ours, &peft::prefix::read(&golden("four_layers")).unwrap(), &base).unwrap();
    python.arg(root().join("scripts/goldens/check_peft_export.py"));
    python.arg("--model").arg(golden("model4")).arg("--adapter").arg(&ours);
    python.arg("--data").arg(&data).args(["--max-new-tokens", "6"]);
    let found: Value = serde_json::from_str(common::output(&mut python).lines().last().unwrap()).unwrap();
    let expected = &batch["results"]["four_layers"];
    assert_eq!(found["greedy"], expected["greedy"]);
    for (found, expected) in
        found["losses"].as_array().unwrap().iter().zip(expected["losses"].as_array().unwrap())
    {
        let (found, expected) = (found.as_f64().unwrap(), expected.as_f64().unwrap());
        assert!((found - expected).abs() <= 1e-6 * expected, "{found} and {expected}");
    }
}

#[test]
fn peft_holds_the_very_rows_that_we_wrote() {
    let Some(mut python) = common::python("peft, transformers, numpy") else { return };
    let dir = tempfile::tempdir().unwrap();
    let values: Vec<f32> = (0..3 * 24).map(|i| (i as f32 - 30.0) * 17.03 + 1e-5).collect();
    let prompt = Prompt::new(3, 24, values).unwrap();
    peft::write(&dir.path().join("adapter"), &prompt, &base()).unwrap();
    npy::write(&dir.path().join("prompt.npy"), &prompt).unwrap();
    let script = "
import sys, numpy, transformers, peft
model = transformers.AutoModelForSeq2SeqLM.from_pretrained(sys.argv[1])
model = peft.PeftModel.from_pretrained(model, sys.argv[2] + '/adapter')
rows = model.prompt_encoder['default'].embedding.weight.detach().numpy()
assert (rows == numpy.load(sys.argv[2] + '/prompt.npy')).all() and rows.shape == (3, 24), rows
model.save_pretrained(sys.argv[2] + '/again', save_embedding_layers=False)
numpy.save(sys.argv[2] + '/again.npy', rows)
numpy.save(sys.argv[2] + '/f8.npy', rows.astype(numpy.float64))
numpy.save(sys.argv[2] + '/fortran.npy', numpy.asfortranarray(rows))
";
    common::output(python.args(["-c", script]).arg(root().join("tests/goldens/v1_1_untied")).arg(dir.path()));
    for name in ["again", "again.npy", "f8.npy"] {
        assert_eq!(Prompt::read(&dir.path().join(name)).unwrap(), prompt, "{name}");
    }
    assert_eq!(
        fs::read(dir.path().join("again.npy")).unwrap(),
        fs::read(dir.path().join("prompt.npy")).unwrap(),
        "numpy writes the same bytes"
    );
    let error = Prompt::read(&dir.path().join("fortran.npy")).unwrap_err().to_string();
    assert!(error.contains("numpy.ascontiguousarray"), "{error}");
}

/// As PEFT wrote adapters before it had safetensors.
#[test]
fn an_adapter_in_a_pickle_is_read() {
    let Some(mut python) = common::python("torch, safetensors") else { return };
    let dir = tempfile::tempdir().unwrap();
    fs::copy(golden("two_halves").join(peft::CONFIG), dir.path().join(peft::CONFIG)).unwrap();
    let script = "
import sys, torch, safetensors.torch
torch.save(safetensors.torch.load_file(sys.argv[1]), sys.argv[2])
";
    let from = golden("two_halves").join(peft::WEIGHTS);
    common::output(python.args(["-c", script]).arg(from).arg(dir.path().join(peft::OLD_WEIGHTS)));
    assert_eq!(Prompt::read(dir.path()).unwrap(), Prompt::read(&golden("two_halves")).unwrap());
}
