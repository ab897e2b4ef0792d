//! From layers to a whole: what is missing, impossible or not built.

use std::path::{Path, PathBuf};

use incipit_data::tasks::{Split, Task};

use super::{Backend, Method, PartialSpec, TrainSpec};
use crate::{
    Error, Result,
    init::PromptInit,
    placement::{PromptLayers, PromptPlacement},
    rank::Predict,
    recipe::{OptimizerName, Recipe},
    schedule::Schedule,
};

/// Longest sequence that an encoder is given, prompt rows included. T5 has no limit of its own, but attention's work grows with
/// the square, and a length beyond this has so far always been a slip of the keyboard.
const MAX_SEQUENCE: usize = 16_384;

/// Seeds are written to TOML and JSON, whose integers are signed.
pub(crate) const MAX_SEED: u64 = i64::MAX as u64;

pub(super) fn whole(layers: PartialSpec, resume: bool) -> Result<TrainSpec> {
    let recipe = given(layers.recipe, "recipe", "pass --recipe paper")?;
    let mend = "pass the directory of a T5 model, or its name on the Hugging Face hub";
    let model = model(given(layers.model.clone(), "model", mend)?)?;
    let Data { task, data_dir, train, eval } = Data::of(&layers)?;
    let spec = TrainSpec {
        model,
        task,
        data_dir,
        train,
        eval,
        out: absolute("out", &given(layers.out, "out", "pass a directory for what the run writes")?)?,
        inputs: layers.inputs,
        targets: layers.targets,
        labels: layers.labels,
        prompt_length: defaulted(layers.prompt_length),
        prompt_init: prompt_init(&defaulted(layers.prompt_init), recipe)?,
        shared_length: layers.shared_length,
        prompt_placement: defaulted(layers.prompt_placement),
        prompt_layers: defaulted(layers.prompt_layers),
        method: defaulted(layers.method),
        objective: layers.objective,
        noise_density: layers.noise_density,
        mean_span_length: layers.mean_span_length,
        eval_examples: layers.eval_examples,
        prefix_part: layers.prefix_part,
        prefix_projection: layers.prefix_projection,
        adapter_width: layers.adapter_width,
        shots: layers.shots,
        shot_template: layers.shot_template,
        shot_separator: layers.shot_separator,
        instruction: layers.instruction,
        max_prompt_tokens: layers.max_prompt_tokens,
        candidates: layers.candidates,
        recipe,
        optimizer: defaulted(layers.optimizer),
        lr: defaulted(layers.lr),
        schedule: defaulted(layers.schedule),
        warmup_steps: defaulted(layers.warmup_steps),
        weight_decay: defaulted(layers.weight_decay),
        parameter_scaling: defaulted(layers.parameter_scaling),
        batch_size: defaulted(layers.batch_size),
        steps: defaulted(layers.steps),
        max_input_length: defaulted(layers.max_input_length),
        max_target_length: defaulted(layers.max_target_length),
        target_sentinel: defaulted(layers.target_sentinel),
        dropout: defaulted(layers.dropout),
        z_loss: defaulted(layers.z_loss),
        loss: defaulted(layers.loss),
        shuffle: defaulted(layers.shuffle),
        seed: defaulted(layers.seed),
        eval_every: defaulted(layers.eval_every),
        checkpoint_every: defaulted(layers.checkpoint_every),
        keep: defaulted(layers.keep),
        patience: layers.patience,
        metrics: defaulted(layers.metrics),
        predict: defaulted(layers.predict),
        device: defaulted(layers.device).parse()?,
        dtype: defaulted(layers.dtype),
        tp: defaulted(layers.tp),
        dp: defaulted(layers.dp),
        collective: defaulted(layers.collective),
        microbatch_tokens: layers.microbatch_tokens,
        recompute: defaulted(layers.recompute),
        skip_bad_records: defaulted(layers.skip_bad_records),
        allow_other_backbone: defaulted(layers.allow_other_backbone),
        threads: layers.threads,
        resume,
    };
    check_collective(&spec)?;
    check_method(&spec)?;
    check_shared(&spec)?;
    check_counts(&spec)?;
    check_numbers(&spec)?;
    check_texts(&spec)?;
    Ok(spec)
}

fn check_collective(spec: &TrainSpec) -> Result<()> {
    if spec.collective == Backend::Nccl && !spec.device.is_gpu() {
        return refused(
            "collective",
            "nccl moves numbers between GPUs",
            "pass --device cuda besides, or --collective gloo",
        );
    }
    Ok(())
}

/// Where the examples come from.
struct Data {
    task: Option<&'static Task>,
    data_dir: Option<PathBuf>,
    train: PathBuf,
    eval: Option<PathBuf>,
}

impl Data {
    /// Files of examples, or a named task: the directory of its files, or the files of its splits.
    fn of(layers: &PartialSpec) -> Result<Self> {
        let Some(name) = &layers.task else {
            if layers.data_dir.is_some() {
                return refused("data-dir", "is the directory of a named task", "name the task with --task");
            }
            let mend =
                "pass a file of examples (.jsonl, .csv, .tsv or .parquet), or a named task with --task";
            return Self::files(layers, None, mend);
        };
        let task = Task::named(name)?;
        let in_files = layers.data_dir.is_none() && layers.train.is_some();
        let others = [
            ("train", layers.train.is_some() && !in_files),
            ("eval", layers.eval.is_some() && !in_files),
            ("inputs", layers.inputs.is_some()),
            ("targets", layers.targets.is_some()),
            ("labels", layers.labels.is_some()),
        ];
        if let Some((other, _)) = others.into_iter().find(|(_, given)| *given) {
            let problem = format!("{name} has data, texts and labels of its own, and --{other} is given too");
            return refused("task", problem, "leave one of them out, on the command line or in the file");
        }
        if in_files {
            return Self::files(layers, Some(task), "pass the file of its training examples");
        }
        let mend = "pass the directory of the task's files";
        let dir = absolute("data-dir", given(layers.data_dir.as_deref(), "data-dir", mend)?)?;
        let eval = task.splits().any(|split| split == Split::Dev).then(|| dir.clone());
        Ok(Self { task: Some(task), train: dir.clone(), data_dir: Some(dir), eval })
    }

    fn files(layers: &PartialSpec, task: Option<&'static Task>, mend: &str) -> Result<Self> {
        let train = absolute("train", given(layers.train.as_deref(), "train", mend)?)?;
        let eval = layers.eval.as_deref().map(|eval| absolute("eval", eval)).transpose()?;
        Ok(Self { task, data_dir: None, train, eval })
    }
}

fn refused<T>(
    flag: &'static str,
    problem: impl std::fmt::Display,
    mend: impl std::fmt::Display,
) -> Result<T> {
    Err(Error::spec(flag, &format!("{problem}; {mend}")))
}

fn given<T>(value: Option<T>, flag: &'static str, mend: &str) -> Result<T> {
    value.map_or_else(|| refused(flag, "is missing", mend), Ok)
}

/// A path that means the same when the run goes on from another directory.
fn absolute(flag: &'static str, path: &Path) -> Result<PathBuf> {
    if path.as_os_str().is_empty() {
        return refused(flag, "is empty", "pass a path");
    }
    if path.to_str().is_none() {
        let problem =
            format!("{} is not UTF-8, and cannot be written to a configuration file", path.display());
        return refused(flag, problem, "rename it");
    }
    std::path::absolute(path).map_err(Error::io("find", path))
}

/// A directory as an absolute path; another name is one of the hub.
fn model(name: String) -> Result<String> {
    if !Path::new(&name).is_dir() {
        return Ok(name);
    }
    Ok(absolute("model", Path::new(&name))?.display().to_string())
}

/// A field that [`PartialSpec::defaults`] or a recipe always gives.
fn defaulted<T>(value: Option<T>) -> T {
    value.expect("the lowest layers give every field that has a default")
}

fn prompt_init(text: &str, recipe: Recipe) -> Result<PromptInit> {
    if text == "uniform" {
        return Ok(recipe.uniform_init());
    }
    text.parse()
}

fn check_counts(spec: &TrainSpec) -> Result<()> {
    let counts: [(&'static str, Option<u64>); 19] = [
        ("prompt-length", Some(spec.prompt_length as u64)),
        ("shared-length", spec.shared_length.map(|n| n as u64)),
        ("eval-examples", spec.eval_examples.map(|n| n as u64)),
        ("max-prompt-tokens", spec.max_prompt_tokens.map(|n| n as u64)),
        ("candidates", spec.candidates.map(|n| n as u64)),
        ("prefix-projection", spec.prefix_projection.map(|n| n as u64)),
        ("adapter-width", spec.adapter_width.map(|n| n as u64)),
        ("batch-size", Some(spec.batch_size as u64)),
        ("steps", Some(spec.steps)),
        ("max-input-length", Some(spec.max_input_length as u64)),
        ("max-target-length", Some(spec.max_target_length as u64)),
        ("eval-every", Some(spec.eval_every)),
        ("checkpoint-every", Some(spec.checkpoint_every)),
        ("keep", Some(spec.keep as u64)),
        ("patience", spec.patience.map(u64::from)),
        ("microbatch-tokens", spec.microbatch_tokens.map(|n| n as u64)),
        ("threads", spec.threads.map(|n| n as u64)),
        ("tp", Some(spec.tp as u64)),
        ("dp", Some(spec.dp as u64)),
    ];
    if let Some((flag, _)) = counts.into_iter().find(|(_, count)| *count == Some(0)) {
        return refused(flag, "is 0", "pass at least 1, or leave it out");
    }
    if spec.steps > MAX_SEED {
        return refused("steps", format!("{} is too many", spec.steps), format!("pass at most {MAX_SEED}"));
    }
    if spec.seed > MAX_SEED {
        return refused("seed", format!("{} is too large", spec.seed), format!("pass at most {MAX_SEED}"));
    }
    if spec.prompt_length.saturating_add(spec.max_input_length) > MAX_SEQUENCE {
        let (rows, tokens) = (spec.prompt_length, spec.max_input_length);
        let problem = format!(
            "{rows} does not fit: with inputs of up to {tokens} tokens a sequence may be longer than {MAX_SEQUENCE}"
        );
        return refused("prompt-length", problem, "pass a smaller --prompt-length or --max-input-length");
    }
    if spec.max_target_length > MAX_SEQUENCE {
        let problem = format!("{} is more than {MAX_SEQUENCE}", spec.max_target_length);
        return refused("max-target-length", problem, "pass a smaller one");
    }
    if spec.patience.is_some() && spec.eval.is_none() {
        return refused(
            "patience",
            "counts evaluations, and there are none",
            "pass a file with --eval as well",
        );
    }
    Ok(())
}

/// Prompts that share rows go step by step together.
fn check_shared(spec: &TrainSpec) -> Result<()> {
    let Some(shared) = spec.shared_length else { return Ok(()) };
    if spec.method != Method::Prompt {
        let problem = format!("is of prompts, and this is --method {}", spec.method);
        return refused("shared-length", problem, "leave one of them out");
    }
    if !spec.prompt_layers.is_default() {
        let problem = "is of prompts of one layer, and --prompt-layers gives each its own";
        return refused("shared-length", problem, "leave one of them out");
    }
    if shared >= spec.prompt_length {
        let problem =
            format!("is {shared}, and a prompt of {} rows has none of its own then", spec.prompt_length);
        return refused("shared-length", problem, "pass less than --prompt-length");
    }
    if spec.patience.is_some() {
        return refused(
            "patience",
            "ends one task before the others, with which it shares rows",
            "leave it out",
        );
    }
    if spec.keep < 2 {
        return refused(
            "keep",
            "is less than 2, and tasks that share rows go on from a step that all have",
            "pass 2",
        );
    }
    Ok(())
}

/// Flags of one method with another are a slip.
fn check_method(spec: &TrainSpec) -> Result<()> {
    let flags = [
        ("prefix-part", spec.prefix_part.is_some(), Method::Prefix),
        ("prefix-projection", spec.prefix_projection.is_some(), Method::Prefix),
        ("adapter-width", spec.adapter_width.is_some(), Method::Adapter),
        ("shots", spec.shots.is_some(), Method::Text),
        ("shot-template", spec.shot_template.is_some(), Method::Text),
        ("shot-separator", spec.shot_separator.is_some(), Method::Text),
        ("instruction", spec.instruction.is_some(), Method::Text),
        ("max-prompt-tokens", spec.max_prompt_tokens.is_some(), Method::Text),
        ("candidates", spec.candidates.is_some(), Method::Search),
        ("prompt-placement", !spec.prompt_placement.is_default(), Method::Prompt),
        ("prompt-layers", !spec.prompt_layers.is_default(), Method::Prompt),
    ];
    if let Some((flag, _, method)) = flags.into_iter().find(|(_, given, of)| *given && *of != spec.method) {
        let problem = format!("is of --method {method}, and this is --method {}", spec.method);
        return refused(flag, problem, "leave one of them out");
    }
    if spec.prompt_layers == PromptLayers::All && spec.prompt_placement == PromptPlacement::Decoder {
        let problem = "all has rows for the encoder's layers, and this prompt stands in the decoder";
        return refused("prompt-layers", problem, "leave it out, or pass another --prompt-placement");
    }
    if spec.method == Method::Text && spec.steps != 1 {
        let problem = format!("is {}, and --method text trains nothing", spec.steps);
        return refused("steps", problem, "leave it out");
    }
    let of_corpus = [
        ("noise-density", spec.noise_density.is_some()),
        ("mean-span-length", spec.mean_span_length.is_some()),
        ("eval-examples", spec.eval_examples.is_some()),
    ];
    if let Some((flag, _)) = of_corpus.into_iter().find(|(_, given)| *given && spec.objective.is_none()) {
        return refused(
            flag,
            "is of a run on a corpus",
            "use `incipit pretrain`, which names its --objective",
        );
    }
    if let Some(options) = spec.pretraining() {
        if spec.method != Method::Model || spec.task.is_some() {
            let problem = format!("{} trains all weights on plain text", options.objective);
            return refused("objective", problem, "leave out --task, and --method or pass --method model");
        }
        options.lengths()?;
    }
    if spec.parameter_scaling && spec.optimizer != OptimizerName::Adafactor {
        let problem = format!("is Adafactor's, and this is --optimizer {}", spec.optimizer);
        return refused("parameter-scaling", problem, "pass --parameter-scaling false");
    }
    if matches!(spec.method, Method::Model | Method::Adapter | Method::Prefix) && spec.device.is_gpu() {
        let problem = format!("{} trains weights, which is built for the CPU alone so far", spec.method);
        return refused("method", problem, "pass --device cpu, or --method prompt");
    }
    Ok(())
}

fn check_numbers(spec: &TrainSpec) -> Result<()> {
    if !(spec.lr.is_finite() && spec.lr > 0.0) {
        return refused(
            "lr",
            format!("{} is no learning rate", spec.lr),
            "pass a number above 0; the paper has 0.3",
        );
    }
    if !(0.0..1.0).contains(&spec.dropout) {
        return refused(
            "dropout",
            format!("{} is no share", spec.dropout),
            "pass at least 0 and less than 1",
        );
    }
    for (flag, value) in [("z-loss", spec.z_loss), ("weight-decay", spec.weight_decay)] {
        if !(0.0..1.0).contains(&value) {
            return refused(flag, format!("{value} is out of range"), "pass at least 0 and less than 1");
        }
    }
    if spec.schedule != Schedule::Constant && spec.warmup_steps >= spec.steps {
        let problem = format!("{} leaves no step for the {} schedule", spec.warmup_steps, spec.schedule);
        return refused("warmup-steps", problem, "pass less than --steps");
    }
    Ok(())
}

/// Templates and labels are read here too, so that a slip in them is found before a backbone is loaded.
fn check_texts(spec: &TrainSpec) -> Result<()> {
    if spec.metrics.is_empty() && spec.objective.is_none() {
        return refused("metrics", "is empty", "name at least one, such as accuracy");
    }
    for (i, metric) in spec.metrics.iter().enumerate() {
        if spec.metrics[..i].contains(metric) {
            return refused("metrics", format!("names {metric} twice"), "name each metric once");
        }
    }
    if let Some(task) = spec.task.filter(|task| spec.predict == Predict::Rank && task.labels.is_empty()) {
        let problem = format!("rank chooses among labels, and {task} has none");
        return refused("predict", problem, "pass --predict decode");
    }
    spec.task_format().map(drop)
}
