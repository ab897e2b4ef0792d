//! What a watcher sees: on a terminal a panel that changes, elsewhere lines, or JSON.

use std::io::IsTerminal as _;
use std::time::{Duration, Instant};

use anyhow::Result;
use incipit_proto::v1::metric_point::Point;
use incipit_proto::v1::{EvalMetrics, Job, MetricPoint, StepMetrics};
use serde::Serialize;

use super::{plot, words};
use crate::args::Global;
use crate::cluster::names::short;
use crate::cluster::show;
use crate::output;
use crate::progress::{self, Bar};
use crate::units;

/// How often a plain line tells of the steps.
const LINE_EVERY: Duration = Duration::from_secs(10);
/// Size of the curve.
const COLUMNS: usize = 76;
const ROWS: usize = 10;
/// Evaluations that are listed.
const SHOWN: usize = 6;
/// Steps over which the rate is taken.
const WINDOW: usize = 20;

/// What is known of a job, and how it is shown.
pub(super) struct View {
    pub(super) job: Job,
    /// Whether it was told of.
    seen: bool,
    losses: Vec<(f64, f64)>,
    evaluations: Vec<(u64, EvalMetrics)>,
    /// When each of the last steps was measured, in seconds.
    times: Vec<(u64, f64)>,
    how: How,
}

enum How {
    Panel(Bar),
    Lines { told: Option<Instant> },
    Json,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
enum Line<'a> {
    Job(&'a Job),
    Point(&'a MetricPoint),
}

impl View {
    /// A view of a job. The panel stands on standard error, and what was seen is summed up on standard output at the end.
    pub(super) fn new(job: Job, global: &Global) -> Self {
        let panel = progress::panel(global);
        let how = if global.json {
            How::Json
        } else if panel.is_hidden() || !std::io::stdout().is_terminal() {
            How::Lines { told: None }
        } else {
            How::Panel(panel)
        };
        Self { job, seen: false, losses: Vec::new(), evaluations: Vec::new(), times: Vec::new(), how }
    }

    /// The job has changed, or is seen for the first time.
    ///
    /// # Errors
    /// If it cannot be told.
    pub(super) fn job(&mut self, job: Job) -> Result<()> {
        let before = self.seen.then(|| self.state_line());
        (self.job, self.seen) = (job, true);
        match &self.how {
            How::Json => show::json_line(&Line::Job(&self.job)),
            // What changed may be its progress alone.
            How::Lines { .. } if before.as_ref() == Some(&self.state_line()) => Ok(()),
            How::Lines { .. } => output::line(&self.state_line()),
            How::Panel(_) => {
                self.draw();
                Ok(())
            }
        }
    }

    /// The job measured something.
    ///
    /// # Errors
    /// If it cannot be told.
    pub(super) fn points(&mut self, points: &[MetricPoint]) -> Result<()> {
        for point in points {
            if matches!(self.how, How::Json) {
                show::json_line(&Line::Point(point))?;
            }
            match &point.point {
                Some(Point::Training(step)) => self.step(point, step)?,
                Some(Point::Evaluation(evaluation)) => self.evaluation(point.step, evaluation)?,
                None => {}
            }
        }
        self.draw();
        Ok(())
    }

    fn step(&mut self, point: &MetricPoint, step: &StepMetrics) -> Result<()> {
        self.losses.push((point.step as f64, step.loss));
        if let Some(time) = &point.time {
            if self.times.len() == WINDOW {
                self.times.remove(0);
            }
            self.times.push((point.step, time.seconds as f64 + f64::from(time.nanos) * 1e-9));
        }
        if let How::Lines { told } = &mut self.how
            && told.is_none_or(|told| told.elapsed() >= LINE_EVERY)
        {
            *told = Some(Instant::now());
            output::line(&self.steps())?;
        }
        Ok(())
    }

    fn evaluation(&mut self, step: u64, evaluation: &EvalMetrics) -> Result<()> {
        self.evaluations.push((step, evaluation.clone()));
        if matches!(self.how, How::Lines { .. }) {
            output::line(&format!("step {}  {}", units::count(step), scores(evaluation)))?;
        }
        Ok(())
    }

    /// The end: a panel goes away, and what it showed stays as text.
    ///
    /// # Errors
    /// If it cannot be told.
    pub(super) fn end(&mut self) -> Result<()> {
        if let How::Panel(panel) = std::mem::replace(&mut self.how, How::Lines { told: None }) {
            drop(panel);
            output::line(&self.panel())?;
        }
        Ok(())
    }

    fn draw(&self) {
        if let How::Panel(panel) = &self.how {
            panel.say(self.panel());
        }
    }

    fn state_line(&self) -> String {
        format!("{} {} ({})", short(&self.job.name), words::state(&self.job), words::why(&self.job))
    }

    /// `step 120/3,000  loss 0.3127  4.1 steps/s  12 min 03 s left`.
    fn steps(&self) -> String {
        let progress = self.job.progress.clone().unwrap_or_default();
        let step = self.losses.last().map_or(progress.step, |(step, _)| *step as u64);
        let mut text = format!("step {}/{}", units::count(step), units::count(progress.num_steps));
        if let Some((_, loss)) = self.losses.last() {
            text.push_str(&format!("  loss {loss:.4}"));
        }
        if let Some(rate) = self.rate() {
            let left = progress.num_steps.saturating_sub(step) as f64 / rate;
            let left = units::duration(Duration::from_secs_f64(left.min(1e9)));
            text.push_str(&format!("  {} steps/s  {left} left", units::rate(rate)));
        }
        text
    }

    /// Steps a second, of late; nothing of a job that has ended.
    fn rate(&self) -> Option<f64> {
        let ((first, began), (last, now)) = (self.times.first()?, self.times.last()?);
        let running = !words::has_ended(&self.job) && last > first && now > began;
        running.then(|| (last - first) as f64 / (now - began))
    }

    fn panel(&self) -> String {
        let mut lines = vec![show::cut(&self.state_line(), COLUMNS), self.steps()];
        if let Some(curve) = plot::plot(&self.losses, COLUMNS, ROWS) {
            lines.extend(["loss".to_owned(), curve]);
        }
        let skipped = self.evaluations.len().saturating_sub(SHOWN);
        let best =
            self.evaluations.iter().rev().find(|(_, evaluation)| evaluation.best).map(|(step, _)| *step);
        for (step, evaluation) in self.evaluations.iter().skip(skipped) {
            let mark = if Some(*step) == best { "  best" } else { "" };
            lines.push(show::cut(
                &format!("step {:>8}  {}{mark}", units::count(*step), scores_alone(evaluation)),
                COLUMNS,
            ));
        }
        lines.join("\n")
    }
}

fn scores(evaluation: &EvalMetrics) -> String {
    let best = if evaluation.best { "  best so far" } else { "" };
    format!("{}{best}", scores_alone(evaluation))
}

fn scores_alone(evaluation: &EvalMetrics) -> String {
    let metric = |(name, value): (&String, &f64)| {
        format!("{} {}  ", name.replace(['-', '_'], " "), units::percent(*value))
    };
    let metrics: String = evaluation.metrics.iter().map(metric).collect();
    format!("{metrics}evaluation loss {:.4}", evaluation.loss)
}

#[cfg(test)]
mod tests {
    use incipit_proto::v1::{JobProgress, JobReason, JobState};
    use pbjson_types::Timestamp;

    use super::*;

    fn view() -> View {
        let mut job = words::tests::job(JobState::Running, JobReason::Started);
        job.progress = Some(JobProgress { num_steps: 3000, ..JobProgress::default() });
        let how = How::Lines { told: Some(Instant::now()) };
        View { job, seen: false, losses: Vec::new(), evaluations: Vec::new(), times: Vec::new(), how }
    }

    fn training(step: u64) -> MetricPoint {
        let time = Some(Timestamp { seconds: step as i64, nanos: 0 });
        let point = Point::Training(StepMetrics { loss: 2.0 / step as f64, ..StepMetrics::default() });
        MetricPoint { step, time, point: Some(point), ..MetricPoint::default() }
    }

    #[test]
    fn the_panel_has_the_state_the_curve_and_the_scores() {
        let mut view = view();
        let points: Vec<MetricPoint> = (1..=600).map(training).collect();
        view.points(&points).unwrap();
        let metrics = [("accuracy".to_owned(), 0.75)].into();
        view.evaluations
            .push((500, EvalMetrics { metrics, loss: 0.5, best: true, ..EvalMetrics::default() }));
        let text = view.panel();
        for part in [
            "j-1 running (started)",
            "step 600/3,000",
            "1.00 steps/s  40 min 00 s left",
            "accuracy 75.0 %",
            "best",
            "⠤",
        ] {
            assert!(text.contains(part), "no {part} in\n{text}");
        }
        assert!(text.lines().all(|line| line.chars().count() <= 80), "{text}");
    }

    #[test]
    fn a_job_that_has_ended_has_no_rate() {
        let mut view = view();
        view.points(&[training(1), training(2)]).unwrap();
        assert!(view.steps().contains("left"));
        view.job.set_state(JobState::Cancelled);
        assert!(!view.steps().contains("left"));
    }
}
