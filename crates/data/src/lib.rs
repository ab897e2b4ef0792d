//! From a data file to tokens, and from predictions to scores.
//!
//! A run reads a file of records ([`read_records`]), turns each into an input and a target text by a
//! [`TaskFormat`] ([`load_text`]), and those into token ids ([`tokenize`](fn@tokenize)). What a model then
//! writes is scored by [`metrics`]. A benchmark that is known by name needs none of the formats: [`tasks`] read its
//! owners' files and score as it does. [`pretrain`] makes examples of plain text, which has no targets of its own.
//!
//! Every file, line and field that does not fit is refused with one message that says where it is and how to
//! mend it; see [`Error`] and [`Problem`].

mod error;
mod labels;
mod load;
pub mod metrics;
pub mod pretrain;
mod source;
pub mod tasks;
mod template;
mod tokenize;

pub use error::{BadRecord, Error, Location, Problem, Result, Unit};
pub use labels::{LabelMap, LabelMapError};
pub use load::{LoadOptions, Loaded, TaskFormat, TextExample, labels_of, load_inputs, load_text};
pub use source::{Format, Record, Records, read_records};
pub use template::{Template, TemplateError};
pub use tokenize::{TokenizedExample, TokenizedSet, tokenize};
