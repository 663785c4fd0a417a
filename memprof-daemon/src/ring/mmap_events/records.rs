//! What the kernel's records say.

use std::{ffi::OsString, mem, os::unix::ffi::OsStringExt, path::PathBuf};

use crate::address::{AbsAddr, FileOffset};

/// A mapping that became executable.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MmapEvent {
    /// `CLOCK_MONOTONIC`, as samples have it.
    pub timestamp_ns: u64,
    /// Process id.
    pub pid: u32,
    /// First address.
    pub start: AbsAddr,
    /// Bytes.
    pub len: u64,
    /// Where in the file `start` is.
    pub file_offset: FileOffset,
    /// Device number, as `/proc/PID/maps` shows it.
    pub device_major: u32,
    /// See `device_major`.
    pub device_minor: u32,
    /// 0 without a file.
    pub inode: u64,
    /// The path as the kernel shows it, with ` (deleted)` where it applies; or
    /// its name for memory without a file: `//anon`, `[vdso]`.
    pub path: PathBuf,
}

/// What the kernel has told of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum HostEvent {
    /// A mapping.
    Mmap(MmapEvent),
    /// A process was made.
    Fork {
        /// When.
        timestamp_ns: u64,
        /// The new one.
        pid: u32,
        /// Its parent.
        parent: u32,
    },
    /// A process has replaced its program; its mappings come after this.
    Exec {
        /// When.
        timestamp_ns: u64,
        /// Which.
        pid: u32,
        /// The new program's name.
        comm: String,
    },
    /// The first thread of a process has ended.
    Exit {
        /// When.
        timestamp_ns: u64,
        /// Which.
        pid: u32,
    },
}

impl HostEvent {
    pub(super) const fn timestamp_ns(&self) -> u64 {
        match self {
            Self::Mmap(event) => event.timestamp_ns,
            Self::Fork { timestamp_ns, .. }
            | Self::Exec { timestamp_ns, .. }
            | Self::Exit { timestamp_ns, .. } => *timestamp_ns,
        }
    }
}

#[derive(Debug, PartialEq, Eq)]
pub(super) enum Record {
    Event(HostEvent),
    Lost(u64),
    Other,
    Malformed,
}

const RECORD_LOST: u32 = 2;
const RECORD_COMM: u32 = 3;
const RECORD_EXIT: u32 = 4;
const RECORD_FORK: u32 = 7;
const RECORD_MMAP2: u32 = 10;
/// The header's `misc` says that the name is that of a new program.
const MISC_COMM_EXEC: u16 = 1 << 13;
/// The header's `misc` says that a build id stands in the place of the device;
/// it was not asked for.
const MISC_MMAP_BUILD_ID: u16 = 1 << 14;

/// Splits bytes into records. A record that cannot be delimited ends it.
pub(super) struct Records<'a>(pub(super) &'a [u8]);

impl Iterator for Records<'_> {
    type Item = Record;

    fn next(&mut self) -> Option<Record> {
        if self.0.is_empty() {
            return None;
        }
        let bytes = mem::take(&mut self.0);
        let record = split_record(bytes).map(|(kind, misc, body, rest)| {
            self.0 = rest;
            parse_record(kind, misc, body)
        });
        Some(record.flatten().unwrap_or(Record::Malformed))
    }
}

/// `struct perf_event_header { u32 type; u16 misc; u16 size; }`
fn split_record(mut bytes: &[u8]) -> Option<(u32, u16, &[u8], &[u8])> {
    let whole = bytes;
    let kind = u32::from_ne_bytes(field(&mut bytes)?);
    let misc = u16::from_ne_bytes(field(&mut bytes)?);
    let size = usize::from(u16::from_ne_bytes(field(&mut bytes)?));
    let body = whole.get(8..size)?;
    Some((kind, misc, body, whole.get(size..)?))
}

/// The layouts are in include/uapi/linux/perf_event.h, `enum perf_event_type`.
fn parse_record(kind: u32, misc: u16, mut body: &[u8]) -> Option<Record> {
    match kind {
        RECORD_LOST => {
            let _id: [u8; 8] = field(&mut body)?;
            Some(Record::Lost(u64::from_ne_bytes(field(&mut body)?)))
        }
        RECORD_MMAP2 if misc & MISC_MMAP_BUILD_ID == 0 => {
            // With `sample_id_all` a record ends in what `sample_type` asks for.
            let (rest, time) = body.split_last_chunk::<8>()?;
            body = rest;
            let pid = u32::from_ne_bytes(field(&mut body)?);
            let _tid: [u8; 4] = field(&mut body)?;
            let start = u64::from_ne_bytes(field(&mut body)?);
            let len = u64::from_ne_bytes(field(&mut body)?);
            let file_offset = u64::from_ne_bytes(field(&mut body)?);
            let device_major = u32::from_ne_bytes(field(&mut body)?);
            let device_minor = u32::from_ne_bytes(field(&mut body)?);
            let inode = u64::from_ne_bytes(field(&mut body)?);
            let _generation: [u8; 8] = field(&mut body)?;
            let _prot_and_flags: [u8; 8] = field(&mut body)?;
            let path = body.split(|&byte| byte == 0).next()?.to_vec();
            Some(Record::Event(HostEvent::Mmap(MmapEvent {
                timestamp_ns: u64::from_ne_bytes(*time),
                pid,
                start: AbsAddr(start),
                len,
                file_offset: FileOffset(file_offset),
                device_major,
                device_minor,
                inode,
                path: PathBuf::from(OsString::from_vec(path)),
            })))
        }
        RECORD_MMAP2 => None,
        RECORD_COMM if misc & MISC_COMM_EXEC != 0 => {
            let (rest, time) = body.split_last_chunk::<8>()?;
            body = rest;
            let pid = u32::from_ne_bytes(field(&mut body)?);
            let _tid: [u8; 4] = field(&mut body)?;
            let comm = body.split(|&byte| byte == 0).next()?;
            Some(Record::Event(HostEvent::Exec {
                timestamp_ns: u64::from_ne_bytes(*time),
                pid,
                comm: String::from_utf8_lossy(comm).into_owned(),
            }))
        }
        RECORD_FORK | RECORD_EXIT => {
            let pid = u32::from_ne_bytes(field(&mut body)?);
            let parent = u32::from_ne_bytes(field(&mut body)?);
            let tid = u32::from_ne_bytes(field(&mut body)?);
            let _parent_tid: [u8; 4] = field(&mut body)?;
            let timestamp_ns = u64::from_ne_bytes(field(&mut body)?);
            Some(match kind {
                // Of a process, not of a further thread.
                _ if pid != tid => Record::Other,
                RECORD_FORK => Record::Event(HostEvent::Fork {
                    timestamp_ns,
                    pid,
                    parent,
                }),
                _ => Record::Event(HostEvent::Exit { timestamp_ns, pid }),
            })
        }
        _ => Some(Record::Other),
    }
}

fn field<const N: usize>(bytes: &mut &[u8]) -> Option<[u8; N]> {
    let (field, rest) = bytes.split_first_chunk::<N>()?;
    *bytes = rest;
    Some(*field)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(kind: u32, misc: u16, body: &[u8]) -> Vec<u8> {
        let mut record = kind.to_ne_bytes().to_vec();
        record.extend(misc.to_ne_bytes());
        record.extend((8 + body.len() as u16).to_ne_bytes());
        record.extend(body);
        record
    }

    /// Check that records which are too short, of an impossible size or of
    /// unknown kind are told, that those behind them are still read where their
    /// place is known, and that nothing panics on any truncation.
    #[test]
    fn malformed_records() {
        let mut bytes = record(RECORD_MMAP2, 0, &[0; 20]);
        bytes.extend(record(RECORD_LOST, 0, &[1; 8]));
        bytes.extend(record(99, 0, &[]));
        bytes.extend(record(RECORD_MMAP2, MISC_MMAP_BUILD_ID, &[0; 100]));
        bytes.extend(record(
            RECORD_LOST,
            0,
            &[[0; 8], 5_u64.to_ne_bytes()].concat(),
        ));
        bytes.extend([0; 8]);
        bytes.extend(record(99, 0, &[]));
        let records: Vec<_> = Records(&bytes).collect();
        assert_eq!(
            records,
            [
                Record::Malformed,
                Record::Malformed,
                Record::Other,
                Record::Malformed,
                Record::Lost(5),
                Record::Malformed,
            ]
        );
        for length in 0..bytes.len() {
            assert!(Records(&bytes[..length]).count() <= records.len());
        }
    }
}
