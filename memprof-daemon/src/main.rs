//! The binary `memprof`.

use std::process::ExitCode;

fn main() -> ExitCode {
    memprof::cli::main()
}
