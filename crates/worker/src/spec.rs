//! A job's settings as they cross the wire: a [`PartialSpec`] as a [`TrainingSpec`], and back.
//!
//! What a machine decides is no part of them: the model, where it runs, how it is divided, and where the results go. Those come from the
//! backbone, or from the worker. Whatever a job leaves open stays open on the wire, and is filled in by the recipe and the defaults where
//! the job is trained.

use std::path::{Path, PathBuf};

use incipit_data::metrics::Metric;
use incipit_proto::{
    Problem,
    v1::{self, DataSource, TrainingSpec, data_source::Source},
};
use incipit_tune::{
    placement::{PromptLayers, PromptPlacement},
    rank::Predict,
    recipe::{LossReduction, OptimizerName, Recipe},
    schedule::Schedule,
    spec::{Method, PartialSpec, PrefixPart},
};

/// What `prompt_init` begins with where the prompt starts as another.
const FILE: &str = "file:";
/// The name of such a prompt's file.
const PROMPT: &str = "prompt.safetensors";

/// Defines for each enumeration of ours the way to its number on the wire, and the way back. 0 is what was left open.
macro_rules! enumerations {
    ($($to:ident, $from:ident: $ours:ident = v1::$wire:ident { $($our:ident = $their:ident),+ $(,)? })+) => {
        $(
            fn $to(ours: Option<$ours>) -> i32 {
                ours.map_or(v1::$wire::Unspecified, |ours| match ours { $($ours::$our => v1::$wire::$their,)+ }) as i32
            }

            fn $from(field: &str, number: i32) -> Result<Option<$ours>, Problem> {
                match v1::$wire::try_from(number) {
                    Ok(v1::$wire::Unspecified) => Ok(None),
                    $(Ok(v1::$wire::$their) => Ok(Some($ours::$our)),)+
                    Err(_) => Err(Problem::field(
                        field,
                        format!(concat!("is {}, which is no ", stringify!($wire), " that this version knows"), number),
                    )),
                }
            }
        )+
    };
}

/// Refuses what `incipit train` and `pretrain` can do and a job cannot: dropping it would train something else.
fn refuse_elsewhere(spec: &PartialSpec) -> Result<(), Problem> {
    let others = [
        (
            "spec.objective",
            spec.objective.map(|_| "is for plain text, and a job learns from examples".to_owned()),
        ),
        (
            "spec.data_dir",
            spec.data_dir
                .as_ref()
                .map(|_| "is a directory, and a job takes the files of its splits".to_owned()),
        ),
    ];
    match others.into_iter().find_map(|(field, what)| Some((field, what?))) {
        Some((field, what)) => {
            Err(Problem::field(field, format!("{what}; leave it out, or use `incipit train` on one machine")))
        }
        None => Ok(()),
    }
}

enumerations! {
    recipe_to_wire, recipe_from_wire: Recipe = v1::Recipe { Paper = Paper, ReleasedCode = ReleasedCode }
    optimizer_to_wire, optimizer_from_wire: OptimizerName = v1::Optimizer { Adafactor = Adafactor, AdamW = Adamw, Sgd = Sgd }
    schedule_to_wire, schedule_from_wire: Schedule = v1::Schedule { Constant = Constant, Linear = Linear, Cosine = Cosine }
    loss_to_wire, loss_from_wire: LossReduction = v1::Loss { Mean = Mean, Sum = Sum }
    placement_to_wire, placement_from_wire: PromptPlacement = v1::PromptPlacement {
        Before = Before, After = After, Decoder = Decoder,
    }
    layers_to_wire, layers_from_wire: PromptLayers = v1::PromptLayers { First = First, All = All }
    predict_to_wire, predict_from_wire: Predict = v1::Predict { Decode = Decode, Rank = Rank }
    method_to_wire, method_from_wire: Method = v1::Method {
        Prompt = Prompt, Model = Model, Prefix = Prefix, Adapter = Adapter, Text = Text, Search = Search,
    }
    part_to_wire, part_from_wire: PrefixPart = v1::PrefixPart { All = All, Decoder = Decoder }
    metric_to_wire, metric_from_wire: Metric = v1::Metric {
        Accuracy = Accuracy, ExactMatch = ExactMatch, TokenF1 = TokenF1, MacroF1 = MacroF1, PositiveF1 = PositiveF1,
        GroupExactMatch = GroupExactMatch, Containment = Containment,
    }
}

/// What a job may set of `spec`, for the wire. Files of examples are named by their paths; whoever uploads them puts digests in their
/// places. Of a file to start from only that there is one crosses: whoever uploads its prompt puts the digest into `initial`.
///
/// # Errors
/// If a value cannot be written down: a count beyond 32 bits, a path that is not UTF-8, no metric at all, or what a job cannot do.
pub fn to_wire(spec: &PartialSpec) -> Result<TrainingSpec, Problem> {
    if spec.metrics.as_ref().is_some_and(Vec::is_empty) {
        return Err(Problem::field("spec.metrics", "is empty; name at least one, such as accuracy"));
    }
    refuse_elsewhere(spec)?;
    let of_file = spec.prompt_init.as_deref().is_some_and(|init| init.starts_with(FILE));
    let metrics = spec.metrics.iter().flatten();
    Ok(TrainingSpec {
        train: spec.train.as_deref().map(|path| source("spec.train", path)).transpose()?,
        eval: spec.eval.as_deref().map(|path| source("spec.eval", path)).transpose()?,
        inputs: spec.inputs.clone(),
        targets: spec.targets.clone(),
        labels: spec.labels.clone(),
        prompt_length: count("spec.prompt_length", spec.prompt_length)?,
        prompt_init: if of_file { Some(format!("{FILE}{PROMPT}")) } else { spec.prompt_init.clone() },
        initial: None,
        recipe: recipe_to_wire(spec.recipe),
        optimizer: optimizer_to_wire(spec.optimizer),
        lr: spec.lr,
        schedule: schedule_to_wire(spec.schedule),
        warmup_steps: spec.warmup_steps,
        weight_decay: spec.weight_decay,
        batch_size: count("spec.batch_size", spec.batch_size)?,
        steps: spec.steps,
        max_input_length: count("spec.max_input_length", spec.max_input_length)?,
        max_target_length: count("spec.max_target_length", spec.max_target_length)?,
        dropout: spec.dropout,
        z_loss: spec.z_loss,
        loss: loss_to_wire(spec.loss),
        shuffle: spec.shuffle,
        seed: spec.seed,
        eval_every: spec.eval_every,
        checkpoint_every: spec.checkpoint_every,
        keep: count("spec.keep", spec.keep)?,
        patience: spec.patience,
        metrics: metrics.map(|metric| metric_to_wire(Some(*metric))).collect(),
        skip_bad_records: spec.skip_bad_records,
        task: spec.task.clone(),
        prompt_placement: placement_to_wire(spec.prompt_placement),
        prompt_layers: layers_to_wire(spec.prompt_layers),
        parameter_scaling: spec.parameter_scaling,
        target_sentinel: spec.target_sentinel,
        predict: predict_to_wire(spec.predict),
        method: method_to_wire(spec.method),
        prefix_part: part_to_wire(spec.prefix_part),
        prefix_projection: count("spec.prefix_projection", spec.prefix_projection)?,
        adapter_width: count("spec.adapter_width", spec.adapter_width)?,
        shots: count("spec.shots", spec.shots)?,
        shot_template: spec.shot_template.clone(),
        shot_separator: spec.shot_separator.clone(),
        instruction: spec.instruction.clone(),
        max_prompt_tokens: count("spec.max_prompt_tokens", spec.max_prompt_tokens)?,
        candidates: count("spec.candidates", spec.candidates)?,
        shared_length: count("spec.shared_length", spec.shared_length)?,
        tasks: Vec::new(),
    })
}

/// The prompt to start as, for the wire.
#[must_use]
pub fn initial_of(digest: &str) -> DataSource {
    DataSource { source: Some(Source::Digest(digest.to_owned())), file_name: PROMPT.to_owned() }
}

/// The settings in `wire`. `find` tells where the examples of a source lie on this machine. A prompt to start as is named by its digest,
/// so that the job is the same one on every machine.
///
/// # Errors
/// If a value means nothing to this version, or `find` refuses.
pub fn from_wire(
    wire: &TrainingSpec,
    find: impl Fn(&DataSource) -> Result<PathBuf, Problem>,
) -> Result<PartialSpec, Problem> {
    let number = |count: Option<u32>| count.map(|n| n as usize);
    let prompt_init = prompt_init(wire)?;
    let metric = |number: &i32| {
        let unspecified = || Problem::field("spec.metrics", "has an entry without a name; leave it out");
        metric_from_wire("spec.metrics", *number)?.ok_or_else(unspecified)
    };
    let metrics = wire.metrics.iter().map(metric).collect::<Result<Vec<_>, _>>()?;
    let spec = PartialSpec {
        train: wire.train.as_ref().map(&find).transpose()?,
        eval: wire.eval.as_ref().map(&find).transpose()?,
        inputs: wire.inputs.clone(),
        targets: wire.targets.clone(),
        labels: wire.labels.clone(),
        prompt_length: number(wire.prompt_length),
        prompt_init,
        recipe: recipe_from_wire("spec.recipe", wire.recipe)?,
        optimizer: optimizer_from_wire("spec.optimizer", wire.optimizer)?,
        lr: wire.lr,
        schedule: schedule_from_wire("spec.schedule", wire.schedule)?,
        warmup_steps: wire.warmup_steps,
        weight_decay: wire.weight_decay,
        batch_size: number(wire.batch_size),
        steps: wire.steps,
        max_input_length: number(wire.max_input_length),
        max_target_length: number(wire.max_target_length),
        dropout: wire.dropout,
        z_loss: wire.z_loss,
        loss: loss_from_wire("spec.loss", wire.loss)?,
        shuffle: wire.shuffle,
        seed: wire.seed,
        eval_every: wire.eval_every,
        checkpoint_every: wire.checkpoint_every,
        keep: number(wire.keep),
        patience: wire.patience,
        metrics: (!metrics.is_empty()).then_some(metrics),
        skip_bad_records: wire.skip_bad_records,
        task: wire.task.clone(),
        prompt_placement: placement_from_wire("spec.prompt_placement", wire.prompt_placement)?,
        prompt_layers: layers_from_wire("spec.prompt_layers", wire.prompt_layers)?,
        parameter_scaling: wire.parameter_scaling,
        target_sentinel: wire.target_sentinel,
        predict: predict_from_wire("spec.predict", wire.predict)?,
        method: method_from_wire("spec.method", wire.method)?,
        prefix_part: part_from_wire("spec.prefix_part", wire.prefix_part)?,
        prefix_projection: number(wire.prefix_projection),
        adapter_width: number(wire.adapter_width),
        shots: number(wire.shots),
        shot_template: wire.shot_template.clone(),
        shot_separator: wire.shot_separator.clone(),
        instruction: wire.instruction.clone(),
        max_prompt_tokens: number(wire.max_prompt_tokens),
        candidates: number(wire.candidates),
        shared_length: number(wire.shared_length),
        ..PartialSpec::default()
    };
    refuse_elsewhere(&spec).map(|()| spec)
}

/// The tasks of a job, by their names; that of a job of one task has none. What a task's own specification leaves open, the one behind it
/// says for all.
#[must_use]
pub fn tasks(wire: &TrainingSpec) -> Vec<(&str, [TrainingSpec; 2])> {
    let common = TrainingSpec { tasks: Vec::new(), ..wire.clone() };
    if wire.tasks.is_empty() {
        return vec![("", [common, TrainingSpec::default()])];
    }
    let both = |task: &v1::TrainingTask| [task.spec.clone().unwrap_or_default(), common.clone()];
    wire.tasks.iter().map(|task| (&*task.name, both(task))).collect()
}

/// The paths on the workers' machines that a job names.
#[must_use]
pub fn paths(wire: &TrainingSpec) -> Vec<&str> {
    let tasks = wire.tasks.iter().filter_map(|task| task.spec.as_ref());
    let named = [wire].into_iter().chain(tasks).flat_map(|spec| [&spec.train, &spec.eval, &spec.initial]);
    let mut paths = Vec::new();
    for data in named.flatten() {
        if let Some(Source::Path(path)) = &data.source {
            paths.push(path.as_str());
        }
    }
    paths
}

/// The path of a source that is a path on the workers' machines.
///
/// # Errors
/// If it is a blob, or nothing.
pub fn path_of(source: &DataSource) -> Result<PathBuf, Problem> {
    match &source.source {
        Some(Source::Path(path)) => Ok(PathBuf::from(path)),
        Some(Source::Digest(digest)) => {
            Err(Problem::field("spec", format!("names the blob {digest} where a path is needed")))
        }
        None => Err(Problem::field(
            "spec",
            "has a source of examples that names neither a blob nor a path; name one",
        )),
    }
}

fn source(field: &str, path: &Path) -> Result<DataSource, Problem> {
    let text = |part: Option<&str>| {
        part.map(str::to_owned)
            .ok_or_else(|| Problem::field(field, format!("{} is not UTF-8; rename it", path.display())))
    };
    let Some(name) = path.file_name() else {
        return Err(Problem::field(field, format!("{} is no file; name one", path.display())));
    };
    Ok(DataSource { source: Some(Source::Path(text(path.to_str())?)), file_name: text(name.to_str())? })
}

fn count(field: &str, count: Option<usize>) -> Result<Option<u32>, Problem> {
    let narrow = |n: usize| {
        u32::try_from(n).map_err(|_| {
            Problem::field(field, format!("is {n}, which is too many; pass at most {}", u32::MAX))
        })
    };
    count.map(narrow).transpose()
}

/// As [`PartialSpec`] has it. A path would name what the worker's machine has at the time, so that only a digest will do.
fn prompt_init(wire: &TrainingSpec) -> Result<Option<String>, Problem> {
    let of_file = wire.prompt_init.as_deref().is_some_and(|init| init.starts_with(FILE));
    let initial = wire.initial.as_ref().and_then(|initial| initial.source.as_ref());
    match (of_file, initial) {
        (false, None) => Ok(wire.prompt_init.clone()),
        (true, Some(Source::Digest(digest))) => Ok(Some(format!("{FILE}{digest}"))),
        (false, Some(_)) => Err(Problem::field(
            "spec.initial",
            "is given, and spec.prompt_init is not file:NAME; leave one of them out",
        )),
        (true, _) => Err(Problem::field(
            "spec.initial",
            "is no blob, and spec.prompt_init is file:NAME; upload a prompt.safetensors and give its digest",
        )),
    }
}

#[cfg(test)]
mod tests {
    use proptest::{option, prelude::*};

    use super::*;

    fn count() -> impl Strategy<Value = Option<usize>> {
        option::of(any::<u32>().prop_map(|n| n as usize))
    }

    fn number() -> impl Strategy<Value = Option<f64>> {
        option::of(proptest::num::f64::NORMAL | proptest::num::f64::ZERO)
    }

    fn file() -> impl Strategy<Value = Option<PathBuf>> {
        option::of("(/[a-z é]{1,8}){0,3}/[a-z.]{0,6}[a-z]".prop_map(PathBuf::from))
    }

    fn one_of<T: Clone + std::fmt::Debug + 'static>(all: &[T]) -> impl Strategy<Value = Option<T>> + use<T> {
        option::of(proptest::sample::select(all.to_vec()))
    }

    prop_compose! {
        fn data()(
            train in file(),
            eval in file(),
            texts in [option::of(".{0,12}"), option::of(".{0,12}"), option::of(".{0,12}")],
            counts in [count(), count(), count(), count(), count()],
            prompt_init in option::of("class-label|vocab|uniform|uniform:-1,1|text:.{1,9}"),
            (skip_bad_records, target_sentinel) in any::<(Option<bool>, Option<bool>)>(),
            task in one_of(&["trec".to_owned(), "cb".to_owned()]),
        ) -> PartialSpec {
            let [inputs, targets, labels] = texts;
            let [prompt_length, batch_size, max_input_length, max_target_length, keep] = counts;
            PartialSpec {
                train, eval, inputs, targets, labels, prompt_length, batch_size, max_input_length, max_target_length, keep,
                prompt_init, skip_bad_records, target_sentinel, task, ..PartialSpec::default()
            }
        }
    }

    prop_compose! {
        fn job()(
            data in data(),
            recipe in one_of(&[Recipe::Paper, Recipe::ReleasedCode]),
            optimizer in one_of(&[OptimizerName::Adafactor, OptimizerName::AdamW, OptimizerName::Sgd]),
            schedule in one_of(&[Schedule::Constant, Schedule::Linear, Schedule::Cosine]),
            loss in one_of(&[LossReduction::Mean, LossReduction::Sum]),
            numbers in [number(), number(), number(), number()],
            longs in any::<[Option<u64>; 5]>(),
            (shuffle, parameter_scaling) in any::<(Option<bool>, Option<bool>)>(),
            patience in any::<Option<u32>>(),
            place in (
                one_of(&[PromptPlacement::Before, PromptPlacement::After, PromptPlacement::Decoder]),
                one_of(&[PromptLayers::First, PromptLayers::All]),
                one_of(&[PrefixPart::All, PrefixPart::Decoder]),
            ),
            method in one_of(&[
                Method::Prompt, Method::Model, Method::Prefix, Method::Adapter, Method::Text, Method::Search,
            ]),
            sizes in [count(), count(), count(), count(), count(), count()],
            texts in [option::of(".{0,12}"), option::of(".{0,12}"), option::of(".{0,12}")],
            predict in one_of(&[Predict::Decode, Predict::Rank]),
            metrics in option::of(proptest::sample::subsequence(Metric::ALL.to_vec(), 1..=4).prop_shuffle()),
        ) -> PartialSpec {
            let [lr, weight_decay, dropout, z_loss] = numbers;
            let [warmup_steps, steps, seed, eval_every, checkpoint_every] = longs;
            let (prompt_placement, prompt_layers, prefix_part) = place;
            let [prefix_projection, adapter_width, shots, max_prompt_tokens, candidates, shared_length] = sizes;
            let [shot_template, shot_separator, instruction] = texts;
            PartialSpec {
                recipe, optimizer, schedule, loss, lr, weight_decay, dropout, z_loss, warmup_steps, steps, seed, eval_every,
                checkpoint_every, shuffle, patience, metrics, parameter_scaling, prompt_placement, prompt_layers, predict,
                prefix_part, method, prefix_projection, adapter_width, shots, max_prompt_tokens, candidates, shot_template,
                shot_separator, instruction, shared_length, ..data
            }
        }
    }

    proptest! {
        #[test]
        fn what_a_job_sets_crosses_the_wire_unchanged(spec in job()) {
            let wire = to_wire(&spec).unwrap();
            prop_assert_eq!(from_wire(&wire, path_of).unwrap(), spec);
        }

        #[test]
        fn whatever_comes_in_is_read_or_refused(
            numbers in [-1..6i32, -1..6, -1..6, -1..6, -1..6],
            others in [-1..8i32, -1..8, -1..8, -1..8, -1..8],
        ) {
            let [recipe, optimizer, schedule, loss, metric] = numbers;
            let [prompt_placement, prompt_layers, predict, method, prefix_part] = others;
            let wire = TrainingSpec {
                recipe, optimizer, schedule, loss, metrics: vec![metric], prompt_placement, prompt_layers, predict,
                method, prefix_part,
                ..TrainingSpec::default()
            };
            if let Ok(spec) = from_wire(&wire, path_of) {
                prop_assert_eq!(to_wire(&spec).unwrap(), wire);
            }
        }
    }

    #[test]
    fn what_the_machine_decides_stays_behind() {
        let defaults = PartialSpec { prompt_init: None, ..PartialSpec::defaults() };
        let machine =
            PartialSpec { model: Some("m".to_owned()), out: Some("o".into()), threads: Some(3), ..defaults };
        let back = from_wire(&to_wire(&machine).unwrap(), path_of).unwrap();
        assert_eq!(
            (back.model, back.out, back.device, back.tp, back.threads),
            (None, None, None, None, None)
        );
        assert_eq!(back.lr, Some(0.3));
    }

    #[test]
    fn what_cannot_be_written_down_is_refused_with_its_field() {
        let none = PartialSpec::default;
        for (spec, field) in [
            (PartialSpec { keep: Some(1 << 40), ..none() }, "spec.keep"),
            (PartialSpec { metrics: Some(Vec::new()), ..none() }, "spec.metrics"),
            (PartialSpec { train: Some("/".into()), ..none() }, "spec.train"),
            (PartialSpec { data_dir: Some("d".into()), ..none() }, "spec.data_dir"),
        ] {
            assert_eq!(to_wire(&spec).unwrap_err().fields[0].0, field);
        }
    }

    #[test]
    fn a_prompt_to_start_as_is_known_by_its_digest_alone() {
        let digest = "ab".repeat(32);
        let given = PartialSpec { prompt_init: Some("file:runs/a b".to_owned()), ..PartialSpec::default() };
        let wire = to_wire(&given).unwrap();
        assert_eq!(wire.prompt_init.as_deref(), Some("file:prompt.safetensors"));
        let with = |init: &str, initial: Option<DataSource>| {
            let wire = TrainingSpec { prompt_init: Some(init.to_owned()), initial, ..wire.clone() };
            from_wire(&wire, path_of)
                .map(|spec| spec.prompt_init)
                .map_err(|problem| problem.fields[0].0.clone())
        };
        let path =
            DataSource { source: Some(Source::Path("/p.npy".to_owned())), file_name: "p.npy".to_owned() };
        assert_eq!(
            with("file:prompt.safetensors", Some(initial_of(&digest))),
            Ok(Some(format!("file:{digest}")))
        );
        for (init, initial) in
            [("file:p", None), ("file:p", Some(path)), ("vocab", Some(initial_of(&digest)))]
        {
            assert_eq!(with(init, initial), Err("spec.initial".to_owned()), "{init}");
        }
    }

    #[test]
    fn a_blob_is_found_where_the_worker_has_put_it() {
        let source =
            DataSource { source: Some(Source::Digest("ab".to_owned())), file_name: "a.csv".to_owned() };
        let wire = TrainingSpec { train: Some(source), ..TrainingSpec::default() };
        let spec = from_wire(&wire, |source| Ok(Path::new("/cache").join(&source.file_name))).unwrap();
        assert_eq!(spec.train, Some("/cache/a.csv".into()));
        assert!(from_wire(&wire, path_of).is_err());
    }
}
