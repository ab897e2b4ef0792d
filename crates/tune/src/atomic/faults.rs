//! Lets writing fail, or the process "die", at any chosen operation on the disk.

use std::{
    cell::RefCell,
    fs::File,
    io,
    path::{Path, PathBuf},
};

/// What happens at the chosen operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fault {
    /// It fails, and so does everything after it; what was written but not flushed is lost, as when the power
    /// goes.
    Crash,
    /// It fails alone, as with a disk that is full.
    Error,
}

struct Plan {
    fault: Fault,
    at: usize,
    trace: Vec<String>,
    unsynced: Vec<(PathBuf, File)>,
}

thread_local! {
    static PLAN: RefCell<Option<Plan>> = const { RefCell::new(None) };
}

/// Runs `work`, with a fault at its operation number `at` (from 0), and returns what it gave and which
/// operations it tried.
pub(crate) fn with_fault<T>(fault: Fault, at: usize, work: impl FnOnce() -> T) -> (T, Vec<String>) {
    PLAN.set(Some(Plan { fault, at, trace: Vec::new(), unsynced: Vec::new() }));
    let result = work();
    let plan = PLAN.take().expect("nobody else takes it");
    if fault == Fault::Crash && plan.trace.len() > at {
        // Through the open file, so that one renamed before it was flushed loses its content too.
        plan.unsynced.iter().for_each(|(_, file)| file.set_len(0).unwrap());
    }
    (result, plan.trace)
}

/// Runs `prepare`, then `work` with a fault at each of its operations in turn, and `check` after each;
/// returns how many operations there were.
pub(crate) fn at_every_moment<T>(
    fault: Fault,
    prepare: impl Fn(),
    work: impl Fn() -> T,
    mut check: impl FnMut(T, &[String]),
) -> usize {
    let mut at = 0;
    loop {
        prepare();
        let (result, trace) = with_fault(fault, at, &work);
        check(result, &trace);
        if trace.len() <= at {
            return at;
        }
        at += 1;
    }
}

pub(super) fn moment(operation: &str, path: &Path) -> io::Result<()> {
    PLAN.with_borrow_mut(|plan| {
        let Some(plan) = plan else { return Ok(()) };
        let number = plan.trace.len();
        plan.trace.push(format!("{operation} {}", path.file_name().unwrap_or_default().display()));
        let fails = match plan.fault {
            Fault::Crash => number >= plan.at,
            Fault::Error => number == plan.at,
        };
        if fails { Err(io::Error::from(io::ErrorKind::StorageFull)) } else { Ok(()) }
    })
}

pub(super) fn written(path: &Path, file: File) {
    PLAN.with_borrow_mut(|plan| {
        if let Some(plan) = plan {
            plan.unsynced.push((path.to_owned(), file));
        }
    });
}

pub(super) fn synced(path: &Path) {
    PLAN.with_borrow_mut(|plan| {
        if let Some(plan) = plan {
            plan.unsynced.retain(|(p, _)| p != path);
        }
    });
}
