//! Frames as JSON. A profile of many stacks has few different frames: each is
//! written once, and copied from then on.

use std::{
    borrow::Cow,
    cell::RefCell,
    collections::{HashMap, hash_map::Entry},
    ptr,
    sync::Arc,
};

use serde::{
    Serialize, Serializer,
    ser::{Error as _, SerializeSeq as _},
};
use serde_json::value::{RawValue, to_raw_value};

use crate::{
    export::line::{FrameLine, build_id, frame_lines, mapped_file, module},
    symbolize::frame::Frame,
};

/// Frames that have been written, by where they are in memory: the profile holds
/// them there.
#[derive(Default)]
pub(super) struct Written<'a> {
    lines: RefCell<HashMap<*const Frame, Vec<Box<RawValue>>>>,
    profile: std::marker::PhantomData<&'a Frame>,
}

/// The frames of a stack.
pub(super) struct Frames<'a> {
    pub(super) frames: &'a [Arc<Frame>],
    pub(super) written: &'a Written<'a>,
}

impl Serialize for Frames<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut array = serializer.serialize_seq(None)?;
        let mut written = self.written.lines.borrow_mut();
        for frame in self.frames {
            let lines = match written.entry(ptr::from_ref(&**frame)) {
                Entry::Occupied(known) => known.into_mut(),
                Entry::Vacant(new) => new.insert(
                    frame_lines(frame)
                        .map(|line| to_raw_value(&FrameObject::from(line)))
                        .collect::<Result<_, _>>()
                        .map_err(S::Error::custom)?,
                ),
            };
            for line in lines {
                array.serialize_element(line)?;
            }
        }
        array.end()
    }
}

/// A frame that has a `function`, or one that says why it is `unknown`.
#[derive(Serialize)]
struct FrameObject<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    function: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    unknown: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    module: Option<Cow<'a, str>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    build_id: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    file_offset: Option<u64>,
    /// Only where there is no place in a file: two stacks must not read the
    /// same because their frames have no names.
    #[serde(skip_serializing_if = "Option::is_none")]
    address: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    file: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    line: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    inlined: Option<bool>,
}

impl<'a> From<FrameLine<'a>> for FrameObject<'a> {
    fn from(line: FrameLine<'a>) -> Self {
        let frame = line.frame;
        let known = line.function.ok();
        Self {
            function: known.map(|known| known.function.as_str()),
            unknown: line.function.err().map(|reason| reason.name()),
            module: module(frame),
            build_id: mapped_file(frame).and_then(build_id),
            file_offset: frame.file_offset.map(|offset| offset.0),
            address: (frame.file_offset.is_none() && frame.address.0 != 0)
                .then(|| frame.address.to_string()),
            file: known.and_then(|known| known.file.as_deref()),
            line: known.and_then(|known| known.line),
            inlined: known.map(|_| line.inlined),
        }
    }
}
