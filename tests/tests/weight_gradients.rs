//! Gradients to weights are those of transformers, for the model's own weights and for adapters laid into it: the goldens in
//! `tests/goldens/*/weights.safetensors`, which `scripts/goldens/weights.py` made. Those of prefixes are compared with differences of
//! the loss. Run with `--nocapture` to see how far they are apart.

#![allow(clippy::unwrap_used, reason = "a helper that cannot go on fails its test")]

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use incipit_kernels::Frozen;
use incipit_model::{
    Config, Example, GenerateOptions, Microbatch, PassOptions, T5, TensorAxis, WeightGradients,
};
use incipit_weights::{Checkpoint, Overlay};

/// A tied and scaled head with plain relu layers, and a head of its own with gated ones.
const GOLDENS: [&str; 2] = ["v1_0_tied", "v1_1_untied"];
const TOLERANCE: f64 = 1e-4;

struct Golden {
    dir: PathBuf,
    tensors: HashMap<String, Tensor>,
    inputs: Vec<Vec<u32>>,
    targets: Vec<Vec<u32>>,
}

impl Golden {
    fn load(name: &str) -> Self {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("goldens").join(name);
        let tensors = candle_core::safetensors::load(dir.join("weights.safetensors"), &Device::Cpu).unwrap();
        let meta = std::fs::read_to_string(dir.join("meta.json")).unwrap();
        let meta: serde_json::Value = serde_json::from_str(&meta).unwrap();
        let rows = |key: &str| serde_json::from_value(meta[key].clone()).unwrap();
        Self { inputs: rows("inputs"), targets: rows("targets"), dir, tensors }
    }

    /// The tensors whose names begin with `kind`, without it.
    fn of(&self, kind: &str) -> BTreeMap<String, Tensor> {
        let named =
            |(name, tensor): (&String, &Tensor)| Some((name.strip_prefix(kind)?.to_owned(), tensor.clone()));
        self.tensors.iter().filter_map(named).collect()
    }

    /// The model, with these tensors laid into it.
    fn model(&self, over: &BTreeMap<String, Tensor>) -> T5 {
        let checkpoint = Checkpoint::open(&self.dir, DType::F32).unwrap();
        let config = Config::from_json(&checkpoint.config_json().unwrap()).unwrap();
        let mut source = Overlay::new(&checkpoint);
        for (name, tensor) in over {
            let values: Vec<f32> = tensor.flatten_all().unwrap().to_vec1().unwrap();
            let (rows, cols) = tensor.dims2().unwrap_or((1, tensor.elem_count()));
            source.put(name, tensor.dims(), Frozen::from_f32(values, rows, cols));
        }
        T5::load_on(config, &source, DType::F32, &TensorAxis::whole(), &Device::Cpu).unwrap()
    }

    fn examples(&self) -> Vec<Example<'_>> {
        let pairs = self.inputs.iter().zip(&self.targets).enumerate();
        pairs.map(|(i, (input, target))| Example { prompt: None, input, target, key: i as u64 }).collect()
    }

    /// The mean loss, and the gradients of it to `wanted`.
    fn gradients(
        &self,
        model: &T5,
        wanted: &[String],
        options: &PassOptions,
    ) -> (f64, BTreeMap<String, Tensor>) {
        let examples = self.examples();
        let count = self.targets.iter().map(Vec::len).sum::<usize>() as f32;
        let mut gradients = WeightGradients::of(wanted.iter().map(String::as_str));
        let mut loss = 0.0;
        // In two microbatches, whose gradients add up.
        for part in examples.chunks(3) {
            let batch = Microbatch { prompts: &[], examples: part };
            let scale = vec![1.0 / count; part.len()];
            let losses = model.loss_and_weight_gradients(&batch, &scale, options, &mut gradients).unwrap();
            loss += losses.iter().map(|loss| f64::from(*loss / count)).sum::<f64>();
        }
        (loss, model.gathered(gradients).unwrap())
    }
}

fn options(recompute: bool) -> PassOptions {
    PassOptions { recompute, ..PassOptions::default() }
}

fn values(tensor: &Tensor) -> Vec<f64> {
    tensor.to_dtype(DType::F64).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

/// The norm of the difference by the norm of the golden.
fn apart(ours: &Tensor, golden: &Tensor) -> f64 {
    assert_eq!(ours.dims(), golden.dims());
    let norm = |values: &mut dyn Iterator<Item = f64>| values.map(|v| v * v).sum::<f64>().sqrt();
    let (ours, golden) = (values(ours), values(golden));
    norm(&mut ours.iter().zip(&golden).map(|(a, b)| a - b)) / norm(&mut golden.iter().copied())
}

fn assert_equal(what: &str, ours: &BTreeMap<String, Tensor>, golden: &BTreeMap<String, Tensor>) {
    assert_eq!(ours.keys().collect::<Vec<_>>(), golden.keys().collect::<Vec<_>>(), "{what}");
    for (name, golden) in golden {
        let apart = apart(&ours[name], golden);
        println!("{what} {name}: {apart:.1e}");
        assert!(apart <= TOLERANCE, "{what} {name} is off by {apart:.2e}");
    }
}

#[test]
fn the_gradients_to_all_weights_are_those_of_transformers() {
    for name in GOLDENS {
        let golden = Golden::load(name);
        let model = golden.model(&BTreeMap::new());
        let wanted: Vec<String> = model.weights().into_iter().map(|(name, _)| name).collect();
        for recompute in [false, true] {
            let (_, ours) = golden.gradients(&model, &wanted, &options(recompute));
            assert_equal(&format!("{name}, recompute {recompute},"), &ours, &golden.of("model/"));
        }
    }
}

#[test]
fn adapters_compute_and_learn_what_the_same_layers_do_in_pytorch() {
    for name in GOLDENS {
        let golden = Golden::load(name);
        let given = golden.of("given/");
        let model = golden.model(&given);
        let wanted: Vec<String> = given.keys().cloned().collect();
        let mut expected = golden.of("adapter/");
        let expected_loss = values(&expected.remove("loss").unwrap())[0];
        let (loss, ours) = golden.gradients(&model, &wanted, &options(false));
        assert!(
            (loss / expected_loss - 1.0).abs() <= TOLERANCE,
            "{name}: the loss is {loss}, not {expected_loss}"
        );
        assert_equal(&format!("{name}, adapters,"), &ours, &expected);
    }
}

/// Prefixes of two rows for every attention.
fn prefixes(model: &T5) -> BTreeMap<String, Tensor> {
    let (input, target) = ([5, 9], [7, 11]);
    let example = Example { prompt: None, input: &input, target: &target, key: 0 };
    let batch = Microbatch { prompts: &[], examples: &[example] };
    model.keys_and_values(&batch).unwrap().into_iter().collect()
}

#[test]
fn the_gradients_to_prefixes_are_the_slopes_of_the_loss() {
    let step = 2e-2;
    for name in GOLDENS {
        let golden = Golden::load(name);
        let given = prefixes(&golden.model(&BTreeMap::new()));
        let wanted: Vec<String> = given.keys().cloned().collect();
        let (_, ours) = golden.gradients(&golden.model(&given), &wanted, &options(true));
        for (tensor, gradient) in &ours {
            // Along the gradient, where the slope is its norm.
            let norm = values(gradient).iter().map(|g| g * g).sum::<f64>().sqrt();
            let direction = (gradient / norm).unwrap();
            let loss_at = |t: f64| {
                let mut moved = given.clone();
                moved.insert(tensor.clone(), (&given[tensor] + (&direction * t).unwrap()).unwrap());
                golden.gradients(&golden.model(&moved), &[], &options(false)).0
            };
            let slope = (loss_at(step) - loss_at(-step)) / (2.0 * step);
            println!("{name} {tensor}: norm {norm:.3e}, slope {slope:.3e}");
            assert!((slope - norm).abs() <= 0.02 * norm + 2e-5, "{name} {tensor}: {slope} is not {norm}");
        }
    }
}

/// Generation has paths of its own, with caches.
#[test]
fn what_a_model_with_prefixes_or_adapters_generates_is_what_its_logits_say() {
    for name in GOLDENS {
        let golden = Golden::load(name);
        let bare = golden.model(&BTreeMap::new());
        for (what, given) in [("prefix", prefixes(&bare)), ("adapter", golden.of("given/"))] {
            let model = golden.model(&given);
            let batch = Microbatch { prompts: &[], examples: &golden.examples() };
            let options = GenerateOptions { max_new_tokens: 5, ..GenerateOptions::default() };
            let written = model.generate(&batch, &options).unwrap();
            for ((input, written), plain) in
                golden.inputs.iter().zip(&written).zip(bare.generate(&batch, &options).unwrap())
            {
                let target: Vec<u32> = written.tokens.iter().copied().chain([1]).collect();
                let example = Example { prompt: None, input, target: &target, key: 0 };
                let logits = model.logits(&Microbatch { prompts: &[], examples: &[example] }).unwrap();
                let best: Vec<u32> = logits.argmax(1).unwrap().to_vec1().unwrap();
                assert_eq!(best[..written.tokens.len()], written.tokens, "{name} {what}");
                println!("{name} {what}: {:?}, without {:?}", written.tokens, plain.tokens);
            }
        }
    }
}
