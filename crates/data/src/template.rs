//! Texts with fields of a record in them.

use std::fmt;
use std::str::FromStr;

use serde_json::Value;

use crate::error::Problem;
use crate::source::Record;

/// A text with the names of fields in braces: `question: {question} passage: {passage}`.
///
/// `{{` and `}}` stand for one brace. A name is taken as it is, spaces included. A template has at least one
/// field.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Template {
    text: String,
    pieces: Vec<Piece>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Piece {
    Text(String),
    Field(String),
}

/// Why a template was refused. Columns count characters from 1.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TemplateError {
    /// `{` without `}`.
    #[error(
        "template {template:?}, column {column}: `{{` is not closed; close the field with `}}`, \
         or write `{{{{` for a brace"
    )]
    Unclosed {
        /// The template.
        template: String,
        /// Place of the brace.
        column: usize,
    },
    /// `}` without `{`.
    #[error("template {template:?}, column {column}: `}}` closes nothing; write `}}}}` for a brace")]
    Unopened {
        /// The template.
        template: String,
        /// Place of the brace.
        column: usize,
    },
    /// A field without a name.
    #[error("template {template:?}, column {column}: the field has no name; write one, as in `{{inputs}}`")]
    EmptyField {
        /// The template.
        template: String,
        /// Place of its brace.
        column: usize,
    },
    /// A text that would be the same for every record.
    #[error("template {template:?} has no field; put the name of one in braces, as in `{{inputs}}`")]
    NoField {
        /// The template.
        template: String,
    },
}

impl Template {
    /// The template that is one field.
    pub fn field(name: &str) -> Self {
        let text = format!("{{{name}}}");
        Self { text, pieces: vec![Piece::Field(name.to_owned())] }
    }

    /// Reads a template.
    pub fn parse(template: &str) -> Result<Self, TemplateError> {
        let chars: Vec<char> = template.chars().collect();
        let text = || template.to_owned();
        let mut pieces = Vec::new();
        let mut literal = String::new();
        let mut at = 0;
        while at < chars.len() {
            let doubled = chars.get(at + 1) == Some(&chars[at]);
            match chars[at] {
                '{' | '}' if doubled => {
                    literal.push(chars[at]);
                    at += 2;
                }
                '{' => {
                    let column = at + 1;
                    let name: String =
                        chars[column..].iter().take_while(|c| !matches!(c, '{' | '}')).collect();
                    at = column + name.chars().count();
                    if chars.get(at) != Some(&'}') {
                        return Err(TemplateError::Unclosed { template: text(), column });
                    }
                    if name.trim().is_empty() {
                        return Err(TemplateError::EmptyField { template: text(), column });
                    }
                    at += 1;
                    if !literal.is_empty() {
                        pieces.push(Piece::Text(std::mem::take(&mut literal)));
                    }
                    pieces.push(Piece::Field(name));
                }
                '}' => return Err(TemplateError::Unopened { template: text(), column: at + 1 }),
                other => {
                    literal.push(other);
                    at += 1;
                }
            }
        }
        if pieces.is_empty() {
            return Err(TemplateError::NoField { template: text() });
        }
        if !literal.is_empty() {
            pieces.push(Piece::Text(literal));
        }
        Ok(Self { text: text(), pieces })
    }

    /// The names of its fields, in order.
    pub fn fields(&self) -> impl Iterator<Item = &str> {
        self.pieces.iter().filter_map(|piece| match piece {
            Piece::Field(name) => Some(name.as_str()),
            Piece::Text(_) => None,
        })
    }

    /// Fills in a record's values: strings as they are, numbers and booleans as JSON writes them.
    ///
    /// # Errors
    /// A field that the record does not have, and a value that is null, an array or an object.
    pub fn render(&self, record: &Record) -> Result<String, Problem> {
        let mut rendered = String::new();
        for piece in &self.pieces {
            match piece {
                Piece::Text(text) => rendered.push_str(text),
                Piece::Field(name) => self.push_value(&mut rendered, name, record)?,
            }
        }
        Ok(rendered)
    }

    fn push_value(&self, rendered: &mut String, name: &str, record: &Record) -> Result<(), Problem> {
        let template = || self.text.clone();
        let field = || name.to_owned();
        match record.get(name) {
            Some(Value::String(text)) => rendered.push_str(text),
            Some(Value::Number(number)) => rendered.push_str(&number.to_string()),
            Some(Value::Bool(value)) => rendered.push_str(if *value { "true" } else { "false" }),
            Some(other) => {
                return Err(Problem::NotText { template: template(), field: field(), found: kind(other) });
            }
            None => {
                let available = field_list(record);
                return Err(Problem::MissingField { template: template(), field: field(), available });
            }
        }
        Ok(())
    }
}

impl FromStr for Template {
    type Err = TemplateError;

    fn from_str(template: &str) -> Result<Self, TemplateError> {
        Self::parse(template)
    }
}

impl fmt::Display for Template {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

/// A JSON value's kind, in words.
pub(crate) fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "true or false",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "an array",
        Value::Object(_) => "an object",
    }
}

/// The names of a record's fields, the first few of a wide one's.
pub(crate) fn field_list(record: &Record) -> String {
    const MOST: usize = 20;
    if record.is_empty() {
        return "no fields at all".to_owned();
    }
    let mut names: Vec<String> = record.keys().take(MOST).map(|name| format!("`{name}`")).collect();
    if record.len() > MOST {
        names.push(format!("{} more", record.len() - MOST));
    }
    names.join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn record(json: &str) -> Record {
        serde_json::from_str(json).unwrap()
    }

    fn render(template: &str, json: &str) -> Result<String, Problem> {
        Template::parse(template).unwrap().render(&record(json))
    }

    #[test]
    fn fields_are_filled_in_and_doubled_braces_are_braces() {
        let text = render("q: {q} {{x}} p: {long name}{q}", r#"{"q": "why?", "long name": "so"}"#).unwrap();
        assert_eq!(text, "q: why? {x} p: sowhy?");
        assert_eq!(Template::parse("a {b} {c}").unwrap().fields().collect::<Vec<_>>(), ["b", "c"]);
        assert_eq!(Template::parse("{b}").unwrap(), Template::field("b"));
    }

    #[test]
    fn numbers_and_booleans_are_rendered_as_json_writes_them() {
        let json =
            r#"{"a": true, "b": 1, "c": 0.5, "d": -3, "e": 1.0, "f": 18446744073709551615, "g": false}"#;
        let text = render("{a} {b} {c} {d} {e} {f} {g}", json).unwrap();
        assert_eq!(text, "true 1 0.5 -3 1.0 18446744073709551615 false");
    }

    #[test]
    fn a_braced_value_is_not_read_as_a_template_again() {
        assert_eq!(render("{a}", r#"{"a": "{b} {{"}"#).unwrap(), "{b} {{");
    }

    #[test]
    fn a_missing_field_is_named_beside_those_there_are() {
        let problem = render("{question}", r#"{"text": "a", "label": 1}"#).unwrap_err().to_string();
        assert!(problem.contains("`question`") && problem.contains("`text`, `label`"), "{problem}");
        let wide = format!("{{{}}}", (0..30).map(|i| format!(r#""f{i}": 1"#)).collect::<Vec<_>>().join(","));
        assert!(render("{q}", &wide).unwrap_err().to_string().contains("`f19`, 10 more"));
        assert!(render("{q}", "{}").unwrap_err().to_string().contains("no fields at all"));
    }

    #[test]
    fn a_value_that_is_no_text_is_refused() {
        for (json, found) in
            [(r#"{"a": null}"#, "null"), (r#"{"a": [1]}"#, "an array"), (r#"{"a": {}}"#, "an object")]
        {
            let problem = render("{a}", json).unwrap_err().to_string();
            assert!(problem.contains(&format!("field `a` is {found}")), "{problem}");
        }
    }

    #[test]
    fn a_template_that_is_none_is_refused_with_the_column() {
        let refusal = |template: &str| Template::parse(template).unwrap_err();
        for (template, column) in [("é {abc", 3), ("{a {b}", 1), ("{a}{", 4), ("{", 1)] {
            assert_eq!(refusal(template), TemplateError::Unclosed { template: template.into(), column });
        }
        for (template, column) in [("a}", 2), ("{a}}", 4)] {
            assert_eq!(refusal(template), TemplateError::Unopened { template: template.into(), column });
        }
        for (template, column) in [("a {}", 3), ("{ }", 1)] {
            assert_eq!(refusal(template), TemplateError::EmptyField { template: template.into(), column });
        }
        for template in ["", "label", "{{label}}"] {
            assert_eq!(refusal(template), TemplateError::NoField { template: template.into() });
        }
    }

    proptest! {
        #[test]
        fn parsing_and_rendering_never_panic(
            template in "[{}a-c é]{0,12}",
            key in "[a-c]",
            value in ".{0,8}",
        ) {
            let mut record = Record::new();
            record.insert(key, Value::String(value));
            if let Ok(parsed) = template.parse::<Template>() {
                prop_assert_eq!(parsed.to_string(), template);
                let absent = parsed.fields().any(|name| !record.contains_key(name));
                prop_assert_eq!(parsed.render(&record).is_err(), absent);
            }
        }

        #[test]
        fn a_literal_text_is_rendered_as_it_is(text in ".{0,20}", value in ".{0,8}") {
            let escaped = text.replace('{', "{{").replace('}', "}}");
            let mut record = Record::new();
            record.insert("f".into(), Value::String(value.clone()));
            let rendered = Template::parse(&format!("{escaped}{{f}}")).unwrap().render(&record).unwrap();
            prop_assert_eq!(rendered, format!("{text}{value}"));
        }
    }
}
