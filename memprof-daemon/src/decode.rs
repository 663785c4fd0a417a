//! From the bytes of a record to a [`Sample`]. Never panics.

use memprof_common::{
    events::{
        AllocEvent, COMM_BYTES, ClaimEvent, ExecEvent, FreeEvent, KIND_ALLOC, KIND_CLAIM,
        KIND_EXEC, KIND_FREE, KIND_UNKNOWN_CODE, UnknownCodeEvent,
    },
    function::Function,
    live::{FLAG_RESTORED, FLAG_UNSENT, LiveKey, LiveValue},
    stack::StackKey,
};
use thiserror::Error;

use crate::sample::{AllocKey, AllocSample, Claim, FreeSample, ImageId, Sample, StackId};

/// A record that does not say what it should.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum DecodeError {
    /// Shorter than its kind requires, or than a kind.
    #[error("record of {got} bytes where {expected} are needed")]
    TooShort {
        /// Bytes needed.
        expected: usize,
        /// Bytes there.
        got: usize,
    },
    /// A kind that this daemon does not know.
    #[error("record of unknown kind {0}")]
    UnknownKind(u32),
    /// A function that this daemon does not know.
    #[error("alloc event for unknown function {0}")]
    UnknownFunction(u32),
}

/// Reads integers in the order in which the structs declare them.
struct Reader<'a>(&'a [u8]);

impl Reader<'_> {
    fn take<const N: usize>(&mut self) -> [u8; N] {
        match self.0.split_first_chunk::<N>() {
            Some((bytes, rest)) => {
                self.0 = rest;
                *bytes
            }
            // Not reached: lengths are checked before the first read.
            None => [0; N],
        }
    }

    fn u32(&mut self) -> u32 {
        u32::from_ne_bytes(self.take())
    }

    fn u64(&mut self) -> u64 {
        u64::from_ne_bytes(self.take())
    }

    /// A name, up to the first zero.
    fn comm(&mut self) -> String {
        let comm: [u8; COMM_BYTES] = self.take();
        let comm = comm.split(|&byte| byte == 0).next().unwrap_or_default();
        String::from_utf8_lossy(comm).into_owned()
    }

    fn key(&mut self) -> LiveKey {
        LiveKey {
            pid: self.u32(),
            epoch: self.u32(),
            addr: self.u64(),
        }
    }

    fn value(&mut self) -> LiveValue {
        LiveValue {
            timestamp_ns: self.u64(),
            size_bytes: self.u64(),
            sample_interval_bytes: self.u64(),
            stack: StackKey {
                high: self.u64(),
                low: self.u64(),
            },
            flags: self.u32(),
            function: self.u32(),
        }
    }
}

fn require(record: &[u8], expected: usize) -> Result<(), DecodeError> {
    if record.len() < expected {
        return Err(DecodeError::TooShort {
            expected,
            got: record.len(),
        });
    }
    Ok(())
}

/// Decodes one record of the ring.
///
/// # Errors
///
/// [`DecodeError`] if the record is too short or of a kind this daemon does not
/// know.
pub fn decode(record: &[u8]) -> Result<Sample, DecodeError> {
    require(record, size_of::<u32>())?;
    let mut reader = Reader(record);
    match reader.u32() {
        KIND_ALLOC => {
            require(record, size_of::<AllocEvent>())?;
            let _reserved = reader.u32();
            let key = reader.key();
            let value = reader.value();
            Ok(Sample::Alloc(alloc_sample(&key, &value)?))
        }
        KIND_FREE => {
            require(record, size_of::<FreeEvent>())?;
            let _reserved = reader.u32();
            let key = reader.key();
            Ok(Sample::Free(FreeSample {
                key: alloc_key(&key),
                alloc_timestamp_ns: reader.u64(),
            }))
        }
        KIND_EXEC => {
            require(record, size_of::<ExecEvent>())?;
            let image = ImageId {
                pid: reader.u32(),
                epoch: reader.u32(),
            };
            let by_other_thread = reader.u32() != 0;
            Ok(Sample::Exec {
                image,
                by_other_thread,
                comm: reader.comm(),
            })
        }
        KIND_CLAIM => {
            require(record, size_of::<ClaimEvent>())?;
            let pid = reader.u32();
            let tid = reader.u32();
            let slot = reader.u32();
            let timestamp_ns = reader.u64();
            let comm = reader.comm();
            Ok(Sample::Claim(Claim {
                pid,
                slot,
                timestamp_ns,
                comm: (tid == pid).then_some(comm),
            }))
        }
        KIND_UNKNOWN_CODE => {
            require(record, size_of::<UnknownCodeEvent>())?;
            let image = ImageId {
                pid: reader.u32(),
                epoch: reader.u32(),
            };
            let _reserved = reader.u32();
            Ok(Sample::UnknownCode {
                image,
                address: reader.u64(),
            })
        }
        kind => Err(DecodeError::UnknownKind(kind)),
    }
}

/// The block that a key of the live map names.
#[must_use]
pub const fn alloc_key(key: &LiveKey) -> AllocKey {
    AllocKey {
        image: ImageId {
            pid: key.pid,
            epoch: key.epoch,
        },
        addr: key.addr,
    }
}

/// The sample that an entry of the live map stands for.
///
/// # Errors
///
/// [`DecodeError::UnknownFunction`].
pub fn alloc_sample(key: &LiveKey, value: &LiveValue) -> Result<AllocSample, DecodeError> {
    let function = u8::try_from(value.function)
        .ok()
        .and_then(Function::from_code)
        .ok_or(DecodeError::UnknownFunction(value.function))?;
    Ok(AllocSample {
        key: alloc_key(key),
        timestamp_ns: value.timestamp_ns,
        size_bytes: value.size_bytes,
        sample_interval_bytes: value.sample_interval_bytes,
        stack: StackId::first(value.stack),
        function,
        restored: value.flags & FLAG_RESTORED != 0,
    })
}

/// Whether the block's alloc event is still to be sent.
#[must_use]
pub const fn is_unsent(value: &LiveValue) -> bool {
    value.flags & FLAG_UNSENT != 0
}

#[cfg(test)]
mod tests {
    use super::*;

    fn alloc_record(function: u32, flags: u32) -> Vec<u8> {
        let mut record = Vec::new();
        for word in [KIND_ALLOC, 0, 7, 1] {
            record.extend(word.to_ne_bytes());
        }
        for word in [0xabc0_u64, 11, 22, 33, 44, 55] {
            record.extend(word.to_ne_bytes());
        }
        for word in [flags, function] {
            record.extend(word.to_ne_bytes());
        }
        record
    }

    /// Check that each field of an alloc event arrives in its place.
    #[test]
    fn alloc_event_decodes() {
        let record = alloc_record(Function::Calloc as u32, FLAG_RESTORED);
        assert_eq!(record.len(), size_of::<AllocEvent>());
        let Ok(Sample::Alloc(sample)) = decode(&record) else {
            panic!("not an alloc")
        };
        assert_eq!(sample.key.image, ImageId { pid: 7, epoch: 1 });
        assert_eq!(sample.key.addr, 0xabc0);
        assert_eq!(sample.timestamp_ns, 11);
        assert_eq!(sample.size_bytes, 22);
        assert_eq!(sample.sample_interval_bytes, 33);
        assert_eq!(sample.stack, StackId::first(StackKey { high: 44, low: 55 }));
        assert_eq!(sample.function, Function::Calloc);
        assert!(sample.restored);
    }

    /// Check that free and exec events decode.
    #[test]
    fn free_and_exec_events_decode() {
        let mut record = Vec::new();
        for word in [KIND_FREE, 0, 7, 1] {
            record.extend(word.to_ne_bytes());
        }
        for word in [0xabc0_u64, 11] {
            record.extend(word.to_ne_bytes());
        }
        let image = ImageId { pid: 7, epoch: 1 };
        assert_eq!(
            decode(&record),
            Ok(Sample::Free(FreeSample {
                key: AllocKey {
                    image,
                    addr: 0xabc0
                },
                alloc_timestamp_ns: 11
            }))
        );
        let mut record: Vec<u8> = [KIND_EXEC, 7, 1, 1]
            .into_iter()
            .flat_map(u32::to_ne_bytes)
            .collect();
        record.extend(*b"sqlite3\0\0\0\0\0\0\0\0\0");
        assert_eq!(
            decode(&record),
            Ok(Sample::Exec {
                image,
                by_other_thread: true,
                comm: "sqlite3".to_owned()
            })
        );
    }

    /// Check that a claim decodes, and that a thread's name is not taken for the process's.
    #[test]
    fn claim_event_decodes() {
        let record = |tid: u32| {
            let words = [KIND_CLAIM, 7, tid, 1023];
            let mut record: Vec<u8> = words.into_iter().flat_map(u32::to_ne_bytes).collect();
            record.extend(11_u64.to_ne_bytes());
            record.extend(*b"redis-server\0\0\0\0");
            assert_eq!(record.len(), size_of::<ClaimEvent>());
            record
        };
        let claim = |comm| {
            Ok(Sample::Claim(Claim {
                pid: 7,
                slot: 1023,
                timestamp_ns: 11,
                comm,
            }))
        };
        assert_eq!(decode(&record(7)), claim(Some("redis-server".to_owned())));
        assert_eq!(decode(&record(8)), claim(None));
        assert!(decode(record(7).get(..39).unwrap()).is_err());
    }

    /// Check that every prefix of a record, unknown kinds and unknown functions
    /// are errors and no panics.
    #[test]
    fn hostile_records_are_errors() {
        let record = alloc_record(1, 0);
        for length in 0..record.len() {
            assert!(matches!(
                decode(&record[..length]),
                Err(DecodeError::TooShort { .. })
            ));
        }
        assert_eq!(
            decode(&99_u32.to_ne_bytes()),
            Err(DecodeError::UnknownKind(99))
        );
        assert_eq!(
            decode(&alloc_record(0x0102, 0)),
            Err(DecodeError::UnknownFunction(0x0102))
        );
    }
}
