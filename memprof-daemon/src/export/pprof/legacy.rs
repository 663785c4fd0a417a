//! The text that Go programs answer `?debug=1` with, which pprof reads as well.
//!
//! ```text
//! heap profile: 1: 100 [2: 200] @ heap/2
//! 1: 100 [2: 200] @ 0x401136 0x401150
//! #    0x401136    leak_here    src/leak.c:42
//! ```

use std::io::{self, BufWriter, Write};

use crate::export::{
    line::frame_lines,
    numbers::{Numbers, by_inuse},
    profile::Profile,
};

/// Writes a profile as text.
///
/// # Errors
///
/// Those of the writer.
pub fn write(profile: &Profile, out: &mut dyn Write) -> io::Result<()> {
    let mut out = BufWriter::new(out);
    let all = profile.processes.iter().flat_map(|process| &process.stacks);
    let total = Numbers::total(all.map(|stack| &stack.counters));
    // Twice the interval that the numbers are to be scaled by: by 1, since the bias of
    // sampling is undone already.
    writeln!(out, "heap profile: {} @ heap/2", values(&total))?;
    for process in &profile.processes {
        writeln!(out, "# process {} {}", process.pid, one_line(&process.comm))?;
        for (stack, numbers) in by_inuse(process) {
            if numbers.is_zero() {
                continue;
            }
            write!(out, "{} @", values(&numbers))?;
            for frame in &stack.frames {
                write!(out, " {:#x}", frame.address.0)?;
            }
            writeln!(out)?;
            for frame in &stack.frames {
                for line in frame_lines(frame) {
                    let place = line.source().unwrap_or_default();
                    let label = line.label();
                    writeln!(
                        out,
                        "#\t{:#x}\t{}\t{}",
                        frame.address.0,
                        one_line(&label),
                        one_line(&place)
                    )?;
                }
            }
            writeln!(out)?;
        }
    }
    out.flush()
}

fn values(numbers: &Numbers) -> String {
    format!(
        "{}: {} [{}: {}]",
        numbers.inuse_objects, numbers.inuse_bytes, numbers.alloc_objects, numbers.alloc_bytes
    )
}

fn one_line(text: &str) -> String {
    text.replace(char::is_control, " ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::export::testing;

    /// Check the first line, a stack with its frames, and that names with line breaks stay
    /// within theirs.
    #[test]
    fn text() {
        let mut profile = testing::profile();
        profile.processes[0].comm = "two\nlines".to_owned();
        let mut out = Vec::new();
        write(&profile, &mut out).unwrap();
        let text = String::from_utf8(out).unwrap();
        let first = text.lines().next().unwrap();
        assert!(first.starts_with("heap profile: "), "{text}");
        assert!(first.ends_with(" @ heap/2"), "{text}");
        assert!(text.contains("two lines\n"), "{text}");
        assert!(
            text.contains("819: 8388608 [1024: 10485760] @ 0x"),
            "{text}"
        );
        assert!(text.contains("\tmain\t"), "{text}");
    }
}
