//! `incipit generate`: the model answers.

use std::borrow::Borrow;
use std::collections::BTreeSet;
use std::io::{BufRead, IsTerminal};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, sync_channel};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use clap::Args;
use incipit_collective::{Axis, Ranks, broadcast_bytes, gather_bytes};
use incipit_data::tasks::{ExampleId, Split, TaskSplit, Use};
use incipit_data::{LoadOptions, Record, TextExample, TokenizedExample, load_inputs, tokenize};
use incipit_model::{Example, GenerateOptions, Microbatch, SoftPrompt};
use incipit_tune::job::prompt_rows;
use incipit_tune::prompt::Prompt;
use serde::{Deserialize, Serialize};

use super::backbone::{self, Ready, Settings};
use crate::args::{BackboneArgs, FormatArgs, Global, NamedTaskArgs, split};
use crate::exit::{Exit, bad_input};
use crate::output::Lines;
use crate::progress::note;
use crate::ranks::{self, RankArgs};

/// Lines of a pipe that are answered together.
const LINES_AT_ONCE: usize = 64;

const AFTER_HELP: &str = "\
Texts come from --input, from the records of --data, from a benchmark named with --task, or, where none is given, from the lines of \
standard input. Where --inputs, or the run that made the prompt, has a template with one field, a text takes that field's place, so \
that the model sees what it was trained on; --raw gives it the text alone.

Examples:
  incipit generate --prompt runs/q --input \"how far is the moon\"
  incipit generate --prompt runs/q --data new.csv --json > answers.jsonl
  cat lines.txt | incipit generate --model ./t5 --num-beams 4
  incipit generate --prompt runs/squad --task squad --data-dir SQuAD --json

Answers go to standard output, one a line; with --json one object a line, with input, output and score, and of a benchmark its id.";

/// Flags of `generate`.
#[derive(Args)]
#[command(after_help = AFTER_HELP)]
pub(crate) struct GenerateArgs {
    #[command(flatten)]
    backbone: BackboneArgs,
    /// Text to answer; may be repeated
    #[arg(long, value_name = "TEXT", conflicts_with = "data", help_heading = "Texts")]
    input: Vec<String>,
    /// File of records to answer, by the template of the inputs
    #[arg(long, value_name = "FILE", help_heading = "Texts")]
    data: Option<PathBuf>,
    #[command(flatten)]
    named: NamedTaskArgs,
    /// Part of the benchmark's data [default: dev]
    #[arg(long, help_heading = "Data", requires = "task", value_parser = split())]
    split: Option<Split>,
    /// Template of the input text; for texts that are no records it has one field, whose place each takes [default: that
    /// of the run that made the prompt, else for --data the field `inputs`, and texts are taken as they are]
    #[arg(long, value_name = "TEMPLATE", help_heading = "Texts")]
    inputs: Option<String>,
    /// Give the model the texts as they are
    #[arg(long, conflicts_with_all = ["data", "inputs"], help_heading = "Texts")]
    raw: bool,
    /// Longest input in tokens; what is longer is cut [default: 512]
    #[arg(long, value_name = "N", help_heading = "Texts")]
    max_input_length: Option<usize>,
    /// Longest answer in tokens [default: the longest target of the run that made the prompt, else 32]
    #[arg(long, value_name = "N", help_heading = "Decoding")]
    max_new_tokens: Option<usize>,
    /// Beams, up to 256; 1 is greedy decoding
    #[arg(long, value_name = "N", default_value_t = 1, help_heading = "Decoding")]
    num_beams: usize,
    /// Exponent of the length by which a beam's score is divided
    #[arg(long, value_name = "X", default_value_t = 1.0, help_heading = "Decoding")]
    length_penalty: f32,
    /// Draw from the most likely tokens that together have this share of the probability
    #[arg(long, value_name = "SHARE", conflicts_with = "num_beams", help_heading = "Decoding")]
    top_p: Option<f32>,
    /// Draw with probabilities sharpened (below 1) or flattened (above 1)
    #[arg(long, value_name = "X", conflicts_with = "num_beams", help_heading = "Decoding")]
    temperature: Option<f32>,
    /// Seed of the draws
    #[arg(long, value_name = "N", default_value_t = 0, help_heading = "Decoding")]
    seed: u64,
    #[command(flatten)]
    pub(crate) ranks: RankArgs,
}

impl GenerateArgs {
    pub(crate) fn reads_standard_input(&self) -> bool {
        self.data.is_none() && self.input.is_empty() && self.named.task.is_none()
    }
}

#[derive(Serialize)]
struct Answer<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    id: Option<&'a ExampleId>,
    index: usize,
    input: &'a str,
    output: &'a str,
    /// Of a beam or a draw: its log-probability, by length as asked.
    score: f32,
}

/// Answers all texts, in their order.
///
/// # Errors
/// If something given cannot be used, or standard output cannot be written.
pub(crate) fn run(args: &GenerateArgs, global: &Global) -> Result<Exit> {
    check(args)?;
    ranks::run(&args.ranks, args.backbone.model.device.unwrap_or_default(), global.threads, |ranks| {
        on_rank(args, ranks, global)
    })?;
    Ok(Exit::Ok)
}

fn on_rank(args: &GenerateArgs, ranks: &Arc<Ranks>, global: &Global) -> Result<()> {
    // Before the weights, which may take minutes.
    let named = named(args, ranks.leads())?;
    let format = FormatArgs {
        inputs: args.inputs.clone(),
        targets: None,
        labels: None,
        max_input_length: args.max_input_length,
        max_target_length: None,
        target_sentinel: false,
        skip_bad_records: false,
    };
    let prompts = backbone::read(args.backbone.prompt.as_slice())?;
    let chosen = backbone::choose(&args.backbone.model, prompts, &format, ranks)?;
    let texts = texts(args, &chosen.settings, named.as_ref())?;
    let ready = chosen.load(global)?;
    let mut writer = Writer {
        ready: &ready,
        options: options(args, &ready.settings),
        lines: Lines::stdout(ready.ranks().leads()),
        json: global.json,
        ids: named.iter().flat_map(|found| &found.examples).map(|example| example.id.clone()).collect(),
        next: 0,
    };
    match texts {
        Some(texts) => writer.answer(&texts),
        None => answer_stdin(args, &mut writer),
    }
}

/// What is to be answered, unless it comes from standard input.
fn texts(
    args: &GenerateArgs,
    settings: &Settings,
    named: Option<&TaskSplit>,
) -> Result<Option<Vec<TextExample>>> {
    if let Some(found) = named {
        return Ok(Some(found.texts()));
    }
    if let Some(path) = &args.data {
        return Ok(Some(load_inputs(path, &settings.format.inputs, LoadOptions::default())?.examples));
    }
    field(args, settings)?;
    if args.input.is_empty() {
        return Ok(None);
    }
    args.input.iter().map(|text| example(args, settings, text)).collect::<Result<_>>().map(Some)
}

/// The benchmark's split that the flags name.
fn named(args: &GenerateArgs, leads: bool) -> Result<Option<TaskSplit>> {
    let others = [
        ("--input", !args.input.is_empty()),
        ("--data", args.data.is_some()),
        ("--inputs", args.inputs.is_some()),
        ("--raw", args.raw),
    ];
    let Some((task, dir)) = args.named.resolve(&others)? else {
        return Ok(None);
    };
    let split = args.split.unwrap_or(Split::Dev);
    let found = task.read(dir, split, Use::Evaluation, LoadOptions::default())?;
    if let Some(said) = found.left_out().filter(|_| leads) {
        note(&said);
    }
    Ok(Some(found))
}

/// More would need more memory than they could be worth.
const MOST_BEAMS: usize = 256;

fn check(args: &GenerateArgs) -> Result<()> {
    match args {
        GenerateArgs { num_beams: 0, .. } => {
            bad_input("--num-beams is 0: give 1 for greedy decoding, or more")
        }
        // Each beam has keys and values of its own.
        GenerateArgs { num_beams, .. } if *num_beams > MOST_BEAMS => {
            bad_input(format!("--num-beams is {num_beams}: give at most {MOST_BEAMS}"))
        }
        GenerateArgs { max_new_tokens: Some(0), .. } => {
            bad_input("--max-new-tokens is 0: nothing could be written")
        }
        GenerateArgs { top_p: Some(p), .. } if !(*p > 0.0 && *p <= 1.0) => {
            bad_input(format!("--top-p is {p}: give a share above 0 and up to 1"))
        }
        GenerateArgs { temperature: Some(t), .. } if !(*t > 0.0 && t.is_finite()) => {
            bad_input(format!("--temperature is {t}: give a number above 0"))
        }
        _ => Ok(()),
    }
}

fn options(args: &GenerateArgs, settings: &Settings) -> GenerateOptions {
    let of_run = if settings.run.is_some() { settings.max_target_length } else { 32 };
    GenerateOptions {
        max_new_tokens: args.max_new_tokens.unwrap_or(of_run),
        num_beams: args.num_beams,
        length_penalty: args.length_penalty,
        // A temperature alone draws from all tokens.
        top_p: args.top_p.or(args.temperature.map(|_| 1.0)),
        temperature: args.temperature.unwrap_or(1.0),
        seed: args.seed,
    }
}

/// The template's one field, whose place a text takes; none where texts are taken as they are.
///
/// # Errors
/// If a template is given that has not one field.
fn field<'s>(args: &GenerateArgs, settings: &'s Settings) -> Result<Option<&'s str>> {
    let fields: BTreeSet<&str> = settings.format.inputs.fields().collect();
    match (&args.inputs, fields.first()) {
        _ if args.raw => Ok(None),
        (Some(_), Some(field)) if fields.len() == 1 => Ok(Some(field)),
        (Some(given), _) => bad_input(format!(
            "--inputs {given:?} has {} fields, and a text takes the place of one: give a template with one, or records with --data",
            fields.len()
        )),
        (None, Some(field)) if fields.len() == 1 && settings.run.is_some() => Ok(Some(field)),
        (None, _) => Ok(None),
    }
}

/// A text in the place of the template's one field, or as it is.
fn example(args: &GenerateArgs, settings: &Settings, text: &str) -> Result<TextExample> {
    let inputs = match field(args, settings)? {
        Some(field) => {
            let record = Record::from_iter([(field.to_owned(), text.into())]);
            settings.format.inputs.render(&record)?
        }
        None => text.to_owned(),
    };
    Ok(TextExample { inputs, targets: String::new(), index: 0, line: 1 })
}

/// Lines of standard input, as rank 0 reads them for all.
#[derive(Default, Serialize, Deserialize)]
struct Read {
    lines: Vec<String>,
    /// Whether there may be more.
    more: bool,
}

fn answer_stdin(args: &GenerateArgs, writer: &mut Writer<'_>) -> Result<()> {
    let ranks = writer.ready.ranks();
    let stdin = ranks.leads().then(read_stdin);
    let at_once = if std::io::stdin().is_terminal() { 1 } else { LINES_AT_ONCE };
    // Other ranks must not think that rank 0 is lost while it waits for somebody to write.
    let patience = Duration::from_secs(args.ranks.deadline) / 2;
    loop {
        let own = stdin.as_ref().map(|lines| next_lines(lines, at_once, patience)).transpose()?;
        let told = broadcast_bytes(&**ranks.world(), &serde_json::to_vec(&own.unwrap_or_default())?, 0)?;
        let Read { lines, more } = serde_json::from_slice(&told)?;
        let texts: Result<Vec<_>> =
            lines.iter().map(|line| example(args, &writer.ready.settings, line)).collect();
        writer.answer(&texts?)?;
        if !more {
            return Ok(());
        }
    }
}

/// The lines of standard input, as they come.
fn read_stdin() -> Receiver<std::io::Result<String>> {
    if std::io::stdin().is_terminal() {
        note("type a text and press Enter; Ctrl-D ends");
    }
    let (sender, receiver) = sync_channel(LINES_AT_ONCE);
    std::thread::spawn(move || {
        // Nobody takes them any more once the answers have failed.
        std::io::stdin().lock().lines().try_for_each(|line| sender.send(line))
    });
    receiver
}

/// The next lines: so many, or fewer at the end or when nobody writes more for so long.
fn next_lines(from: &Receiver<std::io::Result<String>>, count: usize, patience: Duration) -> Result<Read> {
    let mut lines = Vec::new();
    let until = Instant::now() + patience;
    while lines.len() < count {
        match from.recv_timeout(until.saturating_duration_since(Instant::now())) {
            Ok(line) => lines.push(line.context("cannot read standard input")?),
            Err(RecvTimeoutError::Timeout) => break,
            Err(RecvTimeoutError::Disconnected) => return Ok(Read { lines, more: false }),
        }
    }
    Ok(Read { lines, more: true })
}

/// What the model wrote, and for which example of a round.
#[derive(Serialize, Deserialize)]
struct Generated {
    place: usize,
    text: String,
    /// As bits: JSON has no infinities.
    score: u32,
}

/// Answers texts and writes the answers.
struct Writer<'a> {
    ready: &'a Ready,
    options: GenerateOptions,
    lines: Lines,
    json: bool,
    /// Of a benchmark's examples.
    ids: Vec<ExampleId>,
    next: usize,
}

impl Writer<'_> {
    fn answer(&mut self, texts: &[TextExample]) -> Result<()> {
        if texts.is_empty() {
            return Ok(());
        }
        let Ready { backbone, settings, .. } = self.ready;
        let Settings { max_input_length, max_target_length, .. } = settings;
        let set = tokenize(
            texts,
            &backbone.tokenizer,
            *max_input_length,
            *max_target_length,
            backbone.config().vocab_size,
        )?;
        let ranks = self.ready.ranks();
        if set.truncated_inputs > 0 && ranks.leads() {
            note(&format!(
                "{} texts are longer than {max_input_length} tokens and are cut",
                set.truncated_inputs
            ));
        }
        let mut rest = &set.examples[..];
        let mut texts = texts.iter();
        while !rest.is_empty() {
            let (round, later) = rest.split_at(self.fitting(rest, ranks.mesh().dp()));
            rest = later;
            for (answer, text) in self.round(round)?.into_iter().zip(texts.by_ref()) {
                self.write(&text.inputs, &answer.text, f32::from_bits(answer.score))?;
            }
        }
        Ok(())
    }

    /// How many of the examples go through so many replicas of the backbone together: at least one.
    fn fitting(&self, examples: &[impl Borrow<TokenizedExample>], replicas: usize) -> usize {
        let rows = self.ready.prompts.first().map_or(0, Prompt::length);
        let answer = self.options.max_new_tokens * self.options.num_beams;
        let mut left = self.ready.backbone.engine.microbatch_tokens() * replicas;
        let fits = examples.iter().take_while(|e| {
            let cost = rows + (*e).borrow().input.len() + answer;
            let fits = cost <= left;
            left = left.saturating_sub(cost);
            fits
        });
        fits.count().max(1)
    }

    /// Answers examples that the replicas share between them.
    fn round(&self, examples: &[TokenizedExample]) -> Result<Vec<Generated>> {
        let ranks = self.ready.ranks();
        let share = ranks.shard(Axis::Data);
        let mine: Vec<usize> = (0..examples.len()).filter(|place| share.deals(*place)).collect();
        let mut answers = Vec::with_capacity(mine.len());
        let mut rest = &mine[..];
        while !rest.is_empty() {
            let waiting: Vec<&TokenizedExample> = rest.iter().map(|place| &examples[*place]).collect();
            let (batch, later) = rest.split_at(self.fitting(&waiting, 1));
            answers.extend(self.generate(examples, batch)?);
            rest = later;
        }
        let mut all: Vec<Generated> = Vec::with_capacity(examples.len());
        for part in gather_bytes(&**ranks.data(), &serde_json::to_vec(&answers)?)? {
            all.extend(serde_json::from_slice::<Vec<Generated>>(&part)?);
        }
        all.sort_by_key(|answer| answer.place);
        Ok(all)
    }

    /// Answers those of the examples that stand at `places`.
    fn generate(&self, examples: &[TokenizedExample], places: &[usize]) -> Result<Vec<Generated>> {
        let prompts: Vec<SoftPrompt> =
            self.ready.prompts.iter().map(prompt_rows).collect::<incipit_tune::Result<_>>()?;
        let prompt = (!prompts.is_empty()).then_some(0);
        let example = |place: &usize| Example {
            prompt,
            input: &examples[*place].input,
            target: &[],
            key: (self.next + place) as u64,
        };
        let batch: Vec<Example<'_>> = places.iter().map(example).collect();
        let backbone = &self.ready.backbone;
        let answers = backbone
            .engine
            .model()
            .generate(&Microbatch { prompts: &prompts, examples: &batch }, &self.options)?;
        let text = |tokens: &[u32]| {
            backbone
                .tokenizer
                .decode(tokens, true)
                .map_err(|error| anyhow::anyhow!("an answer cannot be decoded: {error}"))
        };
        let answers = places.iter().zip(answers);
        answers
            .map(|(place, a)| {
                Ok(Generated { place: *place, text: text(&a.tokens)?, score: a.score.to_bits() })
            })
            .collect()
    }

    fn write(&mut self, input: &str, output: &str, score: f32) -> Result<()> {
        let index = self.next;
        self.next += 1;
        if self.json {
            let id = self.ids.get(index);
            self.lines.json(&Answer { id, index, input, output, score })
        } else {
            self.lines.text(output)
        }
    }
}
