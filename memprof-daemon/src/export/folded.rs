//! Folded stacks, as flame graph programs read them: a line a stack, the
//! process's name first, then from the root to the leaf, and one value.
//!
//! ```text
//! redis-server;main;aeMain;readQueryFromClient;zmalloc 1048576
//! ```
//!
//! Stacks that read the same are added up, so the sum of a file's values is the
//! profile's.

use std::{
    collections::BTreeMap,
    io::{self, Write},
};

use crate::export::{
    line::lines,
    numbers::{Numbers, ValueType},
    profile::Profile,
};

/// Writes folded stacks with one of their values. Stacks without any are left
/// out; in the profile of a window also those that hold less than before, since flame
/// graphs have no numbers below zero.
///
/// # Errors
///
/// Those of the writer.
pub fn write(profile: &Profile, value_type: ValueType, out: &mut dyn Write) -> io::Result<()> {
    let mut folded: BTreeMap<String, Vec<_>> = BTreeMap::new();
    for process in &profile.processes {
        for stack in &process.stacks {
            let mut line = String::new();
            push_name(&mut line, &process.comm);
            if stack.truncated() {
                line.push_str(";[cut]");
            }
            for frame in lines(&stack.frames).rev() {
                line.push(';');
                push_name(&mut line, &frame.label());
            }
            folded.entry(line).or_default().push(&stack.counters);
        }
    }
    for (line, counters) in folded {
        let value = Numbers::total(counters).value(value_type);
        if value > 0 {
            writeln!(out, "{line} {value}")?;
        }
    }
    Ok(())
}

/// Adds a name without what separates names, lines and fields.
fn push_name(line: &mut String, name: &str) {
    if name.is_empty() {
        line.push('?');
    }
    line.extend(name.chars().map(|char| match char {
        ';' => ':',
        char if char.is_control() => ' ',
        char => char,
    }));
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::export::testing;

    fn fold(profile: &Profile, value_type: ValueType) -> String {
        let mut out = Vec::new();
        write(profile, value_type, &mut out).unwrap();
        String::from_utf8(out).unwrap()
    }

    /// Check the lines for in-use bytes: root first, inlined functions their own
    /// frame, nothing for stacks without a value.
    #[test]
    fn inuse_bytes() {
        assert_eq!(
            fold(&testing::profile(), ValueType::InuseSpace),
            "\
leaky:app;[cut];vec<[u8: 4]>::push;leaky.so+0x1234;[unmapped 0xdead] 4096
leaky:app;[no stack] 64
leaky:app;main;leak_buffers;xmalloc 8388608
other;main;leak_buffers;xmalloc 100
"
        );
    }

    /// Check that each of the four values can be asked for.
    #[test]
    fn other_values() {
        let first_line = |value_type| {
            let text = fold(&testing::profile(), value_type);
            let line = text.lines().find(|line| line.contains("churn"));
            line.map(str::to_owned)
        };
        assert_eq!(
            first_line(ValueType::AllocSpace).as_deref(),
            Some("leaky:app;main;churn 99999")
        );
        assert_eq!(
            first_line(ValueType::AllocObjects).as_deref(),
            Some("leaky:app;main;churn 1000")
        );
        assert_eq!(first_line(ValueType::InuseObjects), None);
    }
}
