//! For tests of the unwinder: sends what a walk saw.

use aya_ebpf::helpers::generated::bpf_probe_read_user;
use memprof_common::{
    limits::MAX_STACK_DEPTH,
    stack::StackRecord,
    stack_copy::{COPY_BYTES, COPY_STEP_BYTES, StackCopy},
};

use crate::{hit::Hit, maps::STACK_COPIES, stack::Start};

/// Not 0 if copies are wanted. A constant to the verifier, which drops the code behind
/// it.
#[unsafe(no_mangle)]
static COPY_STACKS: u8 = 0;

/// Sends the memory that the walk whose outcome is `record` has begun with. What finds
/// no room is not sent: there are enough others.
#[inline(always)]
pub(crate) fn send(start: &Start, hit: &Hit, record: &StackRecord) {
    // SAFETY: a valid static; volatile, since the loader changes it.
    if unsafe { (&raw const COPY_STACKS).read_volatile() } == 0 {
        return;
    }
    let Some(mut entry) = STACK_COPIES.reserve::<StackCopy>(0) else {
        return;
    };
    let copy: *mut StackCopy = entry.as_mut_ptr();
    // SAFETY: `copy` points to room for the whole record, of which every field up to
    // `copy` is written here.
    unsafe {
        (*copy).pid = hit.pid;
        (*copy).epoch = hit.epoch;
        (*copy).ip = start.ip;
        (*copy).sp = start.sp;
        (*copy).bp = start.bp;
        (*copy).end = record.end;
        (*copy).depth = record.depth;
        (*copy).reserved = 0;
        let mut index = 0;
        while index < MAX_STACK_DEPTH {
            (&raw mut (*copy).frames[index]).write_volatile(record.frames[index]);
            index += 1;
        }
        let sp = start.sp;
        let mut step = 0;
        while step < COPY_BYTES / COPY_STEP_BYTES {
            let done = step * COPY_STEP_BYTES;
            let failed = bpf_probe_read_user(
                (&raw mut (*copy).copy).cast::<u8>().add(done).cast(),
                COPY_STEP_BYTES as u32,
                (sp + done as u64) as *const _,
            );
            if failed != 0 {
                break;
            }
            step += 1;
        }
        (*copy).copy_bytes = (step * COPY_STEP_BYTES) as u32;
    }
    entry.submit(0);
}
