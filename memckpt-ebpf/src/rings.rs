//! io_uring rings of the target, which take no mmap lock.

use aya_ebpf::macros::btf_tracepoint;
use aya_ebpf::programs::BtfTracePointContext;
use memckpt_ebpf::{Record, source};

use crate::maps::{control, current_mm, emit};
use crate::nr;

#[inline(always)]
fn told(call: u64) {
    let Some((control, mm)) = control() else { return };
    if current_mm() == mm {
        emit(control, Record { source: source::LOCKED, call: call as u32, ..Record::default() });
    }
}

/// io_uring_create(fd, context, entries, ...): a ring was made.
#[btf_tracepoint]
pub fn ring_made(_: BtfTracePointContext) -> i32 {
    told(nr::IO_URING_SETUP);
    0
}

/// io_uring_register(context, opcode, ...): something was registered, or could not be.
#[btf_tracepoint]
pub fn ring_registered(_: BtfTracePointContext) -> i32 {
    told(nr::IO_URING_REGISTER);
    0
}
