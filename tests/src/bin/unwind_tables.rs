//! What the unwind tables of files take: `unwind_tables FILE...`. Build it with `--release`.

use std::{env, fs::File, process::ExitCode, time::Instant};

use memprof::unwind::compile;

fn main() -> ExitCode {
    let files: Vec<String> = env::args().skip(1).collect();
    if files.is_empty() {
        eprintln!("usage: unwind_tables FILE...");
        return ExitCode::from(2);
    }
    println!("functions      rows  wide rules  damaged  table KiB  file KiB     ms  file");
    for path in &files {
        let measured = File::open(path)
            .map_err(|error| error.to_string())
            .and_then(|file| {
                let bytes = file.metadata().map_err(|error| error.to_string())?.len();
                let start = Instant::now();
                let table = compile(&file).map_err(|error| error.to_string())?;
                Ok((bytes, start.elapsed(), table))
            });
        match measured {
            Ok((bytes, time, table)) => println!(
                "{:9} {:9} {:11} {:8} {:10} {:9} {:6.1}  {path}",
                table.functions,
                table.rows.len(),
                table.wide.len() / 2,
                table.damaged,
                table.words() * 8 / 1024,
                bytes / 1024,
                time.as_secs_f64() * 1e3,
            ),
            Err(error) => {
                eprintln!("{path}: {error}");
                return ExitCode::FAILURE;
            }
        }
    }
    ExitCode::SUCCESS
}
