//! What was measured, as the wire has it.

use std::time::Duration;

use incipit_proto::v1::{EvalMetrics, MetricPoint, StepMetrics, metric_point::Point};
use incipit_tune::evaluate::Evaluation;
use incipit_tune::job::Update;

use crate::clock;

/// A step.
pub(crate) fn of_step(update: &Update, took: Duration) -> MetricPoint {
    let metrics = StepMetrics {
        loss: update.loss,
        lr: f64::from(update.lr),
        gradient_norm: update.gradient_norm,
        epoch: update.epoch,
        num_tokens: update.num_tokens as u64,
        seconds: took.as_secs_f64(),
    };
    point(update.step, Point::Training(metrics))
}

/// An evaluation after `step` steps.
pub(crate) fn of_evaluation(step: u64, evaluation: &Evaluation, best: bool) -> MetricPoint {
    let metrics = EvalMetrics {
        metrics: evaluation.metrics.iter().map(|(metric, value)| (metric.to_string(), *value)).collect(),
        loss: evaluation.loss,
        legal_share: evaluation.legal_share,
        score: evaluation.score(),
        best,
    };
    point(step, Point::Evaluation(metrics))
}

fn point(step: u64, point: Point) -> MetricPoint {
    MetricPoint { offset: 0, step, time: Some(clock::now()), point: Some(point) }
}
