//! Help for tests that need something which not every machine has.

use std::process::Command;

/// A Python that has the given modules, or `None` with a message. `INCIPIT_PYTHON` says which one to use.
pub(crate) fn python(modules: &str) -> Option<Command> {
    let python = std::env::var("INCIPIT_PYTHON").unwrap_or_else(|_| "python3".to_owned());
    let found = Command::new(&python).args(["-c", &format!("import {modules}")]).output();
    if found.is_ok_and(|output| output.status.success()) {
        let mut command = Command::new(python);
        command.env("OMP_NUM_THREADS", "1");
        return Some(command);
    }
    eprintln!("skipped: {python} has not all of {modules}; set INCIPIT_PYTHON to one that has");
    None
}

/// What a command writes, if it succeeds.
pub(crate) fn output(command: &mut Command) -> String {
    let output = command.output().expect("the command was found before");
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?} failed:\n{error}");
    String::from_utf8(output.stdout).expect("it writes text")
}
