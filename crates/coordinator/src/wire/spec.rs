//! What a job may be told to train.

use std::collections::BTreeSet;

use incipit_proto::v1::{
    DataSource, Loss, Method, Metric, Optimizer, Predict, PrefixPart, PromptLayers, PromptPlacement, Recipe,
    Schedule, TrainingSpec, TrainingTask, data_source::Source,
};

use super::{
    Roots,
    check::{Checks, MAX_TASKS, MAX_TEXT, is_digest, is_file_name, is_task_name},
};

/// Notes what is wrong with a specification. Whether its data can be used is for the worker to say, which reads them.
pub(super) fn check_spec(checks: &mut Checks, spec: &TrainingSpec, roots: &Roots) {
    check_settings(checks, spec, roots);
    if spec.tasks.is_empty() && spec.shared_length.is_none() {
        if spec.train.is_none() {
            checks.wrong("job.spec.train", "is missing; say what to train on");
        }
        check_evaluation(checks, spec, spec.eval.is_some());
        return;
    }
    check_tasks(checks, spec, roots);
    let evaluated = |task: &TrainingTask| task.spec.as_ref().is_some_and(|own| own.eval.is_some());
    check_evaluation(checks, spec, spec.eval.is_some() || spec.tasks.iter().any(evaluated));
}

/// Whatever is given.
fn check_settings(checks: &mut Checks, spec: &TrainingSpec, roots: &Roots) {
    for (field, data) in [("job.spec.train", &spec.train), ("job.spec.eval", &spec.eval)] {
        if let Some(data) = data {
            check_data(checks, field, data, roots);
        }
    }
    check_texts(checks, spec);
    check_numbers(checks, spec);
    check_choices(checks, spec);
    check_init(checks, spec.prompt_init.as_deref());
    check_initial(checks, spec, roots);
}

/// Tasks that share rows. Which rows fit is for the worker to say.
fn check_tasks(checks: &mut Checks, spec: &TrainingSpec, roots: &Roots) {
    if !(2..=MAX_TASKS).contains(&spec.tasks.len()) {
        let what = format!("has {}; give 2 to {MAX_TASKS}, or none without shared_length", spec.tasks.len());
        checks.wrong("job.spec.tasks", what);
    }
    if spec.shared_length.is_none() {
        checks.wrong("job.spec.shared_length", "is missing; say how many rows the tasks share");
    }
    if spec.patience.is_some() {
        checks.wrong("job.spec.patience", "ends one task before the others; leave it out");
    }
    let mut names = BTreeSet::new();
    for (place, task) in spec.tasks.iter().enumerate() {
        let field = format!("job.spec.tasks[{place}].");
        if !is_task_name(&task.name) {
            let what = format!(
                "is {:.80?}; use up to 64 letters, digits, -, _ and ., with no . in front",
                task.name
            );
            checks.wrong(format!("{field}name"), what);
        }
        if !names.insert(&task.name) {
            checks.wrong(format!("{field}name"), format!("is {:.80?}, as another task's", task.name));
        }
        let own = task.spec.clone().unwrap_or_default();
        if own.train.is_none() && spec.train.is_none() {
            checks.wrong(format!("{field}spec.train"), "is missing; say what to train on");
        }
        if !own.metrics.is_empty() && own.eval.is_none() && spec.eval.is_none() {
            let what = "is of no use without an eval of the task; give that too, or leave this out";
            checks.wrong(format!("{field}spec.metrics"), what);
        }
        checks.under("job.spec.", &format!("{field}spec."), |checks| {
            check_settings(checks, &own, roots);
            check_own(checks, &own);
        });
    }
}

/// What one step of all tasks has in common is not one task's.
fn check_own(checks: &mut Checks, own: &TrainingSpec) {
    let common = [
        ("job.spec.tasks", !own.tasks.is_empty()),
        ("job.spec.shared_length", own.shared_length.is_some()),
        ("job.spec.prompt_placement", own.prompt_placement != 0),
        ("job.spec.method", own.method != 0),
        ("job.spec.recipe", own.recipe != 0),
        ("job.spec.optimizer", own.optimizer != 0),
        ("job.spec.lr", own.lr.is_some()),
        ("job.spec.schedule", own.schedule != 0),
        ("job.spec.warmup_steps", own.warmup_steps.is_some()),
        ("job.spec.weight_decay", own.weight_decay.is_some()),
        ("job.spec.parameter_scaling", own.parameter_scaling.is_some()),
        ("job.spec.steps", own.steps.is_some()),
        ("job.spec.seed", own.seed.is_some()),
        ("job.spec.eval_every", own.eval_every.is_some()),
        ("job.spec.checkpoint_every", own.checkpoint_every.is_some()),
        ("job.spec.keep", own.keep.is_some()),
        ("job.spec.patience", own.patience.is_some()),
    ];
    for (field, _) in common.into_iter().filter(|(_, given)| *given) {
        checks.wrong(field, "is the same for all tasks; say it for the job");
    }
}

/// Which benchmarks there are is for the worker to say.
fn check_texts(checks: &mut Checks, spec: &TrainingSpec) {
    let texts = [
        ("job.spec.inputs", spec.inputs.as_deref()),
        ("job.spec.targets", spec.targets.as_deref()),
        ("job.spec.labels", spec.labels.as_deref()),
    ];
    checks.text("job.spec.task", spec.task.as_deref());
    checks.text("job.spec.shot_template", spec.shot_template.as_deref());
    checks.length("job.spec.shot_separator", spec.shot_separator.as_deref());
    checks.length("job.spec.instruction", spec.instruction.as_deref());
    for (field, text) in texts {
        checks.text(field, text);
        if text.is_some() && spec.task.is_some() {
            checks.wrong(field, "is given, and job.spec.task brings its own; leave one of them out");
        }
    }
}

fn check_data(checks: &mut Checks, field: &str, data: &DataSource, roots: &Roots) {
    match &data.source {
        None => checks.wrong(field, "has neither digest nor path; give one"),
        Some(Source::Digest(digest)) if !is_digest(digest) => {
            let what = format!("is {digest:.80?}; give a BLAKE3 as 64 small hexadecimal digits");
            checks.wrong(format!("{field}.digest"), what);
        }
        Some(Source::Digest(_)) => {}
        Some(Source::Path(path)) => checks.path(&format!("{field}.path"), path, &roots.data, "data"),
    }
    // A path has a name of its own.
    let needed = !matches!(data.source, Some(Source::Path(_)));
    if (needed || !data.file_name.is_empty()) && !is_file_name(&data.file_name) {
        let what = format!("is {:.80?}; give the file's own name, without directories", data.file_name);
        checks.wrong(format!("{field}.file_name"), what);
    }
}

fn check_numbers(checks: &mut Checks, spec: &TrainingSpec) {
    const MAX_STEPS: u64 = 1_000_000_000;
    checks.range("job.spec.prompt_length", spec.prompt_length, 1..=10_000);
    checks.range("job.spec.shared_length", spec.shared_length, 1..=10_000);
    checks.range("job.spec.prefix_projection", spec.prefix_projection, 1..=65_536);
    checks.range("job.spec.adapter_width", spec.adapter_width, 1..=65_536);
    checks.range("job.spec.shots", spec.shots, 1..=65_536);
    checks.range("job.spec.max_prompt_tokens", spec.max_prompt_tokens, 1..=65_536);
    checks.range("job.spec.candidates", spec.candidates, 1..=65_536);
    checks.range("job.spec.warmup_steps", spec.warmup_steps, 0..=MAX_STEPS);
    checks.range("job.spec.batch_size", spec.batch_size, 1..=65_536);
    checks.range("job.spec.steps", spec.steps, 1..=MAX_STEPS);
    checks.range("job.spec.max_input_length", spec.max_input_length, 1..=65_536);
    checks.range("job.spec.max_target_length", spec.max_target_length, 1..=65_536);
    checks.range("job.spec.eval_every", spec.eval_every, 1..=MAX_STEPS);
    checks.range("job.spec.checkpoint_every", spec.checkpoint_every, 1..=MAX_STEPS);
    checks.range("job.spec.keep", spec.keep, 1..=1000);
    checks.range("job.spec.patience", spec.patience, 1..=1_000_000);
    checks.range("job.spec.weight_decay", spec.weight_decay, 0.0..=1e6);
    checks.range("job.spec.z_loss", spec.z_loss, 0.0..=1e6);
    if let Some(lr) = spec.lr
        && !(lr > 0.0 && lr <= 1e6)
    {
        checks.wrong("job.spec.lr", format!("is {lr}; give more than 0, and at most 1e6"));
    }
    if let Some(dropout) = spec.dropout
        && !(0.0..1.0).contains(&dropout)
    {
        checks.wrong("job.spec.dropout", format!("is {dropout}; give 0 to less than 1"));
    }
}

fn check_choices(checks: &mut Checks, spec: &TrainingSpec) {
    let choices = [
        ("job.spec.recipe", spec.recipe, Recipe::try_from(spec.recipe).is_ok()),
        ("job.spec.optimizer", spec.optimizer, Optimizer::try_from(spec.optimizer).is_ok()),
        ("job.spec.schedule", spec.schedule, Schedule::try_from(spec.schedule).is_ok()),
        ("job.spec.loss", spec.loss, Loss::try_from(spec.loss).is_ok()),
        (
            "job.spec.prompt_placement",
            spec.prompt_placement,
            PromptPlacement::try_from(spec.prompt_placement).is_ok(),
        ),
        ("job.spec.prompt_layers", spec.prompt_layers, PromptLayers::try_from(spec.prompt_layers).is_ok()),
        ("job.spec.predict", spec.predict, Predict::try_from(spec.predict).is_ok()),
        ("job.spec.method", spec.method, Method::try_from(spec.method).is_ok()),
        ("job.spec.prefix_part", spec.prefix_part, PrefixPart::try_from(spec.prefix_part).is_ok()),
    ];
    for (field, number, _) in choices.into_iter().filter(|(_, _, known)| !known) {
        checks.wrong(field, format!("is {number}, which nobody here knows"));
    }
    let known = |number: &i32| Metric::try_from(*number).is_ok_and(|metric| metric != Metric::Unspecified);
    if let Some(number) = spec.metrics.iter().find(|number| !known(number)) {
        checks.wrong("job.spec.metrics", format!("has {number}, which nobody here knows"));
    }
    if spec.metrics.iter().collect::<BTreeSet<_>>().len() < spec.metrics.len() {
        checks.wrong("job.spec.metrics", "has a metric twice");
    }
}

/// As the worker parses it.
fn check_init(checks: &mut Checks, init: Option<&str>) {
    let Some(init) = init else { return };
    let fits = match init.split_once(':') {
        None => matches!(init, "class-label" | "vocab" | "uniform"),
        Some(("file", name)) => is_file_name(name),
        Some(("text", text)) => !text.trim().is_empty() && text.len() <= MAX_TEXT,
        Some(("uniform", range)) => {
            let number = |text: &str| text.trim().parse::<f32>().ok().filter(|number| number.is_finite());
            let bounds = range.split_once(',').and_then(|(low, high)| Some((number(low)?, number(high)?)));
            bounds.is_some_and(|(low, high)| low < high)
        }
        Some(_) => false,
    };
    if !fits {
        let what = format!(
            "is {init:.80?}; give class-label, vocab, uniform, uniform:LOW,HIGH, text:TEXT or file:NAME"
        );
        checks.wrong("job.spec.prompt_init", what);
    }
}

/// A prompt to start as is a blob, whose bytes nobody changes, and is there if the specification says that there is one.
fn check_initial(checks: &mut Checks, spec: &TrainingSpec, roots: &Roots) {
    const FIELD: &str = "job.spec.initial";
    let of_file = spec.prompt_init.as_deref().is_some_and(|init| init.starts_with("file:"));
    match &spec.initial {
        None if of_file => {
            checks.wrong(FIELD, "is missing, and job.spec.prompt_init is file:NAME; give its digest");
        }
        None => {}
        Some(_) if !of_file => {
            checks.wrong(FIELD, "is of no use unless job.spec.prompt_init is file:NAME; leave it out");
        }
        Some(DataSource { source: Some(Source::Path(_)), .. }) => {
            checks.wrong(FIELD, "is a path, where the prompt may change; upload it and give its digest");
        }
        Some(initial) => check_data(checks, FIELD, initial, roots),
    }
}

fn check_evaluation(checks: &mut Checks, spec: &TrainingSpec, evaluated: bool) {
    if evaluated {
        return;
    }
    let given = [
        ("job.spec.eval_every", spec.eval_every.is_some()),
        ("job.spec.patience", spec.patience.is_some()),
        ("job.spec.metrics", !spec.metrics.is_empty()),
    ];
    for (field, _) in given.into_iter().filter(|(_, given)| *given) {
        checks.wrong(field, "is of no use without job.spec.eval; give that too, or leave this out");
    }
}
