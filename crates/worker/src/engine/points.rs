//! What was measured, as the wire has it.

use std::time::Duration;

use incipit_proto::v1::{
    CheckpointSaved, CheckpointTask, EvalMetrics, MetricPoint, StepMetrics, TaskEvaluation, TaskStep,
    metric_point::Point,
};
use incipit_tune::evaluate::Evaluation;
use incipit_tune::job::Update;

use crate::clock;
use crate::engine::resident::{Evaluated, OfTasks};

/// A step of a job's tasks, all of them.
pub(crate) fn of_step(updates: &OfTasks<Update>, took: Duration) -> MetricPoint {
    let seconds = took.as_secs_f64();
    let metrics = match &updates[..] {
        [(_, one)] => step_metrics(one, seconds),
        several => StepMetrics {
            loss: mean(several, |update| update.loss),
            gradient_norm: mean(several, |update| update.gradient_norm),
            num_tokens: several.iter().map(|(_, update)| update.num_tokens as u64).sum(),
            tasks: several.iter().map(|task| task_step(task, seconds)).collect(),
            ..several.first().map(|(_, first)| step_metrics(first, seconds)).unwrap_or_default()
        },
    };
    point(updates.first().map_or(0, |(_, update)| update.step), Point::Training(metrics))
}

fn step_metrics(update: &Update, seconds: f64) -> StepMetrics {
    StepMetrics {
        loss: update.loss,
        lr: f64::from(update.lr),
        gradient_norm: update.gradient_norm,
        epoch: update.epoch,
        num_tokens: update.num_tokens as u64,
        seconds,
        tasks: Vec::new(),
    }
}

fn task_step((name, update): &(String, Update), seconds: f64) -> TaskStep {
    TaskStep { name: name.clone(), step: Some(step_metrics(update, seconds)) }
}

/// An evaluation of those of a job's tasks that are evaluated.
pub(crate) fn of_evaluation(evaluated: &Evaluated) -> EvalMetrics {
    match &evaluated[..] {
        [(name, one)] if name.is_empty() => eval_metrics(one),
        several => EvalMetrics {
            loss: mean(several, |(evaluation, _)| evaluation.loss),
            score: mean(several, |(evaluation, _)| evaluation.score()),
            tasks: several.iter().map(task_evaluation).collect(),
            ..EvalMetrics::default()
        },
    }
}

fn eval_metrics((evaluation, best): &(Evaluation, bool)) -> EvalMetrics {
    EvalMetrics {
        metrics: evaluation.metrics.iter().map(|(metric, value)| (metric.to_string(), *value)).collect(),
        loss: evaluation.loss,
        legal_share: evaluation.legal_share,
        score: evaluation.score(),
        best: *best,
        tasks: Vec::new(),
    }
}

fn task_evaluation((name, evaluated): &(String, (Evaluation, bool))) -> TaskEvaluation {
    TaskEvaluation { name: name.clone(), evaluation: Some(eval_metrics(evaluated)) }
}

/// A checkpoint, without its files: whether it is the best of each task, and what the evaluation at its step measured, if there was one.
pub(crate) fn of_checkpoint(
    step: u64,
    best: &OfTasks<bool>,
    measured: Option<&EvalMetrics>,
) -> CheckpointSaved {
    let score = measured.map(|measured| measured.score);
    let saved = CheckpointSaved { step, score, ..CheckpointSaved::default() };
    if let [(name, best)] = &best[..]
        && name.is_empty()
    {
        return CheckpointSaved { best: *best, ..saved };
    }
    let task = |(name, best): &(String, bool)| {
        let evaluation = measured.and_then(|all| all.tasks.iter().find(|task| task.name == *name));
        let score = evaluation.and_then(|task| Some(task.evaluation.as_ref()?.score));
        CheckpointTask { name: name.clone(), score, best: *best }
    };
    CheckpointSaved { tasks: best.iter().map(task).collect(), ..saved }
}

fn mean<T>(tasks: &[(String, T)], number: impl Fn(&T) -> f64) -> f64 {
    tasks.iter().map(|(_, task)| number(task)).sum::<f64>() / tasks.len().max(1) as f64
}

/// Something that was measured after `step` steps.
pub(crate) fn point(step: u64, point: Point) -> MetricPoint {
    MetricPoint { offset: 0, step, time: Some(clock::now()), point: Some(point) }
}
