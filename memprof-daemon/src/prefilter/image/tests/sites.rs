//! Breakpoints at an image's sites, and what they see there.

use std::{
    cell::RefCell,
    ops::Range,
    ptr,
    sync::{Once, RwLock},
};

use memprof_common::prefilter::{SITE_FRAME_OFFSET, SiteFrame, SiteKind};

use super::super::CodeImage;

/// What a site showed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Hit {
    pub(super) kind: SiteKind,
    pub(super) rdi: u64,
    pub(super) rbp: u64,
    /// Address of the frame.
    pub(super) frame_at: u64,
    /// At [`SiteKind::Alloc`] and [`SiteKind::Restore`].
    pub(super) frame: SiteFrame,
}

thread_local! {
    static HITS: RefCell<Vec<Hit>> = const { RefCell::new(Vec::new()) };
}
static SITES: RwLock<Vec<(u64, SiteKind)>> = RwLock::new(Vec::new());

/// What this thread has hit since it last asked.
pub(super) fn hits() -> Vec<Hit> {
    HITS.with_borrow_mut(std::mem::take)
}

/// The kinds of [`hits`].
pub(super) fn kinds() -> Vec<SiteKind> {
    hits().iter().map(|hit| hit.kind).collect()
}

/// Expects breakpoints at an image's sites; where they are to be written.
pub(super) fn watch(at: usize, image: &CodeImage) -> Vec<usize> {
    static HANDLER: Once = Once::new();
    HANDLER.call_once(|| super::signals::handle(libc::SIGTRAP, on_trap));
    let mut places = Vec::new();
    for &(kind, offset) in &image.sites {
        let site = at + offset as usize;
        assert_eq!(image.bytes[offset as usize], 0x90);
        SITES.write().unwrap().push((site as u64, kind));
        places.push(site);
    }
    places
}

/// The images in this range are no more.
pub(super) fn forget(range: Range<u64>) {
    let mut sites = SITES.write().unwrap();
    sites.retain(|(at, _)| !range.contains(at));
}

extern "C" fn on_trap(_: i32, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // SAFETY: the kernel has written both.
    let (code, registers) = unsafe {
        let context = &mut *context.cast::<libc::ucontext_t>();
        ((*info).si_code, &mut context.uc_mcontext.gregs)
    };
    // An `int3` is SI_KERNEL (arch/x86/kernel/traps.c). A step is TRAP_TRACE, and TRAP_BRKPT
    // where a hypervisor has lost what the processor said in DR6.
    if code != libc::SI_KERNEL {
        super::signals::on_step(registers);
        return;
    }
    let register = |index: i32| registers[index as usize].cast_unsigned();
    let site = register(libc::REG_RIP) - 1;
    let kind = SITES
        .read()
        .unwrap()
        .iter()
        .find_map(|&(at, kind)| (at == site).then_some(kind))
        .expect("a breakpoint of ours");
    let frame_at = register(libc::REG_RSP) + SITE_FRAME_OFFSET;
    let has_frame = matches!(kind, SiteKind::Alloc | SiteKind::Restore);
    let frame = if has_frame {
        // SAFETY: the stubs have a frame there at these sites.
        unsafe { *ptr::with_exposed_provenance::<SiteFrame>(frame_at as usize) }
    } else {
        SiteFrame::default()
    };
    HITS.with_borrow_mut(|hits| {
        hits.push(Hit {
            kind,
            rdi: register(libc::REG_RDI),
            rbp: register(libc::REG_RBP),
            frame_at,
            frame,
        });
    });
}
