//! Texts as T5 has them for questions about a passage: with a space on each side of every ASCII punctuation mark, and
//! single spaces.

use crate::metrics::Reference;

/// Sets punctuation apart. A text that begins or ends with a mark begins or ends with a space.
pub(super) fn apart(text: &str) -> String {
    let mut spaced = String::with_capacity(text.len() * 5 / 4);
    for c in text.chars() {
        let mark = c.is_ascii_punctuation();
        // The white space of RE2, which T5's pattern is written for, is this one.
        if mark || matches!(c, '\t' | '\n' | '\x0c' | '\r' | ' ') {
            push_space(&mut spaced);
        }
        match c {
            '\t' | '\n' | '\x0c' | '\r' | ' ' => {}
            other => spaced.push(other),
        }
        if mark {
            push_space(&mut spaced);
        }
    }
    spaced
}

fn push_space(text: &mut String) {
    if !text.ends_with(' ') {
        text.push(' ');
    }
}

/// The input that asks a question about a passage; both are set apart here.
pub(super) fn question_about(question: &str, context: &str) -> String {
    let joined = format!("question: {} context: {}", apart(question), apart(context));
    let mut single = String::with_capacity(joined.len());
    for c in joined.chars() {
        match c {
            ' ' => push_space(&mut single),
            other => single.push(other),
        }
    }
    single
}

/// The reference that accepts these answers, each set apart.
pub(super) fn reference<'a>(answers: impl IntoIterator<Item = &'a str>) -> Reference {
    let answers = answers.into_iter().map(apart).collect();
    Reference { answers, group: None, holds: true }
}
