//! `incipit generate`: the model answers.

use std::io::{BufRead, IsTerminal};
use std::path::PathBuf;

use anyhow::{Context, Result};
use candle_core::{Device, Tensor};
use clap::Args;
use incipit_data::{LoadOptions, Record, TextExample, TokenizedExample, load_inputs, tokenize};
use incipit_model::{Example, GenerateOptions, Microbatch};
use incipit_tune::prompt::Prompt;
use serde::Serialize;

use super::backbone::{self, Ready};
use crate::args::{BackboneArgs, FormatArgs, Global};
use crate::exit::{Exit, bad_input};
use crate::output::Lines;
use crate::progress::note;

/// Lines of a pipe that are answered together.
const LINES_AT_ONCE: usize = 64;

const AFTER_HELP: &str = "\
Texts come from --input, from the records of --data, or, where neither is given, from the lines of standard input. Where the run \
that made the prompt used a template with one field, a text takes that field's place, so that the model sees what it was trained \
on; --raw gives it the text alone.

Examples:
  incipit generate --prompt runs/q --input \"how far is the moon\"
  incipit generate --prompt runs/q --data new.csv --json > answers.jsonl
  cat lines.txt | incipit generate --model ./t5 --num-beams 4

Answers go to standard output, one a line; with --json one object a line, with input, output and score.";

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
    /// Template of the input text for --data [default: that of the run that made the prompt, else the field `inputs`]
    #[arg(long, value_name = "TEMPLATE", help_heading = "Texts")]
    inputs: Option<String>,
    /// Give the model the texts as they are
    #[arg(long, conflicts_with = "data", help_heading = "Texts")]
    raw: bool,
    /// Longest input in tokens; what is longer is cut [default: 512]
    #[arg(long, value_name = "N", help_heading = "Texts")]
    max_input_length: Option<usize>,
    /// Longest answer in tokens [default: the longest target of the run that made the prompt, else 32]
    #[arg(long, value_name = "N", help_heading = "Decoding")]
    max_new_tokens: Option<usize>,
    /// Beams; 1 is greedy decoding
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
}

#[derive(Serialize)]
struct Answer<'a> {
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
    let format = FormatArgs {
        inputs: args.inputs.clone(),
        targets: None,
        labels: None,
        max_input_length: args.max_input_length,
        max_target_length: None,
        skip_bad_records: false,
    };
    let ready = backbone::load(&args.backbone, &format)?;
    let mut writer = Writer {
        ready: &ready,
        options: options(args, &ready),
        lines: Lines::stdout(),
        json: global.json,
        next: 0,
    };
    if let Some(path) = &args.data {
        writer.answer(&load_inputs(path, &ready.format.inputs, LoadOptions::default())?.examples)?;
    } else if args.input.is_empty() {
        answer_stdin(args, &mut writer)?;
    } else {
        let texts: Result<Vec<_>> = args.input.iter().map(|text| example(args, &ready, text)).collect();
        writer.answer(&texts?)?;
    }
    Ok(Exit::Ok)
}

fn check(args: &GenerateArgs) -> Result<()> {
    match args {
        GenerateArgs { num_beams: 0, .. } => {
            bad_input("--num-beams is 0: give 1 for greedy decoding, or more")
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

fn options(args: &GenerateArgs, ready: &Ready) -> GenerateOptions {
    let of_run = if ready.from_run { ready.max_target_length } else { 32 };
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

/// A text in the place of the template's one field, or as it is.
fn example(args: &GenerateArgs, ready: &Ready, text: &str) -> Result<TextExample> {
    let fields: Vec<&str> = ready.format.inputs.fields().collect();
    let inputs = match fields.as_slice() {
        [field] if ready.from_run && !args.raw => {
            let record = Record::from_iter([((*field).to_owned(), text.into())]);
            ready.format.inputs.render(&record)?
        }
        _ => text.to_owned(),
    };
    Ok(TextExample { inputs, targets: String::new(), index: 0, line: 1 })
}

/// `[P, D]`.
fn rows(prompt: &Prompt) -> candle_core::Result<Tensor> {
    Tensor::from_slice(prompt.values(), (prompt.length(), prompt.width()), &Device::Cpu)
}

fn answer_stdin(args: &GenerateArgs, writer: &mut Writer<'_>) -> Result<()> {
    let stdin = std::io::stdin();
    let at_once = if stdin.is_terminal() { 1 } else { LINES_AT_ONCE };
    if stdin.is_terminal() {
        note("type a text and press Enter; Ctrl-D ends");
    }
    let mut waiting = Vec::new();
    for line in stdin.lock().lines() {
        waiting.push(example(args, writer.ready, &line.context("cannot read standard input")?)?);
        if waiting.len() == at_once {
            writer.answer(&std::mem::take(&mut waiting))?;
        }
    }
    writer.answer(&waiting)
}

/// Answers texts and writes the answers.
struct Writer<'a> {
    ready: &'a Ready,
    options: GenerateOptions,
    lines: Lines,
    json: bool,
    next: usize,
}

impl Writer<'_> {
    fn answer(&mut self, texts: &[TextExample]) -> Result<()> {
        if texts.is_empty() {
            return Ok(());
        }
        let Ready { backbone, max_input_length, max_target_length, .. } = self.ready;
        let set = tokenize(
            texts,
            &backbone.tokenizer,
            *max_input_length,
            *max_target_length,
            backbone.config().vocab_size,
        )?;
        if set.truncated_inputs > 0 {
            note(&format!(
                "{} texts are longer than {max_input_length} tokens and are cut",
                set.truncated_inputs
            ));
        }
        let mut rest = &set.examples[..];
        let mut texts = texts.iter();
        while !rest.is_empty() {
            let (batch, later) = rest.split_at(self.fitting(rest));
            rest = later;
            for (answer, text) in self.generate(batch)?.into_iter().zip(texts.by_ref()) {
                self.write(&text.inputs, &answer.0, answer.1)?;
            }
        }
        Ok(())
    }

    /// How many of the examples go through the backbone together: at least one.
    fn fitting(&self, examples: &[TokenizedExample]) -> usize {
        let rows = self.ready.prompt.as_ref().map_or(0, Prompt::length);
        let answer = self.options.max_new_tokens * self.options.num_beams;
        let mut left = self.ready.backbone.engine.microbatch_tokens();
        let fits = examples.iter().take_while(|e| {
            let cost = rows + e.input.len() + answer;
            let fits = cost <= left;
            left = left.saturating_sub(cost);
            fits
        });
        fits.count().max(1)
    }

    fn generate(&self, examples: &[TokenizedExample]) -> Result<Vec<(String, f32)>> {
        let prompts: Vec<Tensor> = self.ready.prompt.iter().map(rows).collect::<candle_core::Result<_>>()?;
        let prompt = (!prompts.is_empty()).then_some(0);
        let one = |(i, e): (usize, &'_ TokenizedExample)| (prompt, e.input.clone(), (self.next + i) as u64);
        let owned: Vec<_> = examples.iter().enumerate().map(one).collect();
        let examples: Vec<Example<'_>> = owned
            .iter()
            .map(|(prompt, input, key)| Example { prompt: *prompt, input, target: &[], key: *key })
            .collect();
        let backbone = &self.ready.backbone;
        let answers = backbone
            .engine
            .model()
            .generate(&Microbatch { prompts: &prompts, examples: &examples }, &self.options)?;
        let text = |tokens: &[u32]| {
            backbone
                .tokenizer
                .decode(tokens, true)
                .map_err(|error| anyhow::anyhow!("an answer cannot be decoded: {error}"))
        };
        answers.into_iter().map(|answer| Ok((text(&answer.tokens)?, answer.score))).collect()
    }

    fn write(&mut self, input: &str, output: &str, score: f32) -> Result<()> {
        let index = self.next;
        self.next += 1;
        if self.json {
            self.lines.json(&Answer { index, input, output, score })
        } else {
            self.lines.text(output)
        }
    }
}
