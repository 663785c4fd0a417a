//! `memprof check`.

use std::process::ExitCode;

use crate::probe::requirements::{State, check_host};

/// Prints each requirement and its mend; fails if one is not met.
pub(super) fn run() -> anyhow::Result<ExitCode> {
    let mut met = true;
    for requirement in check_host() {
        match requirement.state {
            State::Met(detail) => println!("ok    {:15} {detail}", requirement.name),
            State::Unmet { problem, mend } => {
                met = false;
                println!("FAIL  {:15} {problem}", requirement.name);
                println!("      {:15} mend: {mend}", "");
            }
        }
    }
    Ok(if met {
        ExitCode::SUCCESS
    } else {
        ExitCode::from(super::FAILURE)
    })
}
