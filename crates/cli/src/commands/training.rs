//! The flags that say what is trained, and how: those of `train` that `job submit` has too.

use clap::{ArgAction, Args};
use incipit_data::metrics::Metric;
use incipit_tune::placement::{PromptLayers, PromptPlacement};
use incipit_tune::rank::Predict;
use incipit_tune::recipe::{LossReduction, OptimizerName, Recipe};
use incipit_tune::schedule::Schedule;
use incipit_tune::spec::{Method, PartialSpec, PrefixPart};

use crate::args::{FormatArgs, choice, names};

/// What is trained, and how.
#[derive(Args)]
pub(crate) struct TrainingArgs {
    #[command(flatten)]
    format: FormatArgs,
    #[command(flatten)]
    prompt: PromptArgs,
    #[command(flatten)]
    method: MethodArgs,
    #[command(flatten)]
    optimization: OptimizationArgs,
    /// Whether Adafactor's learning rate is relative to the size of what is trained [default: by method, prompt: false]
    #[arg(long, value_name = "true|false", help_heading = "Optimization", action = ArgAction::Set)]
    parameter_scaling: Option<bool>,
    #[command(flatten)]
    measures: MeasureArgs,
    #[command(flatten)]
    checks: CheckArgs,
}

#[derive(Args)]
#[command(next_help_heading = "Prompt")]
struct PromptArgs {
    /// Set of defaults: as the paper prints it, or as its released code runs [default: paper]
    #[arg(long, value_parser = choice::<Recipe>(names::RECIPES))]
    recipe: Option<Recipe>,
    /// Rows of the prompt [default: 100]
    #[arg(long, value_name = "P")]
    prompt_length: Option<usize>,
    /// Where the prompt starts (see below) [default: class-label]
    #[arg(long, value_name = "KIND")]
    prompt_init: Option<String>,
    /// Where the prompt's rows stand: before the input, after it (before the token that ends it), or before the decoder's start
    /// token; PEFT knows only the first [default: before]
    #[arg(long, value_name = "PLACE", value_parser = choice::<PromptPlacement>(names::PLACEMENTS))]
    prompt_placement: Option<PromptPlacement>,
    /// Encoder layers at which the prompt has rows: the first, or all, each --prompt-length of its own, which PEFT does
    /// not know [default: first]
    #[arg(long, value_name = "LAYERS", value_parser = choice::<PromptLayers>(names::PROMPT_LAYERS))]
    prompt_layers: Option<PromptLayers>,
}

#[derive(Args)]
#[command(next_help_heading = "Evaluation and checkpoints")]
struct MeasureArgs {
    /// What is measured; the mean of several chooses the best [default: accuracy]
    #[arg(long, value_name = "NAME,...", value_delimiter = ',', value_parser = choice::<Metric>(names::METRICS))]
    metrics: Option<Vec<Metric>>,
    /// How evaluations predict: decode, what the model writes, or rank, the likeliest of the labels [default: decode]
    #[arg(long, value_parser = choice::<Predict>(names::PREDICTS))]
    predict: Option<Predict>,
}

/// What is trained in the place of a prompt, and how.
#[derive(Args)]
#[command(next_help_heading = "Prompt")]
struct MethodArgs {
    /// What is trained: a prompt, or what it is compared with (see below) [default: prompt]
    #[arg(long, value_parser = choice::<Method>(names::METHODS))]
    method: Option<Method>,
    /// Which attentions have a prefix of --method prefix: all, or the decoder's to itself, as PEFT's prefix tuning has it
    /// [default: all]
    #[arg(long, value_name = "PART", value_parser = choice::<PrefixPart>(names::PREFIX_PARTS))]
    prefix_part: Option<PrefixPart>,
    /// Train the prefix of --method prefix through an MLP with so many inner columns (Li and Liang 2021, section 4.3);
    /// only what it makes is kept [default: none]
    #[arg(long, value_name = "N")]
    prefix_projection: Option<usize>,
    /// Inner columns of --method adapter [default: 64]
    #[arg(long, value_name = "N")]
    adapter_width: Option<usize>,
    /// Examples that --method text shows before the input, the labels taking turns [default: 4]
    #[arg(long, value_name = "N")]
    shots: Option<usize>,
    /// Template of an example that --method text shows [default: "{inputs} {targets}"]
    #[arg(long, value_name = "TEMPLATE")]
    shot_template: Option<String>,
    /// What --method text writes behind each example [default: ";"]
    #[arg(long, value_name = "TEXT")]
    shot_separator: Option<String>,
    /// What --method text writes before the examples
    #[arg(long, value_name = "TEXT")]
    instruction: Option<String>,
    /// Most tokens that --method text shows; examples that do not fit are left out [default: as --max-input-length]
    #[arg(long, value_name = "N")]
    max_prompt_tokens: Option<usize>,
    /// Tokens that --method search tries at each step [default: 32]
    #[arg(long, value_name = "N")]
    candidates: Option<usize>,
}

#[derive(Args)]
#[command(next_help_heading = "Optimization")]
pub(crate) struct OptimizationArgs {
    /// What turns gradients into updates [default: by method, prompt: adafactor]
    #[arg(long, value_parser = choice::<OptimizerName>(names::OPTIMIZERS))]
    optimizer: Option<OptimizerName>,
    /// Learning rate [default: by method, prompt: 0.3]
    #[arg(long, value_name = "RATE")]
    lr: Option<f64>,
    /// How the learning rate changes [default: constant]
    #[arg(long, value_parser = choice::<Schedule>(names::SCHEDULES))]
    schedule: Option<Schedule>,
    /// Steps over which the learning rate rises from 0 [default: 0]
    #[arg(long, value_name = "N")]
    warmup_steps: Option<u64>,
    /// Weight decay of Adafactor, AdamW and SGD [default: by method, prompt: 1e-5]
    #[arg(long, value_name = "RATE")]
    weight_decay: Option<f64>,
    /// Examples a step [default: 32]
    #[arg(long, value_name = "N")]
    batch_size: Option<usize>,
    /// Steps [default: 30000]
    #[arg(long, value_name = "N")]
    steps: Option<u64>,
    /// Dropout inside the model [default: by method and recipe, prompt and paper: 0]
    #[arg(long, value_name = "RATE")]
    dropout: Option<f64>,
    /// Weight of the z-loss [default: by recipe, paper: 0]
    #[arg(long, value_name = "WEIGHT")]
    z_loss: Option<f64>,
    /// How the target tokens' losses become one [default: by recipe, paper: mean]
    #[arg(long, value_parser = choice::<LossReduction>(names::LOSSES))]
    loss: Option<LossReduction>,
    /// Whether each epoch has a random order of its own [default: true]
    #[arg(long, value_name = "true|false", action = ArgAction::Set)]
    shuffle: Option<bool>,
    /// Seed of what is random at the start, the data's order and dropout [default: 0]
    #[arg(long, value_name = "N")]
    seed: Option<u64>,
}

#[derive(Args)]
#[command(next_help_heading = "Evaluation and checkpoints")]
pub(crate) struct CheckArgs {
    /// Steps from one evaluation to the next [default: 500]
    #[arg(long, value_name = "N")]
    eval_every: Option<u64>,
    /// Evaluations without a better one after which the run ends [default: none, all steps are done]
    #[arg(long, value_name = "N")]
    patience: Option<u32>,
    /// Steps from one checkpoint to the next [default: 500]
    #[arg(long, value_name = "N")]
    checkpoint_every: Option<u64>,
    /// Newest checkpoints to keep, beside the best [default: 3]
    #[arg(long, value_name = "N")]
    keep: Option<usize>,
}

impl TrainingArgs {
    /// What the flags say. Absent ones leave the word to a file.
    pub(crate) fn into_spec(self) -> PartialSpec {
        let Self { format, prompt, method, optimization, parameter_scaling, measures, checks } = self;
        PartialSpec {
            inputs: format.inputs,
            targets: format.targets,
            labels: format.labels,
            prompt_length: prompt.prompt_length,
            prompt_init: prompt.prompt_init,
            prompt_placement: prompt.prompt_placement,
            prompt_layers: prompt.prompt_layers,
            recipe: prompt.recipe,
            max_input_length: format.max_input_length,
            max_target_length: format.max_target_length,
            metrics: measures.metrics,
            predict: measures.predict,
            parameter_scaling,
            target_sentinel: format.target_sentinel.then_some(true),
            skip_bad_records: format.skip_bad_records.then_some(true),
            ..method.spec().over(optimization.spec()).over(checks.spec())
        }
    }
}

impl MethodArgs {
    fn spec(self) -> PartialSpec {
        PartialSpec {
            method: self.method,
            prefix_part: self.prefix_part,
            prefix_projection: self.prefix_projection,
            adapter_width: self.adapter_width,
            shots: self.shots,
            shot_template: self.shot_template,
            shot_separator: self.shot_separator,
            instruction: self.instruction,
            max_prompt_tokens: self.max_prompt_tokens,
            candidates: self.candidates,
            ..PartialSpec::default()
        }
    }
}

impl OptimizationArgs {
    /// What the flags say of a run.
    pub(crate) fn spec(&self) -> PartialSpec {
        PartialSpec {
            optimizer: self.optimizer,
            lr: self.lr,
            schedule: self.schedule,
            warmup_steps: self.warmup_steps,
            weight_decay: self.weight_decay,
            batch_size: self.batch_size,
            steps: self.steps,
            dropout: self.dropout,
            z_loss: self.z_loss,
            loss: self.loss,
            shuffle: self.shuffle,
            seed: self.seed,
            ..PartialSpec::default()
        }
    }
}

impl CheckArgs {
    /// What the flags say of a run.
    pub(crate) fn spec(&self) -> PartialSpec {
        PartialSpec {
            eval_every: self.eval_every,
            checkpoint_every: self.checkpoint_every,
            keep: self.keep,
            patience: self.patience,
            ..PartialSpec::default()
        }
    }
}
