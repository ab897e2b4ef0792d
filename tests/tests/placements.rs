//! Prompts behind the input, in the decoder, and at every layer of the encoder: losses, logits, gradients and greedy tokens are those of
//! transformers, against the goldens `tests/goldens/*/placements.*`, which `scripts/goldens/placements.py` made; and prompts of all
//! kinds in one batch give, bit for bit, what each gives alone. Run with `--nocapture` to see how far they are apart.

#![allow(clippy::unwrap_used, reason = "a helper that cannot go on fails its test")]

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use incipit_model::{
    Config, Example, ExampleGradient, GenerateOptions, Generated, Microbatch, PassOptions, Placement,
    SoftPrompt, T5,
};
use incipit_weights::Checkpoint;
use serde::Deserialize;

/// A tied and scaled head; a head of its own; three encoder layers and one decoder layer.
const GOLDENS: [&str; 3] = ["v1_0_tied", "v1_1_untied", "unequal_depths"];
const CASES: [&str; 4] = ["after", "decoder", "layers", "layers_after"];
const TOLERANCE: f64 = 1e-4;

#[derive(Deserialize)]
struct Meta {
    inputs: Vec<Vec<u32>>,
    targets: Vec<Vec<u32>>,
    max_new_tokens: usize,
}

#[derive(Deserialize)]
struct Placements {
    generated: BTreeMap<String, Vec<Vec<u32>>>,
}

struct Golden {
    name: &'static str,
    dir: PathBuf,
    tensors: HashMap<String, Tensor>,
    meta: Meta,
    generated: BTreeMap<String, Vec<Vec<u32>>>,
}

fn json<T: serde::de::DeserializeOwned>(path: &Path) -> T {
    serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
}

impl Golden {
    fn load(name: &'static str) -> Self {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("goldens").join(name);
        let tensors = candle_core::safetensors::load(dir.join("placements.safetensors"), &Device::Cpu);
        let Placements { generated } = json(&dir.join("placements.json"));
        Self { name, tensors: tensors.unwrap(), meta: json(&dir.join("meta.json")), generated, dir }
    }

    fn model(&self, dtype: DType) -> T5 {
        let checkpoint = Checkpoint::open(&self.dir, dtype).unwrap();
        let config = Config::from_json(&checkpoint.config_json().unwrap()).unwrap();
        T5::load(config, &checkpoint, dtype).unwrap()
    }

    fn tensor(&self, case: &str, key: &str) -> &Tensor {
        &self.tensors[&format!("{case}.{key}")]
    }

    /// The prompts of [`CASES`], and one before the input.
    fn prompts(&self, config: &Config) -> Vec<SoftPrompt> {
        let prompt = |case: &&str| SoftPrompt {
            rows: self.tensor(case, "prompt").clone(),
            num_layers: if case.starts_with("layers") { config.num_layers } else { 1 },
            placement: match *case {
                "after" | "layers_after" => Placement::After,
                "decoder" => Placement::Decoder,
                _ => Placement::Before,
            },
        };
        let before = SoftPrompt::from(self.tensor("after", "prompt").clone());
        CASES.iter().map(prompt).chain([before]).collect()
    }

    fn examples(&self, prompt: Option<usize>) -> Vec<Example<'_>> {
        let pairs = self.meta.inputs.iter().zip(&self.meta.targets).zip(0..);
        pairs.map(|((input, target), key)| Example { prompt, input, target, key }).collect()
    }

    /// Every example under every prompt and under none, the prompts taking turns.
    fn mixed(&self) -> Vec<Example<'_>> {
        let prompts = (0..=CASES.len()).map(Some).chain([None]);
        let all: Vec<_> = prompts.map(|prompt| self.examples(prompt)).collect();
        (0..self.meta.inputs.len()).flat_map(|e| all.iter().map(move |of| of[e])).collect()
    }
}

fn numbers(tensor: &Tensor) -> Vec<f32> {
    tensor.flatten_all().unwrap().to_vec1().unwrap()
}

fn bits(tensor: &Tensor) -> Vec<u32> {
    numbers(tensor).into_iter().map(f32::to_bits).collect()
}

fn assert_near(what: &str, ours: &[f32], golden: &Tensor) {
    let golden = numbers(golden);
    assert_eq!(ours.len(), golden.len(), "{what}");
    let largest = golden.iter().fold(1e-30f32, |a, x| a.max(x.abs()));
    let apart = ours.iter().zip(&golden).fold(0f32, |far, (a, b)| far.max((a - b).abs()));
    let error = f64::from(apart / largest);
    println!("{what}: {error:.1e} of the largest number");
    assert!(error <= TOLERANCE, "{what} is off by {error:.2e}");
}

fn gradients(results: &[ExampleGradient]) -> Vec<f32> {
    results.iter().flat_map(|r| numbers(&r.prompt_gradient)).collect()
}

fn greedy(golden: &Golden) -> GenerateOptions {
    GenerateOptions { max_new_tokens: golden.meta.max_new_tokens, ..GenerateOptions::default() }
}

#[test]
fn losses_logits_and_gradients_equal_transformers_in_every_place() {
    for golden in GOLDENS.map(Golden::load) {
        let model = golden.model(DType::F32);
        let prompts = golden.prompts(model.config());
        for (index, case) in CASES.iter().enumerate() {
            let name = format!("{} {case}", golden.name);
            let examples = golden.examples(Some(index));
            let batch = Microbatch { prompts: &prompts, examples: &examples };
            let sums = golden.tensor(case, "loss_sum");
            assert_near(&format!("{name} losses"), &model.loss(&batch).unwrap(), sums);
            let logits = numbers(&model.logits(&batch).unwrap());
            assert_near(&format!("{name} logits"), &logits, golden.tensor(case, "logits"));
            for recompute in [false, true] {
                let options = PassOptions { recompute, dropout: 0.0, z_loss: 0.0 };
                let found = model.loss_and_gradient(&batch, &vec![1.0; examples.len()], &options).unwrap();
                let losses: Vec<f32> = found.iter().map(|r| r.loss).collect();
                assert_near(&format!("{name} losses beside gradients"), &losses, sums);
                let expected = golden.tensor(case, "prompt_gradients");
                assert_near(&format!("{name} gradients"), &gradients(&found), expected);
            }
        }
    }
}

#[test]
fn each_label_of_a_ranking_has_the_loss_that_it_has_as_a_target() {
    for golden in GOLDENS.map(Golden::load) {
        let model = golden.model(DType::F32);
        let prompts = golden.prompts(model.config());
        let examples = golden.mixed();
        let batch = Microbatch { prompts: &prompts, examples: &examples };
        let labels = &golden.meta.targets;
        let ranked = model.label_losses_after(&model.encoded(&batch).unwrap(), &batch, labels).unwrap();
        for (example, ranked) in examples.iter().zip(ranked.chunks(labels.len())) {
            for (target, loss) in labels.iter().zip(ranked) {
                let alone = [Example { target, ..*example }];
                let alone = model.loss(&Microbatch { prompts: &prompts, examples: &alone }).unwrap();
                assert_eq!(alone[0].to_bits(), loss.to_bits(), "{} {:?}", golden.name, example.prompt);
            }
        }
    }
}

#[test]
fn greedy_decoding_writes_what_transformers_writes_in_every_place() {
    for golden in GOLDENS.map(Golden::load) {
        let model = golden.model(DType::F32);
        let prompts = golden.prompts(model.config());
        for (index, case) in CASES.iter().enumerate() {
            let batch = Microbatch { prompts: &prompts, examples: &golden.examples(Some(index)) };
            let written = model.generate(&batch, &greedy(&golden)).unwrap();
            let written: Vec<_> = written.into_iter().map(|g| g.tokens).collect();
            assert_eq!(written, golden.generated[*case], "{} {case}", golden.name);
        }
    }
}

/// The decoder's prompts of two lengths beside none: hypotheses with caches of other lengths go apart.
#[test]
fn generation_is_the_same_beside_prompts_of_other_places_and_lengths() {
    for golden in GOLDENS.map(Golden::load) {
        let model = golden.model(DType::F32);
        let mut prompts = golden.prompts(model.config());
        let shorter = golden.tensor("decoder", "prompt").narrow(0, 0, 1).unwrap();
        prompts.push(SoftPrompt { placement: Placement::Decoder, ..shorter.into() });
        let mut examples = golden.mixed();
        examples.extend(golden.examples(Some(prompts.len() - 1)));
        let ways = [
            greedy(&golden),
            GenerateOptions { num_beams: 3, ..greedy(&golden) },
            GenerateOptions { top_p: Some(0.9), seed: 3, ..greedy(&golden) },
        ];
        for options in ways {
            let generate = |examples: &[Example<'_>]| -> Vec<Generated> {
                model.generate(&Microbatch { prompts: &prompts, examples }, &options).unwrap()
            };
            for (example, together) in examples.iter().zip(generate(&examples)) {
                assert_eq!(generate(&[*example]), [together], "{} {:?}", golden.name, example.prompt);
            }
        }
    }
}

/// The loss of what was written is its score: the prompt in a cache is the prompt in a whole pass.
#[test]
fn a_beams_score_is_the_likelihood_of_what_it_wrote() {
    let golden = Golden::load("v1_1_untied");
    let model = golden.model(DType::F32);
    let prompts = golden.prompts(model.config());
    for index in 0..=CASES.len() {
        let examples = golden.examples(Some(index));
        let options = GenerateOptions { num_beams: 4, length_penalty: 0.0, ..greedy(&golden) };
        let batch = Microbatch { prompts: &prompts, examples: &examples };
        for (example, beam) in examples.iter().zip(model.generate(&batch, &options).unwrap()) {
            let mut target = beam.tokens.clone();
            if target.len() < options.max_new_tokens {
                target.push(1);
            }
            let written = [Example { target: &target, ..*example }];
            let loss = model.loss(&Microbatch { prompts: &prompts, examples: &written }).unwrap()[0];
            assert!((loss + beam.score).abs() < 1e-4 * loss.abs(), "{index}: {loss} and {}", beam.score);
        }
    }
}

#[test]
fn prompts_of_all_places_in_one_batch_give_the_bits_that_each_gives_alone() {
    for golden in GOLDENS.map(Golden::load) {
        for dtype in [DType::F32, DType::BF16] {
            let model = golden.model(dtype);
            let prompts = golden.prompts(model.config());
            let examples = golden.mixed();
            for recompute in [false, true] {
                let options = PassOptions { recompute, dropout: 0.1, z_loss: 1e-3 };
                let pass = |examples: &[Example<'_>]| {
                    let batch = Microbatch { prompts: &prompts, examples };
                    model.loss_and_gradient(&batch, &vec![0.5; examples.len()], &options).unwrap()
                };
                for (example, together) in examples.iter().zip(pass(&examples)) {
                    let alone = &pass(&[*example])[0];
                    let what = format!("{} {dtype:?} {:?}", golden.name, example.prompt);
                    assert_eq!(alone.loss.to_bits(), together.loss.to_bits(), "{what}");
                    assert_eq!(bits(&alone.prompt_gradient), bits(&together.prompt_gradient), "{what}");
                    let rows = example.prompt.map_or(0, |p| prompts[p].rows.dims()[0]);
                    assert_eq!(together.prompt_gradient.dims(), [rows, model.config().d_model], "{what}");
                }
            }
        }
    }
}

#[test]
fn prompts_that_fit_no_model_are_refused_in_words() {
    let golden = Golden::load("unequal_depths");
    let model = golden.model(DType::F32);
    let refusal = |num_layers: usize, placement: Placement| {
        let rows = Tensor::zeros((6, model.config().d_model), DType::F32, &Device::Cpu).unwrap();
        let prompts = [SoftPrompt { rows, num_layers, placement }];
        let batch = Microbatch { prompts: &prompts, examples: &golden.examples(Some(0)) };
        model.loss(&batch).unwrap_err().to_string()
    };
    let message = refusal(2, Placement::Before);
    assert!(message.contains("2 layers") && message.contains("3 layers"), "{message}");
    let message = refusal(3, Placement::Decoder);
    assert!(message.contains("decoder"), "{message}");
}
