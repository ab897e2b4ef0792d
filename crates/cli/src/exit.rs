//! How the program ends, and what it says when it could not do what it was asked.

use std::process::ExitCode;

/// The program's exit codes. `--help` and `docs/cli.md` list them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Exit {
    /// Done.
    Ok = 0,
    /// Something failed: a file could not be written, memory ran out.
    Failure = 1,
    /// What was given cannot be used: flags, files, data.
    Usage = 2,
    /// A loss or gradient was not finite, and training stopped before it did harm.
    NonFinite = 3,
    /// Stopped by Ctrl-C or a termination signal.
    Interrupted = 130,
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        ExitCode::from(exit as u8)
    }
}

/// Something that the user gave and that cannot be used; the message says what to give.
#[derive(Debug)]
pub(crate) struct BadInput(pub(crate) String);

impl std::fmt::Display for BadInput {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for BadInput {}

/// `Err` with [`BadInput`].
pub(crate) fn bad_input<T>(message: impl Into<String>) -> anyhow::Result<T> {
    Err(BadInput(message.into()).into())
}

/// Whoever read our standard output has closed it: there is nobody left to tell.
#[derive(Debug)]
pub(crate) struct OutputClosed;

impl std::fmt::Display for OutputClosed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("standard output was closed")
    }
}

impl std::error::Error for OutputClosed {}

/// Ends the program after an error: says it, once, on standard error.
pub(crate) fn report(error: &anyhow::Error) -> Exit {
    if error.downcast_ref::<OutputClosed>().is_some() {
        return Exit::Ok;
    }
    eprintln!("error: {}", sentence(error));
    of(error)
}

/// The whole chain of causes as one line; a cause that the message before it already tells is left out.
fn sentence(error: &anyhow::Error) -> String {
    let mut text = String::new();
    for cause in error.chain().map(ToString::to_string) {
        if text.is_empty() {
            text = cause;
        } else if !text.contains(&cause) {
            text = format!("{text}: {cause}");
        }
    }
    text
}

/// The exit code that an error deserves: that of the first cause which has one.
fn of(error: &anyhow::Error) -> Exit {
    error.chain().find_map(of_cause).unwrap_or(Exit::Failure)
}

fn of_cause(cause: &(dyn std::error::Error + 'static)) -> Option<Exit> {
    if cause.is::<BadInput>() {
        return Some(Exit::Usage);
    }
    let tune = cause.downcast_ref::<incipit_tune::Error>().map(of_tune);
    let model = || cause.downcast_ref::<incipit_model::Error>().map(of_model);
    let weights = || cause.downcast_ref::<incipit_weights::Error>().map(of_weights);
    let data = || cause.downcast_ref::<incipit_data::Error>().map(of_data);
    tune.or_else(model).or_else(weights).or_else(data)
}

fn of_tune(error: &incipit_tune::Error) -> Exit {
    use incipit_tune::Error;
    match error {
        Error::NonFinite { .. } | Error::NonFiniteEvaluation { .. } => Exit::NonFinite,
        Error::Interrupted => Exit::Interrupted,
        Error::Io { action, source, .. } => of_io(action, source),
        Error::Stopped { .. }
        | Error::Threads { .. }
        | Error::Sum { .. }
        | Error::Embedding { .. }
        | Error::Tensor(_) => Exit::Failure,
        Error::Data(error) => of_data(error),
        Error::Weights(error) => of_weights(error),
        Error::Model(error) => of_model(error),
        _ => Exit::Usage,
    }
}

fn of_model(error: &incipit_model::Error) -> Exit {
    use incipit_model::Error;
    match error {
        Error::Weights(error) => of_weights(error),
        Error::Kernel(_) | Error::Tensor(_) => Exit::Failure,
        Error::Config { .. } | Error::Example { .. } | Error::Options { .. } => Exit::Usage,
    }
}

fn of_weights(error: &incipit_weights::Error) -> Exit {
    use incipit_weights::Error;
    match error {
        Error::Io { action, source, .. } => of_io(action, source),
        Error::Hub { .. } | Error::Frozen(_) => Exit::Failure,
        _ => Exit::Usage,
    }
}

fn of_data(error: &incipit_data::Error) -> Exit {
    use incipit_data::Error;
    match error {
        Error::Open { cause, .. } => of_io("read", cause),
        Error::Read { .. } => Exit::Failure,
        _ => Exit::Usage,
    }
}

/// A file that is not there was named wrongly; whatever else the system refuses is its failure.
fn of_io(action: &str, error: &std::io::Error) -> Exit {
    use std::io::ErrorKind;
    let absent =
        [ErrorKind::NotFound, ErrorKind::IsADirectory, ErrorKind::NotADirectory].contains(&error.kind());
    if absent && action != "write" { Exit::Usage } else { Exit::Failure }
}

#[cfg(test)]
mod tests {
    use super::*;
    use anyhow::{Context, anyhow};

    #[test]
    fn a_chain_of_causes_is_told_once() {
        let inner = anyhow!("no such file").context("cannot read x: no such file").context("the model");
        assert_eq!(sentence(&inner), "the model: cannot read x: no such file");
    }

    #[test]
    fn bad_input_is_told_from_failure_however_deep_it_lies() {
        let bad: anyhow::Result<()> = bad_input("no rows");
        assert_eq!(of(&bad.context("reading").expect_err("an error")), Exit::Usage);
        assert_eq!(of(&anyhow!("disk full")), Exit::Failure);
    }

    #[test]
    fn an_absent_file_is_a_usage_error_and_a_full_disk_a_failure() {
        use std::io::{Error, ErrorKind};
        assert_eq!(of_io("read", &Error::from(ErrorKind::NotFound)), Exit::Usage);
        assert_eq!(of_io("write", &Error::from(ErrorKind::StorageFull)), Exit::Failure);
        assert_eq!(of(&incipit_tune::Error::Interrupted.into()), Exit::Interrupted);
        let what = "the loss is NaN".to_owned();
        let error = incipit_tune::Error::NonFinite { step: 3, what, index: 0, line: 1 };
        assert_eq!(of(&anyhow::Error::new(error).context("training")), Exit::NonFinite);
    }
}
