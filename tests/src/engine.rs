//! Which engine the tests run with.

use std::env;

use crate::{memprof::memprof, running::Running};

/// Whether processes get the prefilter, as `MEMPROF_PROBE` says.
#[must_use]
pub fn is_prefilter() -> bool {
    match env::var("MEMPROF_PROBE").as_deref() {
        Err(_) | Ok("" | "auto" | "prefilter") => true,
        Ok(_) => false,
    }
}

/// `memprof cleanup` of a process: what it says.
#[must_use]
pub fn cleanup(pid: u32) -> String {
    let finished = Running::spawn(&mut memprof(&["cleanup", "-p", &pid.to_string()])).finish();
    finished.expect_code(0);
    finished.stdout
}
