//! The Winograd schemas: whom does a pronoun mean? The pronoun is marked in the text, and the target is the noun.

use super::{Draft, ExampleId, Reading, Use, fields};
use crate::error::Problem;
use crate::metrics::Reference;
use crate::source::Record;

/// Referents whose nouns have other words between them in the text.
const APART: [&str; 2] = ["Kamenev and Zinoviev", "Kamenev, Zinoviev, and Stalin"];

/// The example of a record; none for training if its referent is wrong.
pub(super) fn draft(record: &Record, reading: Reading) -> Result<Option<Draft>, Problem> {
    let task = reading.task;
    let text = fields::text(record, "text", task)?;
    let target = fields::object(record, "target", task)?;
    let span = |words, index| -> Result<(String, usize), Problem> {
        let index = fields::number(target, index, task)? as usize;
        Ok((as_in_text(text, fields::text(target, words, task)?, index)?, index))
    };
    let (referent, _) = span("span1_text", "span1_index")?;
    let (pronoun, index) = span("span2_text", "span2_index")?;
    let inputs = blanked(text, &pronoun, index)?.replace(" X ", &format!(" *{pronoun}* "));
    let label = fields::label(record, &["label"], &["False", "True"], reading)?;
    let id = ExampleId::Number(fields::number(record, "idx", task)?);
    if reading.purpose == Use::Training && label != Some(1) {
        return Ok(None);
    }
    let reference = label.map(|label| Reference { holds: label == 1, ..Reference::of(&referent) });
    let target = label.map(|_| referent.clone());
    Ok(Some(Draft { inputs, target, id, reference, referent: Some(referent) }))
}

/// A span as the text has it: with the case of the word at its index, without a full stop, on one line. This is how
/// TFDS mends the records of `wsc.fixed`.
fn as_in_text(text: &str, span: &str, index: usize) -> Result<String, Problem> {
    if text.contains(span) || APART.contains(&span) {
        return Ok(span.to_owned());
    }
    let refuse =
        || Problem::Inconsistent { what: format!("the text does not have {span:?} at its word {index}") };
    let word = text.split(crate::metrics::is_space).filter(|word| !word.is_empty()).nth(index);
    let first = word.and_then(|word| word.chars().next()).ok_or_else(refuse)?;
    let mut letters = span.chars();
    let own = letters.next().ok_or_else(refuse)?;
    let own =
        if first.is_lowercase() { own.to_lowercase().to_string() } else { own.to_uppercase().to_string() };
    let mended = format!("{own}{}", letters.as_str());
    let mended = mended.trim_end_matches('.').replace('\n', " ");
    if text.contains(&mended) { Ok(mended) } else { Err(refuse()) }
}

/// The text with `X` for the pronoun, which is the word of this index between single spaces.
fn blanked(text: &str, pronoun: &str, index: usize) -> Result<String, Problem> {
    if let Some(blanked) = mended(text) {
        return Ok(blanked);
    }
    let words: Vec<&str> = text.split(' ').collect();
    if index == 0 || words.get(index) != Some(&pronoun) {
        let what = format!("the word {index} of the text is not the pronoun {pronoun:?}");
        return Err(Problem::Inconsistent { what });
    }
    Ok(format!("{} X {}", words[..index].join(" "), words[index + 1..].join(" ")))
}

/// Two of the published texts have an index that is not the pronoun's; T5 has their blanks by heart.
fn mended(text: &str) -> Option<String> {
    if text.starts_with("The boy continued to whip the pony ,") && text.contains("\"Good for him,\" he said.")
    {
        return Some(text.trim_end().replacen("\"Good for him,\"", "\"Good for X ,\"", 1));
    }
    if text.starts_with("When they had eventually calmed down a bit ,") && text.contains(" use it ,") {
        return Some(text.replacen(" use it ,", " use X ,", 1));
    }
    None
}
