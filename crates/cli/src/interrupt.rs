//! Ctrl-C: once asks a run to save and leave, twice leaves at once.

use std::sync::mpsc::{Receiver, channel};

use incipit_tune::control::Control;

use crate::exit::Exit;
use crate::progress::note;

/// From now on the first Ctrl-C (or termination signal) asks through `control`, and the second ends the program.
///
/// # Errors
/// If the system refuses to hand over its signals.
pub(crate) fn stop_on_ctrl_c(control: Control) -> anyhow::Result<()> {
    ctrlc::set_handler(move || {
        if control.stop_requested() {
            note("left at once; the last checkpoint stands");
            std::process::exit(i32::from(Exit::Interrupted as u8));
        }
        control.request_stop();
        note("\nstopping: this step is finished and a checkpoint saved (Ctrl-C again leaves at once)");
    })?;
    Ok(())
}

/// Ctrl-C and termination signals, as they come, for a command that passes them on.
///
/// # Errors
/// If the system refuses to hand over its signals.
pub(crate) fn signals() -> anyhow::Result<Receiver<()>> {
    let (sender, receiver) = channel();
    ctrlc::set_handler(move || {
        // At the end nobody listens any more.
        let _ = sender.send(());
    })?;
    Ok(receiver)
}
