//! Ctrl-C: the first asks the work in progress to stop at its next step, the second ends the
//! process.

use std::sync::atomic::{AtomicBool, Ordering};

use crate::ui;

static ASKED: AtomicBool = AtomicBool::new(false);

/// Exit code of a process that a second Ctrl-C ended: 128 + SIGINT.
const KILLED: i32 = 130;

/// From here on Ctrl-C only asks; `promise` says what will happen, such as "saving a checkpoint".
pub fn listen(promise: &'static str) {
    // It fails only if a handler exists, or where the system has no signals; Ctrl-C then ends the
    // process.
    let _ = ctrlc::set_handler(move || {
        if ASKED.swap(true, Ordering::SeqCst) {
            ui::restore_cursor();
            std::process::exit(KILLED);
        }
        ui::complain(&format!("\nstopping: {promise}; Ctrl-C again to leave at once"));
    });
}

/// Has Ctrl-C been pressed?
pub fn asked() -> bool {
    ASKED.load(Ordering::SeqCst)
}
