//! Finding the target's mm_struct: user space reads the target's pagemap, and the lock that this takes
//! tells the mm. It works for a target that never runs.

use core::ptr::read_volatile;

use aya_ebpf::{
    bindings::bpf_pidns_info,
    helpers::{bpf_probe_read_kernel, generated::bpf_get_ns_current_pid_tgid},
    macros::btf_tracepoint,
    programs::BtfTracePointContext,
};
use memckpt_ebpf::{Call, Control, config};

use crate::maps::{CONTROL, config, current_mm, load_u64, probe_u32};
use crate::regs;

/// mmap_lock_acquire_returned(mm, ...), attached for the moment of the capture: on kernels where nothing else hooks it.
#[btf_tracepoint]
pub fn capture(ctx: BtfTracePointContext) -> i32 {
    if let Some(control) = CONTROL.get_ptr_mut(0) {
        capture_mm(control, ctx.arg(0));
    }
    0
}

/// Whether the current thread is the one that captures.
#[inline(always)]
fn captures(control: *mut Control) -> bool {
    // SAFETY: the control page.
    unsafe {
        let tid = read_volatile(&raw const (*control).capture_tid);
        if tid == 0 {
            return false;
        }
        let mut who = bpf_pidns_info { pid: 0, tgid: 0 };
        let [dev, ino] = (*control).capture_ns;
        bpf_get_ns_current_pid_tgid(dev, ino, &raw mut who, size_of::<bpf_pidns_info>() as u32) == 0
            && who.pid as u64 == tid
    }
}

/// Looks at the registers that the thread which captures asks for; false if it does not.
#[inline(always)]
pub fn peek(control: *mut Control) -> bool {
    // SAFETY: the control page.
    unsafe {
        if !captures(control) {
            return false;
        }
        let at = read_volatile(&raw const (*control).peek_at);
        if at == 0 {
            return false;
        }
        (*control).peeked = match bpf_probe_read_kernel::<[u64; regs::WORDS]>(at as *const _) {
            Ok(regs) => regs::call_in(&regs),
            Err(_) => Call { number: u64::MAX, args: [u64::MAX; 6], result: u64::MAX },
        };
        true
    }
}

/// Notes `mm`, if the thread that captures is the one that locked it; or looks at the registers that it asks for.
#[inline(always)]
pub fn capture_mm(control: *mut Control, mm: *const u8) {
    if peek(control) || !captures(control) {
        return;
    }
    // SAFETY: the control page throughout; an mm_struct argument with offsets from BTF.
    unsafe {
        let own = mm as u64 == current_mm();
        if own != ((*control).capture_own != 0) {
            return;
        }
        (*control).captured_brk = load_u64(mm, config(config::MM_BRK));
        (*control).captured_flags = load_u64(mm, config(config::MM_FLAGS));
        if config(config::MM_OWNER) != config::ABSENT as usize {
            let owner = load_u64(mm, config(config::MM_OWNER));
            (*control).captured_tgid = probe_u32(owner, config(config::TASK_TGID)) as u64;
        }
        (*control).captured_mm = mm as u64;
    }
}
