//! What stands at the start of each code image: all that is needed to take it out of a
//! process again, if the daemon that has put it there is no more.

use std::ops::Range;

use super::{
    image::{ImageError, Patch},
    layout::Geometry,
    relocate::JUMP_BYTES,
};

const MAGIC: &[u8; 8] = b"MPPFimg1";
/// Raised with each change of the header or of what it describes.
const VERSION: u32 = 2;
/// Magic, version, patches, code and data ranges, shards, bucket bits.
const FIXED_BYTES: usize = 56;
/// Address, original bytes, jump; to a multiple of 8.
const PATCH_BYTES: usize = 24;
const LINE_BYTES: usize = 64;
/// No module has so many functions.
const MAX_PATCHES: usize = 64;

/// What an image says of itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ImageHeader {
    /// Where it is mapped.
    pub code: Range<u64>,
    /// The shared part and, behind it, the private one.
    pub data: Range<u64>,
    /// How large the tables are.
    pub geometry: Geometry,
    /// The jumps into it.
    pub patches: Vec<Patch>,
}

/// Length of the header with so many patches.
pub(super) const fn bytes(patches: usize) -> usize {
    (FIXED_BYTES + patches * PATCH_BYTES).next_multiple_of(LINE_BYTES)
}

impl ImageHeader {
    /// Writes it to the start of an image.
    pub(super) fn write(&self, image: &mut [u8]) -> Result<(), ImageError> {
        let too_many = ImageError::TooMany(self.patches.len());
        if self.patches.len() > MAX_PATCHES {
            return Err(too_many);
        }
        let mut header = Vec::with_capacity(bytes(self.patches.len()));
        header.extend_from_slice(MAGIC);
        header.extend_from_slice(&VERSION.to_le_bytes());
        header.extend_from_slice(&(self.patches.len() as u32).to_le_bytes());
        for address in [
            self.code.start,
            self.code.end,
            self.data.start,
            self.data.end,
        ] {
            header.extend_from_slice(&address.to_le_bytes());
        }
        header.extend_from_slice(&self.geometry.shards.to_le_bytes());
        header.extend_from_slice(&self.geometry.bucket_bits.to_le_bytes());
        for patch in &self.patches {
            header.extend_from_slice(&patch.address.to_le_bytes());
            header.extend_from_slice(&patch.original);
            header.extend_from_slice(&patch.jump);
            header.resize(header.len().next_multiple_of(8), 0);
        }
        match image.get_mut(..header.len()) {
            Some(place) => place.copy_from_slice(&header),
            None => return Err(too_many),
        }
        Ok(())
    }

    /// Reads it from the start of an image. What it says is not to be believed blindly:
    /// the target can write what it likes.
    pub(super) fn read(image: &[u8]) -> Result<Self, ImageError> {
        let mut rest = Reader(image);
        if rest.take::<8>()? != *MAGIC {
            return Err(ImageError::NotAnImage);
        }
        let version = rest.u32()?;
        if version != VERSION {
            return Err(ImageError::Version(version));
        }
        let count = rest.u32()? as usize;
        let code = rest.u64()?..rest.u64()?;
        let data = rest.u64()?..rest.u64()?;
        let geometry = Geometry {
            shards: rest.u32()?,
            bucket_bits: rest.u32()?,
        };
        let whole = |range: &Range<u64>| {
            range.start < range.end
                && range.start.is_multiple_of(4096)
                && range.end.is_multiple_of(4096)
        };
        if count > MAX_PATCHES || !whole(&code) || !whole(&data) || !geometry.is_valid() {
            return Err(ImageError::NotAnImage);
        }
        let mut patches = Vec::with_capacity(count);
        for _ in 0..count {
            let address = rest.u64()?;
            let [original, jump] = [rest.take::<JUMP_BYTES>()?, rest.take::<JUMP_BYTES>()?];
            rest.take::<{ PATCH_BYTES - 8 - 2 * JUMP_BYTES }>()?;
            patches.push(Patch {
                address,
                original,
                jump,
            });
        }
        Ok(Self {
            code,
            data,
            geometry,
            patches,
        })
    }
}

/// Takes bytes off the front.
struct Reader<'a>(&'a [u8]);

impl Reader<'_> {
    fn take<const N: usize>(&mut self) -> Result<[u8; N], ImageError> {
        let (taken, rest) = self
            .0
            .split_first_chunk::<N>()
            .ok_or(ImageError::NotAnImage)?;
        self.0 = rest;
        Ok(*taken)
    }

    fn u32(&mut self) -> Result<u32, ImageError> {
        self.take().map(u32::from_le_bytes)
    }

    fn u64(&mut self) -> Result<u64, ImageError> {
        self.take().map(u64::from_le_bytes)
    }
}
