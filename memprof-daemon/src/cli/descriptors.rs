//! How many descriptors this process may have open.

use nix::sys::resource::{Resource, getrlimit, setrlimit};

/// Takes as many as may be had: each process that is traced has two, and each probed file and
/// each probe some, where shells allow 1,024. Not for who starts programs, which would inherit
/// it, and may not expect more (`select`, loops that close all there could be).
pub(super) fn take_all() {
    let raised = getrlimit(Resource::RLIMIT_NOFILE).and_then(|(soft, hard)| {
        if soft < hard {
            setrlimit(Resource::RLIMIT_NOFILE, hard, hard)
        } else {
            Ok(())
        }
    });
    if let Err(error) = raised {
        tracing::warn!(%error, "cannot raise how many descriptors may be open");
    }
}
