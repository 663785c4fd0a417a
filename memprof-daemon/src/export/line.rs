//! A stack as lines: one a function, inlined functions among them.

use std::{borrow::Cow, sync::Arc};

use crate::{
    address::FileOffset,
    process::{debug_info::hex, mapping::MappedFile},
    symbolize::frame::{Frame, FrameName, FunctionLine, UnknownReason},
};

/// One line of a stack.
#[derive(Clone, Copy, Debug)]
pub(crate) struct FrameLine<'a> {
    /// The frame it is of.
    pub(crate) frame: &'a Frame,
    /// The function, or why it has no name.
    pub(crate) function: Result<&'a FunctionLine, UnknownReason>,
    /// The compiler put it into the function of the next line.
    pub(crate) inlined: bool,
}

/// The lines of frames, leaf first.
pub(crate) fn lines(frames: &[Arc<Frame>]) -> impl DoubleEndedIterator<Item = FrameLine<'_>> {
    frames.iter().flat_map(|frame| frame_lines(frame))
}

/// The lines of one frame, leaf first: at least one.
pub(crate) fn frame_lines(frame: &Frame) -> impl DoubleEndedIterator<Item = FrameLine<'_>> {
    let (known, unknown) = match &frame.name {
        FrameName::Known(functions) => (functions.as_slice(), None),
        FrameName::Unknown(reason) => (&[][..], Some(*reason)),
    };
    let containing = known.len().saturating_sub(1);
    let known = known.iter().enumerate();
    let known = known.map(move |(place, function)| FrameLine {
        frame,
        function: Ok(function),
        inlined: place != containing,
    });
    let unknown = unknown.into_iter().map(move |reason| FrameLine {
        frame,
        function: Err(reason),
        inlined: false,
    });
    known.chain(unknown)
}

impl FrameLine<'_> {
    /// The function's name, or the best that can be said without one:
    /// `libc.so.6+0x1234`, `[anonymous 0x7f0012345678]`.
    pub(crate) fn label(&self) -> Cow<'_, str> {
        let reason = match self.function {
            Ok(function) => return Cow::Borrowed(&function.function),
            Err(reason) => reason,
        };
        let address = self.frame.address;
        match (self.frame.file_offset, reason) {
            (Some(FileOffset(offset)), _) => {
                let module = module_basename(self.frame).unwrap_or(Cow::Borrowed("[file]"));
                Cow::Owned(format!("{module}+{offset:#x}"))
            }
            (None, UnknownReason::NoStack) => Cow::Borrowed("[no stack]"),
            (None, UnknownReason::Unmapped) => Cow::Owned(format!("[unmapped {address}]")),
            (None, UnknownReason::Vdso) => Cow::Owned(format!("[vdso {address}]")),
            (None, _) => Cow::Owned(format!("[anonymous {address}]")),
        }
    }

    /// `file:line`, as far as known.
    pub(crate) fn source(&self) -> Option<String> {
        let function = self.function.ok()?;
        let file = function.file.as_deref()?;
        Some(match function.line {
            Some(line) => format!("{file}:{line}"),
            None => file.to_owned(),
        })
    }
}

/// The file that the frame is in.
pub(crate) fn mapped_file(frame: &Frame) -> Option<&MappedFile> {
    frame.mapping.as_ref()?.file.as_deref()
}

/// The path of the file that the frame is in, or the kernel's name for what it
/// is in instead.
pub(crate) fn module(frame: &Frame) -> Option<Cow<'_, str>> {
    let mapping = frame.mapping.as_ref()?;
    match &mapping.file {
        Some(file) => Some(file.path.to_string_lossy()),
        None if mapping.name.is_empty() => None,
        None => Some(Cow::Borrowed(&mapping.name)),
    }
}

/// The last part of [`module`].
pub(crate) fn module_basename(frame: &Frame) -> Option<Cow<'_, str>> {
    match mapped_file(frame).and_then(|file| file.path.file_name()) {
        Some(name) => Some(name.to_string_lossy()),
        None => module(frame),
    }
}

/// The build id of the file that the frame is in, in hexadecimal.
pub(crate) fn build_id(file: &MappedFile) -> Option<String> {
    file.build_id.as_deref().map(hex)
}
