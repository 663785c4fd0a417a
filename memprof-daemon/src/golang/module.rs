//! The runtime's record of its program's code, `runtime.firstmoduledata`, which has the
//! addresses that the function table is relative to.

use std::io;

use super::{
    GoError,
    layout::Layout,
    memory::{Blocks, Memory},
};

/// Words of `moduledata` that are used: up to `gofunc`.
const WORDS: usize = 44;

/// What of a segment is searched.
const MAX_SEARCHED: u64 = 512 << 20;
const CHUNK_BYTES: usize = 256 << 10;

/// Where code and its tables are in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Module {
    /// First instruction.
    pub(super) text: u64,
    /// End of the code.
    pub(super) text_end: u64,
    /// What offsets of function data are relative to.
    pub(super) gofunc: u64,
}

impl Module {
    /// Finds the record whose function table is at `pclntab`, in one of `ranges` of memory.
    ///
    /// A pointer to the table is the record's first word. None if there is none, as before the
    /// dynamic loader has relocated the program.
    ///
    /// # Errors
    ///
    /// The memory is gone.
    pub(super) fn find(
        memory: &dyn Memory,
        layout: Layout,
        pclntab: u64,
        ranges: impl IntoIterator<Item = (u64, u64)>,
    ) -> Result<Option<Self>, GoError> {
        // What the table's header says of its parts; the record has pointers to them.
        let mut blocks = Blocks::new(memory);
        let header = blocks.words(pclntab, 9).map_err(GoError::Memory)?;
        let names = header.get(4).copied().unwrap_or(0);
        let pieces = ranges.into_iter().flat_map(|(start, end)| {
            let end = end.min(start.saturating_add(MAX_SEARCHED));
            // Records are aligned to words.
            (start.next_multiple_of(8)..end)
                .step_by(CHUNK_BYTES)
                .map(move |at| (at, end))
        });
        let mut bytes = vec![0; CHUNK_BYTES];
        for (at, end) in pieces {
            let len = usize::try_from(end - at).unwrap_or(CHUNK_BYTES);
            let piece = bytes.get_mut(..len.min(CHUNK_BYTES)).unwrap_or_default();
            if memory.read(at, piece).is_err() {
                // Not mapped, or not any more: the record is elsewhere, or all is gone.
                continue;
            }
            let words = piece.as_chunks::<8>().0.iter().enumerate();
            for (place, word) in words {
                if u64::from_le_bytes(*word) == pclntab
                    && let Some(module) =
                        Self::at(&mut blocks, layout, at + place as u64 * 8, pclntab + names)
                {
                    return Ok(Some(module));
                }
            }
        }
        Ok(None)
    }

    fn at(blocks: &mut Blocks<'_>, layout: Layout, address: u64, names: u64) -> Option<Self> {
        let words: io::Result<Vec<u64>> = blocks.words(address, WORDS);
        let words = words.ok()?;
        let word = |at: usize| words.get(at).copied();
        let module = Self {
            text: word(22)?,
            text_end: word(23)?,
            gofunc: word(usize::try_from(layout.gofunc_word).ok()?)?,
        };
        let (first, last) = (word(20)?, word(21)?);
        let is_one = word(1)? == names
            && module.text <= first
            && first < last
            && last <= module.text_end
            && module.gofunc != 0;
        is_one.then_some(module)
    }
}
