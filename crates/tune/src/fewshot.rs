//! Prompt design: examples with their answers before the input, and nothing is trained (Brown et al. 2020, "Language models are
//! few-shot learners").

use incipit_data::{Record, Template, TextExample};
use incipit_kernels::rng::Philox;
use tokenizers::Tokenizer;

use crate::{
    Error, Result,
    tokens::{TokenPrompt, pieces},
};

/// How a demonstration is written, unless something else is asked for.
pub const TEMPLATE: &str = "{inputs} {targets}";
/// What follows each demonstration, unless something else is asked for. Line breaks will not do: to T5's tokenizer they are white
/// space, as what is between words.
pub const SEPARATOR: &str = ";";

/// Distinguishes these random numbers from the job's others.
const STREAM: u64 = u64::from_be_bytes(*b"few shot");

/// How a prompt of demonstrations is written.
#[derive(Clone, Debug, PartialEq)]
pub struct FewShotOptions {
    /// Demonstrations; none if the instruction is to be alone.
    pub shots: usize,
    /// Decides which examples are shown, and their order.
    pub seed: u64,
    /// A demonstration, from the fields `inputs` and `targets`.
    pub template: Template,
    /// Behind each demonstration; may be empty.
    pub separator: String,
    /// Before the first demonstration; may be empty.
    pub instruction: String,
    /// Most tokens of the prompt.
    pub max_tokens: usize,
}

/// A prompt of demonstrations.
#[derive(Clone, Debug, PartialEq)]
pub struct FewShot {
    /// Its tokens, without `</s>`.
    pub prompt: TokenPrompt,
    /// Which examples are shown, in their order.
    pub shown: Vec<usize>,
    /// What a person should know about it: demonstrations that were left out.
    pub warnings: Vec<String>,
}

/// The prompt that shows some of `examples`: a function of its arguments alone. Where there are labels, they take turns, in an order by
/// the seed: as long as each has examples, none has two demonstrations more than another. As many are shown as fit: the first that
/// would exceed the limit is left out with all behind it, and there is a warning.
///
/// # Errors
/// If there are fewer examples than demonstrations, a text cannot be written or tokenized, the separator is lost on the tokenizer,
/// not even one demonstration fits, or there is neither a demonstration nor an instruction.
pub fn few_shot(
    examples: &[TextExample],
    labels: Option<&[String]>,
    options: &FewShotOptions,
    tokenizer: &Tokenizer,
    vocab_size: usize,
) -> Result<FewShot> {
    let mut shown = chosen(examples, labels, options)?;
    let separator = separator(&options.separator, tokenizer)?;
    let mut ids = pieces(tokenizer, &options.instruction)?;
    let instruction = ids.len();
    let mut fitting = 0;
    for place in &shown {
        let demonstration = pieces(tokenizer, &written(&examples[*place], &options.template)?)?;
        if ids.len() + demonstration.len() + separator.len() > options.max_tokens {
            break;
        }
        ids.extend(demonstration.iter().chain(&separator));
        fitting += 1;
    }
    if ids.is_empty() && shown.is_empty() {
        let what = "is 0 and there is no instruction, so that the prompt would be empty; give either";
        return Err(Error::spec("shots", &what));
    }
    if instruction > options.max_tokens || fitting == 0 && !shown.is_empty() {
        let part =
            if instruction > options.max_tokens { "the instruction" } else { "the first demonstration" };
        let what = format!("is {}, and {part} does not fit; pass more", options.max_tokens);
        return Err(Error::spec("max-prompt-tokens", &what));
    }
    let mut warnings = Vec::new();
    if fitting < shown.len() {
        warnings.push(format!(
            "only {fitting} of {} demonstrations fit into {} tokens; pass a larger --max-prompt-tokens for more",
            shown.len(),
            options.max_tokens
        ));
        shown.truncate(fitting);
    }
    Ok(FewShot { prompt: TokenPrompt::new(ids, vocab_size)?, shown, warnings })
}

/// The examples to show, in their order.
fn chosen(
    examples: &[TextExample],
    labels: Option<&[String]>,
    options: &FewShotOptions,
) -> Result<Vec<usize>> {
    let places = |has: &dyn Fn(&TextExample) -> bool| -> Vec<usize> {
        (0..examples.len()).filter(|place| has(&examples[*place])).collect()
    };
    let classes: Vec<Vec<usize>> = match labels {
        Some(labels) => labels.iter().map(|label| places(&|example| example.targets == *label)).collect(),
        None => vec![places(&|_| true)],
    };
    let shuffled = |class: usize| -> Vec<usize> {
        let order = Philox::new(options.seed, &[STREAM, class as u64]).permutation(classes[class].len());
        order.into_iter().map(|i| classes[class][i as usize]).collect()
    };
    let turns = Philox::new(options.seed, &[STREAM]).permutation(classes.len());
    let classes: Vec<Vec<usize>> = turns.into_iter().map(|class| shuffled(class as usize)).collect();
    let rounds = classes.iter().map(Vec::len).max().unwrap_or_default();
    let in_turn = (0..rounds).flat_map(|round| classes.iter().filter_map(move |class| class.get(round)));
    let chosen: Vec<usize> = in_turn.copied().take(options.shots).collect();
    if chosen.len() < options.shots {
        let have = chosen.len();
        let what =
            format!("is {}, and there are {have} training examples; pass at most {have}", options.shots);
        return Err(Error::spec("shots", &what));
    }
    Ok(chosen)
}

/// A demonstration as text.
fn written(example: &TextExample, template: &Template) -> Result<String> {
    let fields = [("inputs", &example.inputs), ("targets", &example.targets)];
    let record: Record =
        fields.into_iter().map(|(name, text)| (name.to_owned(), text.clone().into())).collect();
    template.render(&record).map_err(|problem| Error::spec("shot-template", &problem))
}

/// The tokens of a separator, which has some if it has a text.
fn separator(text: &str, tokenizer: &Tokenizer) -> Result<Vec<u32>> {
    let ids = pieces(tokenizer, text)?;
    let unknown = tokenizer.token_to_id("<unk>");
    if (ids.is_empty() && !text.is_empty()) || ids.iter().any(|id| Some(*id) == unknown) {
        let what = format!(
            "is {text:?}, which the model's tokenizer does not keep; give a mark that it knows, as ;"
        );
        return Err(Error::spec("shot-separator", &what));
    }
    Ok(ids)
}

#[cfg(test)]
mod tests {
    use std::path::{Path, PathBuf};

    use incipit_data::{LoadOptions, TaskFormat, labels_of, load_text};

    use super::*;

    fn demo(name: &str) -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../../demo").join(name)
    }

    fn tokenizer() -> Tokenizer {
        incipit_weights::load_tokenizer(&demo("model")).unwrap()
    }

    fn examples() -> Vec<TextExample> {
        let format = TaskFormat::default();
        load_text(&demo("data/train.jsonl"), &format, LoadOptions::default()).unwrap().examples
    }

    fn options(shots: usize, seed: u64) -> FewShotOptions {
        FewShotOptions {
            shots,
            seed,
            template: TEMPLATE.parse().unwrap(),
            separator: SEPARATOR.to_owned(),
            instruction: String::new(),
            max_tokens: 2000,
        }
    }

    fn refusal(examples: &[TextExample], options: &FewShotOptions) -> String {
        few_shot(examples, None, options, &tokenizer(), 1024).unwrap_err().to_string()
    }

    #[test]
    fn labels_take_turns_and_the_seed_alone_decides() {
        let (tokenizer, examples) = (tokenizer(), examples());
        let labels = labels_of(&examples, 10).unwrap();
        let make = |seed| few_shot(&examples, Some(&labels), &options(11, seed), &tokenizer, 1024).unwrap();
        let made = make(1);
        assert!(made.warnings.is_empty() && made.shown.len() == 11, "{:?}", made.warnings);
        let counts: Vec<usize> = labels
            .iter()
            .map(|label| made.shown.iter().filter(|place| examples[**place].targets == *label).count())
            .collect();
        let (most, least) = (counts.iter().max().unwrap(), counts.iter().min().unwrap());
        assert!(labels.len() > 2 && most - least <= 1, "{labels:?}: {counts:?}");
        let mut distinct = made.shown.clone();
        distinct.sort_unstable();
        distinct.dedup();
        assert_eq!(distinct.len(), 11);
        assert_eq!(make(1), made);
        assert_ne!(make(2).shown, made.shown);
    }

    #[test]
    fn the_tokens_with_those_of_an_input_are_those_of_the_whole_text() {
        let (tokenizer, examples) = (tokenizer(), examples());
        let options = FewShotOptions { instruction: "What is it about?".to_owned(), ..options(3, 0) };
        let made = few_shot(&examples, None, &options, &tokenizer, 1024).unwrap();
        let shown = made.shown.iter().map(|place| &examples[*place]);
        let shown: String = shown.map(|shown| format!("{} {} ;\n", shown.inputs, shown.targets)).collect();
        let whole = format!("What is it about? {shown}{}", examples[0].inputs);
        let ids = [made.prompt.ids(), &pieces(&tokenizer, &examples[0].inputs).unwrap()].concat();
        assert_eq!(ids, pieces(&tokenizer, &whole).unwrap());
    }

    #[test]
    fn as_many_demonstrations_are_shown_as_fit() {
        let (tokenizer, examples) = (tokenizer(), examples());
        let whole = few_shot(&examples, None, &options(8, 3), &tokenizer, 1024).unwrap();
        let limit = whole.prompt.ids().len() - 1;
        let tight = FewShotOptions { max_tokens: limit, ..options(8, 3) };
        let made = few_shot(&examples, None, &tight, &tokenizer, 1024).unwrap();
        assert_eq!(made.shown, whole.shown[..7]);
        assert!(whole.prompt.ids().starts_with(made.prompt.ids()));
        assert!(made.warnings[0].contains(&format!("only 7 of 8 demonstrations fit into {limit}")));
    }

    #[test]
    fn an_instruction_can_stand_alone() {
        let tokenizer = tokenizer();
        let options = FewShotOptions { instruction: "a letter about".to_owned(), ..options(0, 0) };
        let made = few_shot(&[], None, &options, &tokenizer, 1024).unwrap();
        assert_eq!(made.prompt.ids(), pieces(&tokenizer, "a letter about").unwrap());
    }

    #[test]
    fn what_cannot_be_a_prompt_is_refused_with_its_flag() {
        let examples = &examples()[..5];
        assert!(refusal(examples, &options(0, 0)).contains("--shots is 0 and there is no instruction"));
        assert!(
            refusal(examples, &options(6, 0)).contains("--shots is 6, and there are 5 training examples")
        );
        let limit = FewShotOptions { max_tokens: 3, ..options(2, 0) };
        assert!(refusal(examples, &limit).contains("--max-prompt-tokens is 3, and the first demonstration"));
        let long = FewShotOptions { instruction: "a letter about a tent".to_owned(), ..limit };
        assert!(refusal(examples, &long).contains("--max-prompt-tokens is 3, and the instruction"));
        let template = FewShotOptions { template: "{sentence}".parse().unwrap(), ..options(2, 0) };
        let error = refusal(examples, &template);
        assert!(error.contains("--shot-template") && error.contains("`inputs`, `targets`"), "{error}");
        for separator in ["\n\n", "\u{2603}"] {
            let lost = FewShotOptions { separator: separator.to_owned(), ..options(2, 0) };
            assert!(refusal(examples, &lost).contains("--shot-separator"), "{separator:?}");
        }
    }
}
