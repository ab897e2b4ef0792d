//! What a watcher sees: on a terminal a panel that changes, elsewhere lines, or JSON.

use std::collections::BTreeSet;
use std::io::IsTerminal as _;
use std::time::{Duration, Instant};

use anyhow::Result;
use incipit_proto::v1::metric_point::Point;
use incipit_proto::v1::{EvalMetrics, Job, MetricPoint, StepMetrics, TaskEvaluation};
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
    evaluations: Vec<Evaluated>,
    /// When each of the last steps was measured, in seconds.
    times: Vec<(u64, f64)>,
    how: How,
}

/// An evaluation of a task; the task of a job that has one has no name.
struct Evaluated {
    step: u64,
    task: String,
    metrics: EvalMetrics,
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
        let of_task = |task: &TaskEvaluation| {
            let metrics = task.evaluation.clone().unwrap_or_default();
            Evaluated { step, task: task.name.clone(), metrics }
        };
        let mut evaluated: Vec<Evaluated> = evaluation.tasks.iter().map(of_task).collect();
        if evaluated.is_empty() {
            evaluated.push(Evaluated { step, task: String::new(), metrics: evaluation.clone() });
        }
        if matches!(self.how, How::Lines { .. }) {
            for one in &evaluated {
                let best = if one.metrics.best { "  best so far" } else { "" };
                output::line(&format!("step {}  {}{best}", units::count(step), one.scores()))?;
            }
        }
        self.evaluations.extend(evaluated);
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
        // Of several tasks the last of each, at least.
        let tasks: BTreeSet<&str> = self.evaluations.iter().map(|one| &*one.task).collect();
        let skipped = self.evaluations.len().saturating_sub(SHOWN.max(tasks.len()));
        for one in self.evaluations.iter().skip(skipped) {
            let of_task = |other: &&Evaluated| other.metrics.best && other.task == one.task;
            let best = self.evaluations.iter().rev().find(of_task).map(|best| best.step);
            let mark = if Some(one.step) == best { "  best" } else { "" };
            let line = format!("step {:>8}  {}{mark}", units::count(one.step), one.scores());
            lines.push(show::cut(&line, COLUMNS));
        }
        lines.join("\n")
    }
}

impl Evaluated {
    /// `boolq  accuracy 75.0 %  evaluation loss 0.5000`.
    fn scores(&self) -> String {
        let metric = |(name, value): (&String, &f64)| {
            format!("{} {}  ", name.replace(['-', '_'], " "), units::percent(*value))
        };
        let metrics: String = self.metrics.metrics.iter().map(metric).collect();
        let of_task = if self.task.is_empty() { String::new() } else { format!("{}  ", self.task) };
        format!("{of_task}{metrics}evaluation loss {:.4}", self.metrics.loss)
    }
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
        let metrics = EvalMetrics { metrics, loss: 0.5, best: true, ..EvalMetrics::default() };
        view.evaluation(500, &metrics).unwrap();
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
    fn each_of_several_tasks_has_a_line_and_a_best_of_its_own() {
        let mut view = view();
        for (step, best) in [(500, [true, true]), (600, [false, true])] {
            let tasks = ["boolq", "rte"].into_iter().zip(best).map(|(name, best)| TaskEvaluation {
                name: name.to_owned(),
                evaluation: Some(EvalMetrics { loss: 0.5, best, ..EvalMetrics::default() }),
            });
            let metrics = EvalMetrics { tasks: tasks.collect(), ..EvalMetrics::default() };
            view.evaluation(step, &metrics).unwrap();
        }
        let text = view.panel();
        let best: Vec<&str> = text.lines().filter(|line| line.ends_with("best")).collect();
        assert!(best.len() == 2 && best[0].contains("500  boolq") && best[1].contains("600  rte"), "{text}");
        assert_eq!(text.lines().filter(|line| line.contains("evaluation loss")).count(), 4, "{text}");
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
