//! The way home without memckpt: a signal frame outside the segment, then munmap and rt_sigreturn.

use crate::entry::{leave_by, restart};
use crate::layout::{FP_XSTATE_MAGIC2, Frame, Parameters, SW_RESERVED, SW_RESERVED_LEN, XSAVE, sw_reserved};
use crate::system::{EINTR, block_signals, copy, nr, set_signal_mask, syscall, zero};

const SA_RESTART: u64 = 0x1000_0000;
/// Results that a tracer sees in an interrupted call (include/linux/errno.h).
const ERESTARTSYS: i64 = -512;
const ERESTARTNOHAND: i64 = -514;

/// Makes what the entry code saved acceptable to rt_sigreturn.
///
/// # Safety
/// `base` is the segment and `p` its parameters.
pub(crate) unsafe fn seal_extended_state(base: *mut u8, p: *const Parameters) {
    // SAFETY: the area and the word behind it lie in the segment.
    unsafe {
        let area = base.add(XSAVE);
        let sw = area.add(SW_RESERVED);
        let len = (*p).xsave_len;
        zero(sw, SW_RESERVED_LEN);
        sw.cast::<[u32; 5]>().write(sw_reserved((*p).xfeatures, len));
        area.add(len as usize).cast::<u32>().write_unaligned(FP_XSTATE_MAGIC2);
    }
}

/// Writes the frame. With `taken_over` memckpt is about to put the registers back itself, and the frame is used only
/// if it dies just then; without, this finishes a call that only restart_syscall can finish.
///
/// # Safety
/// As `seal_extended_state`; the frame's place is writable memory that nobody uses.
pub(crate) unsafe fn build_frame(base: *mut u8, p: *mut Parameters, taken_over: bool) {
    // SAFETY: memckpt has checked the place; `frame` is 8-byte aligned and apart from the segment.
    unsafe {
        let (mut ip, mut ax) = ((*p).registers.ip, (*p).registers.ax);
        if (*p).restart_block != 0 {
            ax = -EINTR as u64;
            if !taken_over {
                set_signal_mask((*p).signal_mask);
                restart();
                block_signals();
                ax = (*p).restart_result as u64;
            }
        } else if (*p).restart_ip != 0 {
            if interrupted(p) {
                ax = -EINTR as u64;
            } else {
                ip = (*p).restart_ip;
                ax = (*p).registers.orig_ax;
            }
        }
        copy((*p).frame_xsave as *mut u8, base.add(XSAVE), (*p).xsave_len as usize + 4);
        let mut registers = (*p).registers;
        (registers.ip, registers.ax) = (ip, ax);
        let frame = Frame::bringing(&registers, (*p).sigreturn_gadget, (*p).frame_xsave, (*p).signal_mask);
        ((*p).frame as *mut Frame).write(frame);
    }
}

/// Whether the kernel would let the interrupted call fail with EINTR: a handler is due and does not want a restart.
unsafe fn interrupted(p: *const Parameters) -> bool {
    // SAFETY: the kernel writes eight and 32 bytes to what it is given.
    unsafe {
        let mut pending = 0u64;
        syscall(nr::RT_SIGPENDING, [(&raw mut pending) as u64, 8, 0, 0, 0, 0]);
        pending &= !(*p).signal_mask;
        let why = (*p).registers.ax as i64;
        while pending != 0 {
            let signal = u64::from(pending.trailing_zeros()) + 1;
            pending &= pending - 1;
            // handler, flags, restorer, mask
            let mut action = [0u64; 4];
            let rc = syscall(nr::RT_SIGACTION, [signal, 0, (&raw mut action) as u64, 8, 0, 0]);
            if rc < 0 || action[0] < 2 {
                continue;
            }
            // The lowest number comes first, near enough.
            return why == ERESTARTNOHAND || (why == ERESTARTSYS && action[1] & SA_RESTART == 0);
        }
        false
    }
}

/// Goes.
///
/// # Safety
/// The frame has been built.
pub(crate) unsafe fn leave(p: *const Parameters) -> ! {
    // SAFETY: the caller's promise.
    unsafe { leave_by((*p).address, (*p).length, (*p).syscall_gadget, (*p).frame) }
}
