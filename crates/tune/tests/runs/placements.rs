//! Prompts behind the input, in the decoder and at every layer: trained, kept, read back and voting, as those before the input are.

use std::sync::Arc;

use incipit_kernels::rng::Philox;
use incipit_model::Placement;
use incipit_tune::{
    backbone::Backbone,
    control::Control,
    engine::{JobBatch, Objective, Recompute},
    ensemble,
    evaluate::{EvalOptions, evaluate},
    group,
    init::PromptInit,
    job::{Job, JobSpec},
    npy,
    optimizer::OptimizerKind,
    peft::{self, BaseModel},
    placement::{PromptLayers, PromptPlacement},
    prompt::Prompt,
    rank::Predict,
    recipe::LossReduction,
    schedule::Schedule,
    spec::{Method, PartialSpec, TrainSpec},
    train::{End, train_on},
    vote::Election,
};

use crate::{
    evaluation::{RECORDS, set},
    support::{Files, Last, StopAfter, backbone, config, engine, losses, resolve, tree},
};

const VARIANTS: [(PromptPlacement, PromptLayers); 4] = [
    (PromptPlacement::After, PromptLayers::First),
    (PromptPlacement::Decoder, PromptLayers::First),
    (PromptPlacement::Before, PromptLayers::All),
    (PromptPlacement::After, PromptLayers::All),
];

fn flags(variant: (PromptPlacement, PromptLayers)) -> PartialSpec {
    let (placement, layers) = variant;
    PartialSpec {
        prompt_placement: Some(placement),
        prompt_layers: Some(layers),
        labels: None,
        prompt_init: Some(PromptInit::Vocab.to_string()),
        ..PartialSpec::default()
    }
}

fn run(backbone: &Backbone, spec: &TrainSpec) -> (End, Last) {
    let mut last = Last::default();
    (train_on(backbone, spec, &Control::new(), &mut last).unwrap().end, last)
}

#[test]
fn every_variant_learns_and_what_it_leaves_tells_where_its_rows_stand() {
    let (files, backbone) = (Files::new(), backbone());
    for (placement, layers) in VARIANTS {
        let out = format!("{placement}-{layers}");
        let spec =
            resolve(PartialSpec { steps: Some(120), ..flags((placement, layers)) }.over(files.flags(&out)));
        let (_, last) = run(&backbone, &spec);
        let losses = losses(&spec.out);
        let mean = |losses: &[f64]| losses.iter().sum::<f64>() / losses.len() as f64;
        let (first, end) = (mean(&losses[..5]), mean(&losses[115..]));
        println!("{out}: from {first:.3} to {end:.3}");
        assert!(end < 0.75 * first, "{out}: from {first} to {end}");
        assert_eq!(TrainSpec::read(&spec.out.join("run.toml")).unwrap(), spec);
        assert!(!spec.out.join("adapter").exists(), "PEFT knows no such prompt");

        let shape = match layers {
            PromptLayers::First => vec![5, 16],
            PromptLayers::All => vec![2, 5, 16],
        };
        for path in [spec.out.clone(), spec.out.join("prompt.npy"), spec.out.join("best")] {
            let prompt = Prompt::read(&path).unwrap();
            assert_eq!((prompt.placement(), prompt.shape()), (placement.into(), shape.clone()), "{path:?}");
        }
        // The run's last evaluation again, from its files.
        let prompt = Prompt::read(&spec.out.join("last")).unwrap();
        let task = incipit_tune::task::Task::load(&spec, &backbone.tokenizer, config().vocab_size).unwrap();
        let options = EvalOptions {
            metrics: spec.metrics.clone(),
            labels: task.labels.clone(),
            max_new_tokens: task.max_new_tokens,
            ..EvalOptions::default()
        };
        let eval = task.eval.unwrap();
        let again =
            evaluate(&backbone.engine, Some(&prompt), &eval, &backbone.tokenizer, &options, &Control::new());
        assert_eq!(again.unwrap(), last.0.unwrap(), "{out}");
    }
}

#[test]
fn a_run_of_any_variant_that_was_stopped_and_resumed_leaves_the_same_bytes() {
    let (files, backbone) = (Files::new(), backbone());
    for (placement, layers) in VARIANTS {
        let name = format!("{placement}-{layers}");
        let flags = |out: &str| flags((placement, layers)).over(files.flags(&format!("{name}-{out}")));
        let whole = resolve(flags("whole"));
        run(&backbone, &whole);
        let spec = resolve(flags("stopped"));
        let control = Control::new();
        let stopped = train_on(&backbone, &spec, &control, &mut StopAfter { step: 7, control: &control });
        assert_eq!(stopped.unwrap().end, End::Requested);
        let (end, _) = run(&backbone, &TrainSpec { resume: true, ..spec.clone() });
        assert_eq!(end, End::Steps);
        let kept = |out: &std::path::Path| {
            let mut files = tree(out);
            files.retain(|(name, _)| !name.contains("step-00000007"));
            files
        };
        assert!(kept(&spec.out) == kept(&whole.out), "{name}");
    }
}

#[test]
fn a_run_does_not_go_on_with_its_prompt_in_another_place() {
    let (files, backbone) = (Files::new(), backbone());
    let spec = resolve(files.flags("out"));
    run(&backbone, &spec);
    assert!(!spec.to_toml().contains("placement") && !spec.to_toml().contains("layers"));
    for (changed, flag) in [
        (TrainSpec { prompt_placement: PromptPlacement::After, ..spec.clone() }, "prompt-placement"),
        (TrainSpec { prompt_layers: PromptLayers::All, ..spec }, "prompt-layers"),
    ] {
        let resumed = TrainSpec { resume: true, ..changed };
        let error = train_on(&backbone, &resumed, &Control::new(), &mut ()).unwrap_err().to_string();
        assert!(error.contains(flag), "{error}");
    }
}

/// Job `n`, with its prompt in the `n`-th place, and data, optimizer and objective of its own.
fn job(n: u64) -> Job {
    let dropout = if n.is_multiple_of(2) { 0.0 } else { 0.1 };
    let spec = JobSpec {
        optimizer: if n == 1 { OptimizerKind::adamw(0.01) } else { OptimizerKind::adafactor(1e-5, 0) },
        lr: 0.1 + n as f32,
        schedule: Schedule::Constant,
        warmup_steps: 0,
        num_steps: 6,
        batch_size: 2 + n as usize % 3,
        shuffle: true,
        seed: n,
        objective: Objective { reduction: LossReduction::Mean, dropout, z_loss: 0.0 },
        shared_length: 0,
    };
    let places =
        [Placement::Before, Placement::After, Placement::Decoder, Placement::Before, Placement::After];
    let (layers, rows, width) = (if n < 3 { 1 } else { 2 }, 2 + n as usize, config().d_model);
    let mut random = Philox::new(n, &[1]);
    let values = (0..layers * rows * width).map(|_| random.normal()).collect();
    let prompt = Prompt::of_layers(layers, rows, width, values).unwrap().placed(places[n as usize]);
    Job::new(spec, Arc::new(set(&RECORDS)), prompt).unwrap()
}

#[test]
fn jobs_with_prompts_in_all_places_trained_together_get_what_they_get_alone() {
    for tokens in [40, 10_000] {
        let engine = engine(tokens, Recompute::Auto);
        let mut together: Vec<Job> = (0..5).map(job).collect();
        for _ in 0..6 {
            let batches: Vec<JobBatch<'_>> = together.iter().map(Job::batch).collect();
            let gradients = engine.gradients(&batches).unwrap();
            for (job, gradient) in together.iter_mut().zip(gradients) {
                job.update(gradient).unwrap();
            }
        }
        for (n, job) in together.iter().enumerate() {
            let mut alone = self::job(n as u64);
            let start = alone.prompt().clone();
            for _ in 0..6 {
                alone.step(&engine).unwrap();
            }
            assert_ne!(*alone.prompt(), start);
            assert_eq!(alone.prompt(), job.prompt(), "job {n}, {tokens} tokens");
        }
    }
}

#[test]
fn members_of_an_ensemble_vote_from_the_file_that_holds_them_all() {
    let (files, backbone) = (Files::new(), backbone());
    for (placement, layers) in VARIANTS {
        let out = format!("ensemble-{placement}-{layers}");
        let flags = flags((placement, layers)).over(files.flags(&out));
        let specs = ensemble::resolve(flags, None, false, Some(2)).unwrap();
        let outcomes =
            group::train_on(&ensemble::ENSEMBLE, &backbone, &specs, &Control::new(), &mut [(); 2]).unwrap();
        assert!(outcomes.iter().all(Result::is_ok));
        let prompts = ensemble::read_prompts(&files.path(&out).join(ensemble::PROMPTS)).unwrap();
        let each: Vec<Prompt> = specs.iter().map(|spec| Prompt::read(&spec.out).unwrap()).collect();
        assert_eq!(prompts, each, "{out}");
        assert_eq!(prompts[0].placement(), placement.into());
        let election = |members: &[&Prompt]| {
            let labels = Some(["yes", "no", "maybe"].map(str::to_owned).to_vec());
            let candidates = Predict::Rank
                .candidates(labels.as_deref(), &backbone.tokenizer, config().vocab_size, false)
                .unwrap();
            let options = EvalOptions { candidates, ..EvalOptions::default() };
            Election::hold(&backbone, members, Arc::new(set(&RECORDS)), &options, &Control::new()).unwrap()
        };
        // A member of another place and length beside them changes nothing of theirs.
        let other = job(2).prompt().clone();
        let (two, three) =
            (election(&[&prompts[0], &prompts[1]]), election(&[&prompts[0], &other, &prompts[1]]));
        assert_eq!(two.members, [three.members[0].clone(), three.members[2].clone()], "{out}");
    }
}

#[test]
fn a_prompt_starts_from_one_of_another_place_and_of_one_layer_for_all() {
    let (files, backbone) = (Files::new(), backbone());
    let before = resolve(files.flags("before"));
    run(&backbone, &before);
    let init = |out: &str, variant, from: &str| {
        let init = format!("file:{}", files.path(from).display());
        let spec = PartialSpec { prompt_init: Some(init), ..flags(variant) }.over(files.flags(out));
        train_on(&backbone, &resolve(spec), &Control::new(), &mut ()).map(drop)
    };
    init("decoder", (PromptPlacement::Decoder, PromptLayers::First), "before").unwrap();
    init("deep", (PromptPlacement::Before, PromptLayers::All), "before").unwrap();
    init("deeper", (PromptPlacement::Before, PromptLayers::All), "deep").unwrap();
    let error = init("shallow", (PromptPlacement::Before, PromptLayers::First), "deep").unwrap_err();
    assert!(error.to_string().contains("--prompt-layers"), "{error}");
}

#[test]
fn what_a_variant_is_not_for_is_refused_in_words() {
    let files = Files::new();
    let refusal = |flags: PartialSpec| {
        TrainSpec::resolve(flags.over(files.flags("out")), None, false).unwrap_err().to_string()
    };
    for method in [Method::Model, Method::Prefix, Method::Adapter, Method::Text, Method::Search] {
        for (placement, layers, flag) in [
            (PromptPlacement::Decoder, PromptLayers::First, "--prompt-placement"),
            (PromptPlacement::Before, PromptLayers::All, "--prompt-layers"),
        ] {
            let steps = (method == Method::Text).then_some(1);
            let message = refusal(PartialSpec { method: Some(method), steps, ..flags((placement, layers)) });
            assert!(message.starts_with(flag) && message.contains("--method prompt"), "{message}");
        }
    }
    let message = refusal(flags((PromptPlacement::Decoder, PromptLayers::All)));
    assert!(message.starts_with("--prompt-layers all"), "{message}");
    let base = BaseModel { name: "t5".to_owned(), num_layers: 2, num_heads: 3 };
    for n in 1..5 {
        let job = job(n);
        let error = peft::write(&files.path("adapter"), job.prompt(), &base).unwrap_err().to_string();
        assert!(error.contains("PEFT knows only"), "{error}");
    }
}

#[test]
fn a_prompt_for_other_layers_than_the_model_has_is_refused_with_its_file() {
    let prompt = Prompt::of_layers(3, 1, 16, vec![0.5; 48]).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("p.npy");
    npy::write(&path, &prompt).unwrap();
    let read = Prompt::read(&path).unwrap();
    assert_eq!(read, prompt);
    let error = read.check_fits(&config(), &path).unwrap_err().to_string();
    assert!(error.contains("p.npy") && error.contains("3 layers") && error.contains("has 2"), "{error}");
}
