//! Frames for a Go program's stacks.
//!
//! Go keeps a stack with one address for each function, also for those that were inlined: the
//! address behind such a call is that of an instruction in the function it was inlined into.
//! Here each run of them is one frame again, as everywhere else.

use std::{
    collections::HashMap,
    sync::{Arc, PoisonError},
};

use super::{
    GoError, GoSource,
    memory::Blocks,
    pclntab::{FunctionTable, Place},
    walk::Bucket,
};
use crate::{
    address::{AbsAddr, FileOffset},
    process::mapping::MappingLookup,
    symbolize::frame::{Frame, FrameName, FunctionLine},
};

/// What instructions belong to, of those that were asked for.
pub(super) type Places = HashMap<u64, Option<Arc<Place>>>;

/// A frame of a stack.
#[derive(Clone, Debug)]
pub(crate) enum Named {
    /// Go code.
    Frame(Arc<Frame>),
    /// A return address in other code, such as a C library's or a plugin's.
    Other(AbsAddr),
}

/// A stack with its names.
#[derive(Clone, Debug)]
pub(crate) struct NamedStack {
    /// Leaf first.
    pub(crate) frames: Vec<Named>,
    /// It has as many frames as Go keeps, and goes on beyond them.
    pub(crate) is_cut: bool,
}

impl NamedStack {
    /// A stack whose names cannot be had from the program's tables.
    pub(crate) fn unnamed(bucket: &Bucket) -> Self {
        let frames = bucket
            .stack
            .iter()
            .map(|&address| Named::Other(AbsAddr(address)));
        Self {
            frames: frames.collect(),
            is_cut: false,
        }
    }

    /// Return addresses in other code.
    pub(crate) fn others(&self) -> impl Iterator<Item = AbsAddr> {
        self.frames.iter().filter_map(|frame| match frame {
            Named::Frame(_) => None,
            Named::Other(address) => Some(*address),
        })
    }
}

/// Where every goroutine's stack ends.
const ROOT: &str = "runtime.goexit";

impl GoSource {
    /// Names the stacks of buckets. The runtime's own frames at the leaf end are left out, as
    /// Go does it: who asks for a slice did not ask for `runtime.makeslice`.
    ///
    /// # Errors
    ///
    /// The program's file cannot be read, or its function table makes no sense.
    pub(crate) fn names(
        &self,
        buckets: &[Arc<Bucket>],
        mappings: &dyn MappingLookup,
    ) -> Result<Vec<NamedStack>, GoError> {
        let program = self.program();
        let module = self
            .module()
            .ok_or(GoError::FunctionTable("it is not known where its code is"))?;
        let mut namer = Namer {
            table: FunctionTable::new(
                Blocks::new(&program.image),
                program.layout,
                module,
                program.function_table,
            )?,
            places: program
                .places
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .clone(),
            frames: HashMap::new(),
            mappings,
            usual_stack: program.layout.usual_stack,
        };
        let named = buckets.iter().map(|bucket| namer.stack(&bucket.stack));
        let named = named.collect();
        *program
            .places
            .lock()
            .unwrap_or_else(PoisonError::into_inner) = namer.places;
        Ok(named)
    }
}

struct Namer<'a> {
    table: FunctionTable<'a>,
    places: Places,
    /// By the address of the leaf, and the number of functions.
    frames: HashMap<(u64, usize), Arc<Frame>>,
    mappings: &'a dyn MappingLookup,
    usual_stack: usize,
}

impl Namer<'_> {
    /// What a return address belongs to.
    fn place(&mut self, address: u64) -> Option<Arc<Place>> {
        let call = address.wrapping_sub(1);
        if let Some(known) = self.places.get(&call) {
            return known.clone();
        }
        // What the file says wrong of one place it may say right of another.
        let place = self.table.place(call).ok().flatten().map(Arc::new);
        self.places.insert(call, place.clone());
        place
    }

    /// Whether a return address is in code of the runtime. Go asks for the place itself, not
    /// for the call before it, and so does this: what Go leaves out is left out here.
    fn is_runtimes(&mut self, address: u64) -> bool {
        self.place(address.wrapping_add(1))
            .is_some_and(|place| is_runtime(&place.function))
    }

    fn stack(&mut self, stack: &[u64]) -> NamedStack {
        let places: Vec<_> = stack.iter().map(|&address| self.place(address)).collect();
        let is_root =
            |place: &Option<Arc<Place>>| place.as_ref().is_some_and(|place| place.function == ROOT);
        let has_root = places.last().is_some_and(is_root);
        let first = stack
            .iter()
            .position(|&address| !self.is_runtimes(address))
            .unwrap_or(0);
        // Unless there is nothing else.
        let end = places.len() - usize::from(has_root && places.len() > first + 1);

        let mut frames = Vec::new();
        let mut at = first;
        while at < end {
            let (Some(&address), Some(place)) = (stack.get(at), places.get(at)) else {
                break;
            };
            at += 1;
            let Some(place) = place else {
                frames.push(Named::Other(AbsAddr(address)));
                continue;
            };
            let mut lines = vec![line(place)];
            let mut caller = place.caller;
            while let Some(call) = caller {
                let behind = call.wrapping_add(1);
                let next = match places.get(at) {
                    Some(next) if stack.get(at) == Some(&behind) => {
                        at += 1;
                        next.clone()
                    }
                    // Go leaves wrappers out, so that another function follows.
                    Some(_) => None,
                    None => self.place(behind),
                };
                let Some(next) = next else { break };
                lines.push(line(&next));
                // A chain is as long as functions were inlined into each other.
                caller = next
                    .caller
                    .filter(|next| *next != call && lines.len() < 256);
            }
            frames.push(Named::Frame(self.frame(address, lines)));
        }
        NamedStack {
            frames,
            is_cut: !has_root && stack.len() >= self.usual_stack,
        }
    }

    fn frame(&mut self, address: u64, lines: Vec<FunctionLine>) -> Arc<Frame> {
        let mappings = self.mappings;
        let known = self.frames.entry((address, lines.len()));
        let frame = known.or_insert_with(|| {
            let address = AbsAddr(address.wrapping_sub(1));
            let mapping = mappings.lookup(address);
            let file_offset = mapping.as_ref().and_then(|mapping| {
                let within = address.0.checked_sub(mapping.start.0)?;
                mapping.file_offset.0.checked_add(within).map(FileOffset)
            });
            Arc::new(Frame {
                address,
                mapping,
                file_offset,
                name: FrameName::Known(lines),
            })
        });
        Arc::clone(frame)
    }
}

fn line(place: &Place) -> FunctionLine {
    FunctionLine {
        function: place.function.clone(),
        file: place.file.clone(),
        line: place.line,
    }
}

/// Whether a function is the runtime's own (`writeHeapProto` in
/// `src/runtime/pprof/protomem.go`).
fn is_runtime(function: &str) -> bool {
    function.starts_with("runtime.") || function.starts_with("internal/runtime/")
}
