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
    /// Another rank failed first; this one could not go on without it.
    OtherRank = 4,
    /// The job that was watched or waited for was cancelled.
    Cancelled = 5,
    /// Stopped by Ctrl-C or a termination signal.
    Interrupted = 130,
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        ExitCode::from(exit as u8)
    }
}

impl From<i32> for Exit {
    /// What another process of this program meant by its exit code.
    fn from(code: i32) -> Self {
        let all =
            [Self::Ok, Self::Usage, Self::NonFinite, Self::OtherRank, Self::Cancelled, Self::Interrupted];
        all.into_iter().find(|exit| *exit as i32 == code).unwrap_or(Self::Failure)
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
    crate::progress::error(&sentence(error));
    of(error)
}

/// The whole chain of causes as one line; a cause that the message before it already tells is left out.
pub(crate) fn sentence(error: &anyhow::Error) -> String {
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
    if is_echo(error) {
        return Exit::OtherRank;
    }
    error.chain().find_map(of_cause).unwrap_or(Exit::Failure)
}

/// Whether the error only tells that another rank has failed.
pub(crate) fn is_echo(error: &anyhow::Error) -> bool {
    error.chain().any(|cause| {
        let tune = cause.downcast_ref::<incipit_tune::Error>().map(incipit_tune::Error::is_echo);
        let collective = cause.downcast_ref::<incipit_collective::Error>().or_else(|| {
            // A transparent error is no cause of its own in the chain.
            match cause.downcast_ref::<incipit_model::Error>() {
                Some(incipit_model::Error::Collective(error)) => Some(error),
                _ => None,
            }
        });
        tune.or_else(|| collective.map(incipit_collective::Error::is_echo)).unwrap_or(false)
    })
}

fn of_cause(cause: &(dyn std::error::Error + 'static)) -> Option<Exit> {
    if cause.is::<BadInput>() {
        return Some(Exit::Usage);
    }
    if let Some(refusal) = cause.downcast_ref::<crate::cluster::Refusal>() {
        return Some(refusal.exit());
    }
    let tune = cause.downcast_ref::<incipit_tune::Error>().map(of_tune);
    let model = || cause.downcast_ref::<incipit_model::Error>().map(of_model);
    let weights = || cause.downcast_ref::<incipit_weights::Error>().map(of_weights);
    let data = || cause.downcast_ref::<incipit_data::Error>().map(of_data);
    let collective = || cause.downcast_ref::<incipit_collective::Error>().map(of_collective);
    tune.or_else(model).or_else(weights).or_else(data).or_else(collective)
}

fn of_tune(error: &incipit_tune::Error) -> Exit {
    use incipit_tune::Error;
    match error {
        Error::NonFinite { .. } | Error::NonFiniteEvaluation { .. } => Exit::NonFinite,
        Error::Interrupted => Exit::Interrupted,
        Error::Io { action, source, .. } => of_io(action, source),
        Error::Stopped { .. }
        | Error::Received { .. }
        | Error::Threads { .. }
        | Error::Kernels(_)
        | Error::Embedding { .. } => Exit::Failure,
        Error::Data(error) => of_data(error),
        Error::Weights(error) => of_weights(error),
        Error::Model(error) => of_model(error),
        Error::Collective(error) => of_collective(error),
        _ => Exit::Usage,
    }
}

fn of_collective(error: &incipit_collective::Error) -> Exit {
    match error {
        incipit_collective::Error::Mesh(_) => Exit::Usage,
        _ if error.is_echo() => Exit::OtherRank,
        _ => Exit::Failure,
    }
}

fn of_model(error: &incipit_model::Error) -> Exit {
    use incipit_model::Error;
    match error {
        Error::Weights(error) => of_weights(error),
        Error::Collective(error) => of_collective(error),
        Error::Kernel(_) => Exit::Failure,
        Error::Mesh(_) | Error::Config { .. } | Error::Example { .. } | Error::Options { .. } => Exit::Usage,
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
    fn a_rank_that_failed_after_another_says_so_by_its_exit_code() {
        let aborted = incipit_collective::Error::Aborted { rank: Some(1), reason: "disk full".to_owned() };
        let error = anyhow::Error::new(incipit_tune::Error::from(aborted.clone())).context("training");
        assert_eq!((of(&error), of(&aborted.into())), (Exit::OtherRank, Exit::OtherRank));
        let mesh = crate::ranks::local_mesh(0, 1).expect_err("no mesh");
        assert_eq!((of(&mesh), of(&anyhow!("disk full"))), (Exit::Usage, Exit::Failure));
        for code in [0, 1, 2, 3, 4, 5, 130] {
            assert_eq!(Exit::from(code) as i32, code);
        }
        assert_eq!(Exit::from(101), Exit::Failure);
    }

    #[test]
    fn an_absent_file_is_a_usage_error_and_a_full_disk_a_failure() {
        use std::io::{Error, ErrorKind};
        assert_eq!(of_io("read", &Error::from(ErrorKind::NotFound)), Exit::Usage);
        assert_eq!(of_io("write", &Error::from(ErrorKind::StorageFull)), Exit::Failure);
        assert_eq!(of(&incipit_tune::Error::Interrupted.into()), Exit::Interrupted);
        let what = "the loss is NaN".to_owned();
        let error = incipit_tune::Error::NonFinite { step: 3, rank: 0, what, index: 0, line: 1 };
        assert_eq!(of(&anyhow::Error::new(error).context("training")), Exit::NonFinite);
    }
}
