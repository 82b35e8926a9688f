//! Threads in the parasite of a memckpt that was killed.
//!
//! Such a parasite goes home at once, but for one case: an interrupted sleep that only restart_syscall can continue has
//! to be finished first, inside. Whoever freezes the process next puts the thread back where it was, restart block and
//! all, and has the segment unmapped at the next infection.

use std::mem::{MaybeUninit, offset_of};

use super::blob::{MAGIC, PARAMETERS, Parameters, SEGMENT_LEN, SW_RESERVED, XSAVE, XSAVE_LEN};
use super::injection::PLACES;
use super::proc;
use super::registers::Interrupted;
use crate::addr::{Addr, PAGE_SIZE};
use crate::kernel::SyscallError;
use crate::kernel::maps::Vma;
use crate::kernel::ptrace;

/// What a stopped thread has to do with a parasite.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Adopted {
    /// Nothing.
    NotOurs,
    /// It sat in one, and no longer does.
    PutBack,
    /// It is leaving one.
    OnItsWay,
}

/// Puts a stopped thread back that sits in an abandoned parasite.
pub(super) fn thread(pid: i32, tid: i32, regs: &libc::user_regs_struct) -> Result<Adopted, SyscallError> {
    // Without a look at the target's memory for any other thread: that could bring pages in.
    if !PLACES.contains(Addr(regs.rip)) {
        return Ok(Adopted::NotOurs);
    }
    let base = regs.rip & !(PAGE_SIZE - 1);
    let mut magic = [0; 8];
    let read = proc::read_memory(pid, base.wrapping_add(PARAMETERS as u64), &mut magic);
    if read.ok() != Some(magic.len()) || u64::from_le_bytes(magic) != MAGIC {
        return Ok(Adopted::NotOurs);
    }
    let sleeps =
        regs.orig_rax == libc::SYS_restart_syscall as u64 && Interrupted::of(regs) == Interrupted::Block;
    let Some(p) = parameters(pid, base).filter(|p| p.address == base && sleeps) else {
        return Ok(Adopted::OnItsWay);
    };
    let mut state = vec![0; (p.xsave_len as usize).min(XSAVE_LEN)];
    if proc::read_memory(pid, base + XSAVE as u64, &mut state).ok() != Some(state.len()) {
        return Ok(Adopted::OnItsWay);
    }
    let mut xstate = ptrace::extended_state(tid)?;
    // What software keeps in the area is the kernel's, not the thread's.
    let kept = SW_RESERVED..SW_RESERVED + 48;
    for (at, (to, from)) in xstate.iter_mut().zip(state).enumerate() {
        if !kept.contains(&at) {
            *to = from;
        }
    }
    ptrace::set_extended_state(tid, &xstate)?;
    ptrace::set_signal_mask(tid, p.signal_mask)?;
    ptrace::set_registers(tid, &(&p.registers).into())?;
    let flag = base + (PARAMETERS + offset_of!(Parameters, adopted)) as u64;
    if let Err(error) = proc::write_memory(pid, flag, &1u32.to_ne_bytes()) {
        tracing::debug!(tid, %error, "an abandoned parasite stays mapped");
    }
    Ok(Adopted::PutBack)
}

/// The segments of killed memckpts among the mappings.
pub(super) fn leftovers(pid: i32, maps: &[Vma]) -> Vec<u64> {
    let ours = |vma: &&Vma| vma.range.len() == SEGMENT_LEN as u64 && vma.name.starts_with("/SYSV00000000");
    let starts = maps.iter().filter(ours).map(|vma| vma.range.start.get());
    starts.filter(|&start| parameters(pid, start).is_some_and(|p| p.address == start)).collect()
}

/// Whether the thread of an abandoned segment was put back.
pub(super) fn is_left_alone(pid: i32, address: u64) -> bool {
    parameters(pid, address).is_some_and(|p| p.address == address && p.adopted != 0)
}

/// The parameters of the segment at `base`. Nobody else uses it: we could not have seized its thread.
fn parameters(pid: i32, base: u64) -> Option<Parameters> {
    let mut bytes = [0; size_of::<Parameters>()];
    let read = proc::read_memory(pid, base.checked_add(PARAMETERS as u64)?, &mut bytes).ok()?;
    let mut p = MaybeUninit::<Parameters>::uninit();
    // SAFETY: exactly as many bytes as a Parameters has, all of whose fields are integers.
    let p = unsafe {
        p.as_mut_ptr().cast::<u8>().copy_from_nonoverlapping(bytes.as_ptr(), bytes.len());
        p.assume_init()
    };
    (read == bytes.len() && p.magic == MAGIC).then_some(p)
}
