//! The memory of a process that stands still.

use std::ops::Range;

use super::{
    ptrace, remote,
    step::{self, Step},
    stop::Stopped,
    stop_error::StopError,
    within,
};
use crate::process::maps::{MapsEntry, read_maps};

const PAGE: u64 = 4096;
const WORD: u64 = 8;

impl Stopped {
    /// What it maps.
    ///
    /// # Errors
    ///
    /// It was killed, or the kernel's text cannot be understood.
    pub fn maps(&self) -> Result<Vec<MapsEntry>, StopError> {
        Ok(read_maps(self.any_tid())?)
    }

    /// Whether a thread is within one of `ranges`, or may come back there: its instruction
    /// pointer or a word on its stack is an address behind the first byte and before the
    /// end of one.
    ///
    /// # Errors
    ///
    /// The process was killed.
    pub fn is_anyone_within(&self, ranges: &[Range<u64>]) -> Result<bool, StopError> {
        within::is_anyone_within(&self.threads, &self.maps()?, ranges)
            .map_err(|(tid, error)| StopError::trace(self.pid(), tid, "read its stack", error))
    }

    /// As [`Self::is_anyone_within`], but for instruction pointers.
    ///
    /// # Errors
    ///
    /// As there.
    pub(super) fn may_anyone_return(&self, ranges: &[Range<u64>]) -> Result<bool, StopError> {
        within::may_anyone_return(&self.threads, &self.maps()?, ranges)
            .map_err(|(tid, error)| StopError::trace(self.pid(), tid, "read its stack", error))
    }

    /// Fills `buffer` with its memory from `address` on.
    ///
    /// # Errors
    ///
    /// It is not all mapped and readable.
    pub fn read(&self, address: u64, buffer: &mut [u8]) -> Result<(), StopError> {
        let tid = self.any_tid();
        remote::read(tid, address, buffer)
            .map_err(|error| StopError::trace(self.pid(), tid, "read its memory", error))
    }

    /// Writes five bytes of code in place of others, in one write, and reads them back.
    ///
    /// # Errors
    ///
    /// Others are there than `expected`; or [`StopError::CrossesPage`].
    pub fn write_code(
        &self,
        address: u64,
        expected: &[u8; 5],
        bytes: &[u8; 5],
    ) -> Result<(), StopError> {
        let tid = self.any_tid();
        let failed = |error| StopError::trace(self.pid(), tid, "change its code", error);
        let end_of_page = (address & !(PAGE - 1)).saturating_add(PAGE);
        let word_at = address.min(end_of_page.saturating_sub(WORD));
        let skipped = usize::try_from(address - word_at).unwrap_or(usize::MAX);
        let part = skipped..skipped.saturating_add(bytes.len());
        let compare = |word: [u8; 8], expected: &[u8; 5]| {
            let found = word.get(part.clone());
            let found: [u8; 5] = found
                .and_then(|found| found.try_into().ok())
                .ok_or(StopError::CrossesPage { address })?;
            if found == *expected {
                return Ok(());
            }
            Err(StopError::OtherCode {
                pid: self.pid(),
                address,
                expected: *expected,
                found,
            })
        };
        let mut word = ptrace::peek(tid, word_at).map_err(failed)?;
        compare(word, expected)?;
        for (to, from) in word.iter_mut().skip(skipped).zip(bytes) {
            *to = *from;
        }
        ptrace::poke(tid, word_at, word).map_err(failed)?;
        step::done(Step::CodeWritten);
        compare(ptrace::peek(tid, word_at).map_err(failed)?, bytes)
    }
}
