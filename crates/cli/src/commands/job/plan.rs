//! What a job would be: its steps, its bytes, its place in the queue, and how long it may take.

use std::time::Duration;

use incipit_data::TextExample;
use incipit_proto::v1::{Backbone, Job, JobState};
use incipit_tune::optimizer::Optimizer;
use incipit_tune::spec::{Method, TrainSpec};
use serde::Serialize;

use crate::cluster::blobs::LocalFile;
use crate::cluster::names::short;
use crate::cluster::show::word;
use crate::output;
use crate::units;

/// Bytes of text a token, roughly, as T5's vocabulary cuts English.
const BYTES_A_TOKEN: usize = 4;
/// Bytes of a number of the prompt or the optimizer.
const BYTES_A_NUMBER: u64 = 4;

/// What is known of the examples, where they are on this machine.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub(super) struct Examples {
    pub(super) train: u64,
    pub(super) eval: Option<u64>,
    /// Roughly: prompt rows, input and target of a training example.
    pub(super) tokens_each: f64,
}

/// The plan of a job.
#[derive(Debug, Serialize)]
pub(super) struct Plan {
    pub(super) backbone: String,
    backbone_state: String,
    steps: u64,
    epochs: Option<f64>,
    examples: Option<Examples>,
    method: Method,
    tasks: usize,
    shared_length: Option<usize>,
    evaluations: u64,
    checkpoints: u64,
    checkpoints_kept: u64,
    prompt_bytes: Option<u64>,
    optimizer_bytes: Option<u64>,
    checkpoint_bytes: Option<u64>,
    /// How many jobs are before it; absent where that was not told.
    queue_position: Option<u32>,
    queued_jobs: u32,
    running_jobs: u32,
    max_running_jobs: u32,
    estimated_seconds: Option<f64>,
    uploads: Vec<Upload>,
}

/// A file to be sent.
#[derive(Debug, Serialize)]
struct Upload {
    file: String,
    bytes: u64,
    digest: String,
}

impl Examples {
    /// Counts the examples, and their tokens roughly.
    pub(super) fn count(spec: &TrainSpec, train: &[TextExample], eval: Option<&[TextExample]>) -> Self {
        let tokens = |text: &str, most: usize| (text.len().div_ceil(BYTES_A_TOKEN) + 1).min(most);
        let each = |example: &TextExample| {
            tokens(&example.inputs, spec.max_input_length) + tokens(&example.targets, spec.max_target_length)
        };
        let mean = train.iter().map(each).sum::<usize>() as f64 / train.len().max(1) as f64;
        Self {
            train: train.len() as u64,
            eval: eval.map(|eval| eval.len() as u64),
            tokens_each: mean + spec.prompt_length as f64,
        }
    }

    /// Those of all tasks, if they are known; the mean of their tokens is that of a step.
    fn of_all(tasks: &[Self], specs: &[&TrainSpec]) -> Option<Self> {
        let (tokens, batch) = tasks.iter().zip(specs).fold((0.0, 0.0), |(tokens, batch), (known, spec)| {
            let size = spec.batch_size as f64;
            (tokens + known.tokens_each * size, batch + size)
        });
        let eval = tasks.iter().filter_map(|known| known.eval).reduce(|sum, eval| sum + eval);
        let train = tasks.iter().map(|known| known.train).sum();
        (!tasks.is_empty()).then(|| Self { train, eval, tokens_each: tokens / batch })
    }
}

impl Plan {
    /// The plan of a job's tasks, one or several, with what the coordinator answered, if it did. `examples` are each task's, or none.
    pub(super) fn new(
        specs: &[&TrainSpec],
        examples: &[Examples],
        backbone: &Backbone,
        answer: Option<&Job>,
        missing: &[LocalFile],
    ) -> Self {
        // What all tasks have in common is any one's.
        let spec = specs[0];
        let examples = Examples::of_all(examples, specs);
        let batch: u64 = specs.iter().map(|spec| spec.batch_size as u64).sum();
        let batches = examples.map(|known| known.train / batch).filter(|n| *n > 0 && specs.len() == 1);
        let size = |of: &dyn Fn(&TrainSpec) -> Option<u64>| specs.iter().map(|spec| of(spec)).sum();
        let prompt: Option<u64> = size(&|spec| {
            let (rows, d_model) = shape(spec, backbone)?;
            Some((rows * d_model) as u64 * BYTES_A_NUMBER)
        });
        let optimizer: Option<u64> =
            size(&|spec| shape(spec, backbone).map(|shape| optimizer_bytes(spec, shape)));
        let checkpoints = spec.steps.div_ceil(spec.checkpoint_every);
        let evaluated = specs.iter().filter(|spec| spec.eval.is_some()).count() as u64;
        // The newest, and the best of each task besides.
        let kept = checkpoints.min(spec.keep as u64) + evaluated;
        let tokens = examples.map(|known| known.tokens_each * (spec.steps * batch) as f64);
        let queued = answer.filter(|job| matches!(job.state(), JobState::Queued | JobState::Unspecified));
        Self {
            backbone: short(&backbone.name),
            backbone_state: word(backbone.state().as_str_name(), "BACKBONE_STATE_"),
            steps: spec.steps,
            epochs: batches.map(|batches| spec.steps as f64 / batches as f64),
            examples,
            method: spec.method,
            tasks: specs.len(),
            shared_length: spec.shared_length,
            evaluations: if evaluated > 0 { spec.steps.div_ceil(spec.eval_every) } else { 0 },
            checkpoints,
            checkpoints_kept: kept,
            prompt_bytes: prompt,
            optimizer_bytes: optimizer,
            checkpoint_bytes: prompt.zip(optimizer).map(|(prompt, optimizer)| kept * (prompt + optimizer)),
            queue_position: queued.map(|job| job.queue_position),
            queued_jobs: backbone.queued_jobs,
            running_jobs: backbone.running_jobs,
            max_running_jobs: backbone.max_running_jobs,
            estimated_seconds: tokens
                .filter(|_| backbone.tokens_per_second > 0.0)
                .map(|tokens| tokens / backbone.tokens_per_second),
            uploads: missing.iter().map(Upload::from).collect(),
        }
    }

    /// The plan for people.
    pub(super) fn text(&self) -> String {
        let count = units::count;
        let bytes =
            |bytes: Option<u64>| bytes.map_or("known once the backbone is loaded".to_owned(), units::bytes);
        let mut rows = Vec::new();
        let mut row = |name: &str, value: String| rows.push(vec![name.to_owned(), value]);
        row(
            "backbone",
            format!(
                "{} ({}), {} of {} jobs",
                self.backbone, self.backbone_state, self.running_jobs, self.max_running_jobs
            ),
        );
        let before = self
            .queue_position
            .map_or("told once the data is there".to_owned(), |jobs| format!("{jobs} jobs"));
        row("before it", format!("{before} ({} wait in all)", self.queued_jobs));
        if let Some(shared) = self.shared_length {
            row("tasks", format!("{}, whose prompts share {shared} rows", self.tasks));
        }
        let epochs = self.epochs.map(|epochs| format!(", {epochs:.1} epochs")).unwrap_or_default();
        row("steps", format!("{}{epochs}", count(self.steps)));
        row(
            "examples",
            self.examples.map_or("on the workers, not counted".to_owned(), |known| {
                let eval =
                    known.eval.map(|eval| format!(", {} to evaluate", count(eval))).unwrap_or_default();
                format!("{} to train{eval}", count(known.train))
            }),
        );
        row("evaluations", count(self.evaluations));
        row(
            "checkpoints",
            format!("{} at least, {} kept at most", count(self.checkpoints), count(self.checkpoints_kept)),
        );
        if self.method == Method::Prompt {
            row("prompt", bytes(self.prompt_bytes));
            row("optimizer", bytes(self.optimizer_bytes));
            row("kept", bytes(self.checkpoint_bytes));
        }
        row("time", self.time());
        row(
            "upload",
            match &self.uploads[..] {
                [] => "nothing".to_owned(),
                files => files
                    .iter()
                    .map(|file| format!("{} ({})", file.file, units::bytes(file.bytes)))
                    .collect::<Vec<_>>()
                    .join(", "),
            },
        );
        output::table(&["plan", ""], &rows, false)
    }

    fn time(&self) -> String {
        let Some(seconds) = self.estimated_seconds else {
            return match self.examples {
                Some(_) => "not known: the backbone has not trained yet".to_owned(),
                None => "not known: the examples are on the workers".to_owned(),
            };
        };
        let time = units::duration(Duration::from_secs_f64(seconds.min(1e9)));
        let shared = if self.running_jobs > 0 { ", were it alone" } else { "" };
        format!("roughly {time} of steps{shared}")
    }
}

impl From<&LocalFile> for Upload {
    fn from(file: &LocalFile) -> Self {
        let name = file.path.file_name().unwrap_or(file.path.as_os_str());
        Self { file: name.to_string_lossy().into_owned(), bytes: file.size, digest: file.digest.clone() }
    }
}

/// Rows and columns of a prompt, if one is trained and the backbone is known.
fn shape(spec: &TrainSpec, backbone: &Backbone) -> Option<(usize, usize)> {
    let [d_model, num_layers] = [backbone.d_model, backbone.num_layers].map(|number| number as usize);
    let rows = spec.prompt_length * spec.prompt_layers.of(num_layers);
    (rows > 0 && d_model > 0 && spec.method == Method::Prompt).then_some((rows, d_model))
}

/// Rows that tasks share have an optimizer of their own, in each task's checkpoint.
fn optimizer_bytes(spec: &TrainSpec, (rows, d_model): (usize, usize)) -> u64 {
    let shared = spec.shared_length.unwrap_or_default();
    let parts = [rows - shared, shared].into_iter().filter(|rows| *rows > 0);
    let states = parts.flat_map(|rows| Optimizer::new(&spec.optimizer_kind(), rows, d_model).state());
    states.map(|tensor| tensor.data.len() as u64 * BYTES_A_NUMBER).sum()
}

#[cfg(test)]
mod tests {
    use incipit_proto::v1::BackboneState;
    use incipit_tune::placement::PromptLayers;
    use incipit_tune::spec::PartialSpec;

    use std::path::Path;

    use super::*;

    fn spec(change: PartialSpec) -> TrainSpec {
        let least = PartialSpec {
            model: Some("m".into()),
            train: Some("/d/train.jsonl".into()),
            eval: Some("/d/eval.jsonl".into()),
            out: Some("/o".into()),
            steps: Some(1200),
            batch_size: Some(10),
            ..PartialSpec::default()
        };
        TrainSpec::resolve(change.over(least), None, false).unwrap()
    }

    fn texts(count: usize) -> Vec<TextExample> {
        let text = TextExample { inputs: "x".repeat(80), targets: "yes".into(), index: 0, line: 1 };
        vec![text; count]
    }

    fn backbone() -> Backbone {
        let (name, state) = ("backbones/base".to_owned(), BackboneState::Ready.into());
        Backbone {
            name,
            state,
            d_model: 512,
            tokens_per_second: 1230.0,
            max_running_jobs: 32,
            ..Backbone::default()
        }
    }

    #[test]
    fn a_plan_counts_steps_epochs_bytes_and_time() {
        let spec = spec(PartialSpec::default());
        let known = Examples::count(&spec, &texts(105), Some(&texts(7)));
        assert_eq!((known.train, known.eval, known.tokens_each), (105, Some(7), 123.0));
        let answer = Job { queue_position: 2, ..Job::default() };
        let missing = [LocalFile::made(Path::new("/d/train.jsonl"), vec![0; 2048])];
        let plan = Plan::new(&[&spec], &[known], &backbone(), Some(&answer), &missing);
        assert_eq!((plan.steps, plan.epochs), (1200, Some(120.0)));
        assert_eq!((plan.evaluations, plan.checkpoints, plan.checkpoints_kept), (3, 3, 4));
        assert_eq!((plan.prompt_bytes, plan.optimizer_bytes), (Some(204_800), Some(204_800)));
        assert_eq!((plan.checkpoint_bytes, plan.queue_position), (Some(4 * 409_600), Some(2)));
        assert_eq!(plan.estimated_seconds, Some(1200.0));
        let deep = TrainSpec { prompt_layers: PromptLayers::All, ..spec };
        let of_layers = |num_layers| {
            let backbone = Backbone { num_layers, ..backbone() };
            Plan::new(&[&deep], &[known], &backbone, None, &[]).prompt_bytes
        };
        assert_eq!((of_layers(8), of_layers(0)), (Some(8 * 204_800), None));
        let text = plan.text();
        for part in [
            "base (ready)",
            "2 jobs",
            "120.0 epochs",
            "105 to train, 7 to evaluate",
            "roughly 20 min 00 s",
            "train.jsonl (2.0 KiB)",
        ] {
            assert!(text.contains(part), "no {part} in\n{text}");
        }
        assert!(text.lines().all(|line| line.trim_end().chars().count() <= 80), "{text}");
    }

    #[test]
    fn tasks_that_share_rows_are_one_plan() {
        let shared = |batch_size| {
            let (shared_length, prompt_length) = (Some(40), Some(100));
            let batch_size = Some(batch_size);
            spec(PartialSpec { shared_length, prompt_length, batch_size, ..PartialSpec::default() })
        };
        let (one, other) = (shared(10), shared(30));
        let known = [&one, &other].map(|spec| Examples::count(spec, &texts(60), Some(&texts(7))));
        let plan = Plan::new(&[&one, &other], &known, &backbone(), None, &[]);
        assert_eq!((plan.tasks, plan.epochs, plan.checkpoints_kept), (2, None, 3 + 2));
        assert_eq!((plan.prompt_bytes, plan.optimizer_bytes), (Some(2 * 204_800), Some(2 * 204_800)));
        let examples = plan.examples.unwrap();
        assert_eq!((examples.train, examples.eval, examples.tokens_each), (120, Some(14), 123.0));
        assert_eq!(plan.estimated_seconds, Some(123.0 * 40.0 * 1200.0 / 1230.0));
        assert!(plan.text().contains("2, whose prompts share 40 rows"), "{}", plan.text());
    }

    #[test]
    fn what_is_not_known_is_said() {
        let spec = spec(PartialSpec::default());
        let plan = Plan::new(
            &[&spec],
            &[],
            &Backbone { d_model: 0, tokens_per_second: 0.0, ..backbone() },
            None,
            &[],
        );
        assert_eq!(
            (plan.epochs, plan.prompt_bytes, plan.estimated_seconds, plan.queue_position),
            (None, None, None, None)
        );
        let text = plan.text();
        assert!(text.lines().all(|line| line.trim_end().chars().count() <= 80), "{text}");
        for part in ["on the workers", "once the backbone is loaded", "not known", "nothing"] {
            assert!(text.contains(part), "no {part} in\n{text}");
        }
    }

    #[test]
    fn the_optimizers_state_is_that_of_its_kind() {
        use incipit_tune::recipe::OptimizerName;
        let of = |optimizer, rows| {
            optimizer_bytes(
                &spec(PartialSpec { optimizer: Some(optimizer), ..PartialSpec::default() }),
                (rows, 512),
            )
        };
        assert_eq!(of(OptimizerName::Sgd, 100), 0);
        assert_eq!(of(OptimizerName::AdamW, 100), 2 * 4 * 100 * 512);
        assert_eq!(of(OptimizerName::Adafactor, 128), 4 * (128 + 512), "factored");
    }
}
