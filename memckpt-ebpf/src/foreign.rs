//! Accesses to the target by tasks that do not live in its mm, told when they let go of its lock.
//!
//! `/proc/PID/mem` and ptrace copy under the lock (__access_remote_vm(), mm/memory.c). process_vm_writev lets go of it
//! first (process_vm_rw_single_vec(), mm/process_vm_access.c), and so is noted as under way as well. That comes before
//! the record: whoever has read the record finds the note.

use aya_ebpf::{bindings::BPF_ANY, helpers::bpf_probe_read_user};
use memckpt_ebpf::{Control, Record, Writer, foreign, loss, source};

use crate::maps::{WRITERS, current_id, emit, lose};
use crate::nr;
use crate::regs::{self, Abi, Who};

/// The lock is let go of. `lock`: its number, 0 if it was taken for reading. `write`: it is let go of as a writer.
#[inline(always)]
pub fn released(control: *mut Control, task: *const u8, lock: u64, write: bool) {
    tell(control, task, lock, write, false);
}

/// It may be copying to the target's pages until its call is over.
#[inline(always)]
pub fn accesses(control: *mut Control, task: *const u8) {
    tell(control, task, 0, false, true);
}

/// `under_way`: whatever the call.
#[inline(always)]
fn tell(control: *mut Control, task: *const u8, lock: u64, write: bool, under_way: bool) {
    let mut flags = if lock != 0 { foreign::WRITE } else { 0 } | if write { 0 } else { foreign::READ };
    let regs = regs::saved();
    let call = match regs::who(task) {
        // Works for nobody in particular, and so writes nothing of anybody's.
        Who::Kernel => return,
        Who::Worker => {
            flags |= foreign::ODD;
            nr::IO_URING_ENTER
        }
        Who::Thread => match regs::number(task, regs) {
            (call, Abi::Native) => call,
            (call, Abi::Compat) => {
                flags |= foreign::ODD;
                nr::of_compat(call)
            }
            (call, Abi::X32) => {
                flags |= foreign::ODD;
                nr::of_x32(call)
            }
            // An exception of another process does not touch the target.
            (call, Abi::None) => call,
        },
    };
    if !nr::writes_to_others(call) && lock == 0 {
        return;
    }
    let mut record = Record {
        source: source::FOREIGN,
        call: call as u32,
        flags,
        args: regs::arguments(regs),
        lock,
        ..Record::default()
    };
    if under_way || call == nr::PROCESS_VM_WRITEV {
        if call == nr::PROCESS_VM_WRITEV && flags & foreign::ODD == 0 && record.args[4] == 1 {
            // SAFETY: the helper checks the caller's address.
            if let Ok(iovec) = unsafe { bpf_probe_read_user::<[u64; 2]>(record.args[3] as *const _) } {
                record.extra = iovec;
                record.flags |= foreign::IOVEC;
            }
        }
        let known = record.flags & foreign::IOVEC != 0;
        let [start, len] = if known { record.extra } else { [0, u64::MAX] };
        let writer = Writer { regs: regs as u64, call: regs::call(regs), start, len };
        if WRITERS.insert(&current_id(), &writer, BPF_ANY as u64).is_err() {
            lose(control, loss::WRITERS_FULL);
        }
    }
    emit(control, record);
}
