//! Which Go has built a program: the section `.go.buildinfo`.

use std::{fs::File, os::unix::fs::FileExt as _};

use crate::process::elf::Section;

/// A version of Go.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Version {
    /// As the program says it: `go1.19.8`.
    pub(super) text: String,
    /// The NN of `go1.NN`, if it is so called.
    pub(super) minor: Option<u32>,
}

/// `buildInfoMagic` (src/debug/buildinfo/buildinfo.go).
const MAGIC: &[u8] = b"\xff Go buildinf:";

/// The strings are in the section itself (since Go 1.18), behind a header of this size.
const INLINE_STRINGS: u8 = 2;
const HEADER_BYTES: usize = 32;

/// What is read: the version is the first string, and short.
const READ_BYTES: usize = 512;

/// The version that is written in a section; none if it is not what its name says.
pub(super) fn version(file: &File, section: &Section) -> Option<Version> {
    let mut bytes = [0; READ_BYTES];
    let size = usize::try_from(section.size).unwrap_or(READ_BYTES);
    let part = bytes.get_mut(..size.min(READ_BYTES))?;
    file.read_exact_at(part, section.file_offset.0).ok()?;
    parse(part)
}

fn parse(bytes: &[u8]) -> Option<Version> {
    bytes.starts_with(MAGIC).then_some(())?;
    let flags = *bytes.get(15)?;
    if flags & INLINE_STRINGS == 0 {
        return Some(Version {
            text: "a Go before 1.18".to_owned(),
            minor: None,
        });
    }
    let (&len, rest) = bytes.get(HEADER_BYTES..)?.split_first()?;
    // A longer one would have a length of two bytes.
    let text = rest.get(..usize::from(len)).filter(|_| len < 0x80)?;
    let text: String = String::from_utf8_lossy(text)
        .chars()
        .filter(|c| !c.is_control())
        .collect();
    Some(Version {
        minor: minor(&text),
        text,
    })
}

/// `go1.19.8`, `go1.27rc1`, `devel go1.28-0123abcd` and what vendors make of them.
fn minor(text: &str) -> Option<u32> {
    let text = text.strip_prefix("devel ").unwrap_or(text);
    let rest = text.strip_prefix("go1.")?;
    let digits = rest.bytes().take_while(u8::is_ascii_digit).count();
    rest.get(..digits)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn section(version: &str) -> Vec<u8> {
        let mut bytes = MAGIC.to_vec();
        bytes.extend([8, INLINE_STRINGS]);
        bytes.resize(HEADER_BYTES, 0);
        bytes.push(version.len() as u8);
        bytes.extend(version.as_bytes());
        bytes
    }

    /// Check that versions are read in all their spellings, and that what is none is not.
    #[test]
    fn versions() {
        for (text, expected) in [
            ("go1.19.8", Some(19)),
            ("go1.27rc1", Some(27)),
            ("go1.22.1 X:loopvar", Some(22)),
            ("devel go1.28-0123abcd Tue", Some(28)),
            ("devel +0123abcd", None),
            ("gccgo 12", None),
        ] {
            let version = parse(&section(text)).unwrap();
            assert_eq!((version.text.as_str(), version.minor), (text, expected));
        }
    }

    /// Check that a section of other content, or cut anywhere, is none.
    #[test]
    fn hostile_sections() {
        let whole = section("go1.19.8");
        for end in 0..whole.len() {
            assert_eq!(parse(&whole[..end]), None, "{end}");
        }
        let mut other = whole.clone();
        other[3] = b'g';
        assert_eq!(parse(&other), None);
        let mut long = whole;
        long[HEADER_BYTES] = 0xff;
        assert_eq!(parse(&long), None);
        let mut old = section("go1.17");
        old[15] = 0;
        assert_eq!(parse(&old).unwrap().minor, None);
    }
}
