//! The code that memckpt runs inside a target: freestanding, position-independent, without libc, allocation or panics.
//!
//! It is linked alone, so anything that it does not define itself (a panic, a libcore function that was not inlined)
//! fails the build. It lives in a segment that memckpt filled, listens for commands there, and goes home by itself
//! when memckpt dies: it is never killed half-way, a tracee whose tracer dies runs on.

#![no_std]
#![allow(missing_docs)]

mod entry;
mod home;
mod layout;
mod system;

use core::sync::atomic::Ordering::{Acquire, Release};

use layout::{CALL_MAX, CALLS, Call, IOVECS, IoVec, PARAMETERS, PIPE_MAX, Parameters, STATE_READY, UNDO, UNDO_MAX, op};
use system::{
    EINVAL, FUTEX_WAIT, FUTEX_WAKE, O_CLOEXEC, SPLICE_F_NONBLOCK, UFFD_USER_MODE_ONLY, block_signals, nr, syscall,
};

const FUTEX_TID_MASK: u32 = 0x3fff_ffff;
const FUTEX_OWNER_DIED: u32 = 0x4000_0000;
const IPC_RMID: u64 = 0;
const MADV_DONTFORK: u64 = 10;

/// Called by the entry code, on the parasite's own stack, the extended state saved.
#[unsafe(no_mangle)]
extern "C" fn parasite_main(base: *mut u8) -> ! {
    // SAFETY: the segment starts at `base` and memckpt has filled the parameters; no reference outlives a command.
    unsafe {
        let p = base.add(PARAMETERS).cast::<Parameters>();
        block_signals();
        home::seal_extended_state(base, p);
        // From here the segment lives as long as somebody has it attached.
        (*p).rmid_result = syscall(nr::SHMCTL, [(*p).shmid as u64, IPC_RMID, 0, 0, 0, 0]);
        syscall(nr::MADVISE, [(*p).address, (*p).length, MADV_DONTFORK, 0, 0, 0]);
        announce(p, STATE_READY);
        let mut done = 0;
        loop {
            let lock = (*p).lock.load(Acquire);
            if lock & FUTEX_TID_MASK == 0 || lock & FUTEX_OWNER_DIED != 0 {
                break;
            }
            let command = (*p).command.load(Acquire);
            if command == done {
                // The lock does not change with a command: memckpt repeats its wake until the state answers.
                syscall(nr::FUTEX, [(&raw const (*p).lock) as u64, FUTEX_WAIT, u64::from(lock), 0, 0, 0]);
                continue;
            }
            (*p).result = run(base, p, command & 0xff);
            done = command;
            announce(p, done);
        }
        close_all(base, p);
        home::build_frame(base, p, false);
        home::leave(p)
    }
}

unsafe fn announce(p: *mut Parameters, state: u32) {
    // SAFETY: as in `parasite_main`.
    unsafe {
        (*p).state.store(state, Release);
        syscall(nr::FUTEX, [(&raw const (*p).state) as u64, FUTEX_WAKE, 1, 0, 0, 0]);
    }
}

unsafe fn run(base: *mut u8, p: *mut Parameters, operation: u32) -> i64 {
    // SAFETY: as in `parasite_main`.
    unsafe {
        match operation {
            op::PIPES => make_pipes(p),
            op::SPLICE => splice(base, p),
            op::USERFAULTFD => {
                let fd = syscall(nr::USERFAULTFD, [O_CLOEXEC | UFFD_USER_MODE_ONLY, 0, 0, 0, 0, 0]);
                if fd >= 0 {
                    (*p).userfaultfd = fd as i32;
                }
                fd
            }
            op::CLOSE => {
                close_all(base, p);
                0
            }
            op::UNMAP => syscall(nr::MUNMAP, [(*p).unmap.base, (*p).unmap.len, 0, 0, 0, 0]),
            op::HOME => {
                close_all(base, p);
                home::build_frame(base, p, true);
                0
            }
            op::CALLS => make_calls(base.add(CALLS).cast(), (*p).call_count as usize, CALL_MAX),
            _ => -EINVAL,
        }
    }
}

unsafe fn make_calls(list: *mut Call, count: usize, most: usize) -> i64 {
    // SAFETY: as in `parasite_main`; the index stays below the list's length. What the calls do is memckpt's business.
    unsafe {
        let mut at = 0;
        while at < count && at < most {
            let call = list.add(at);
            (*call).result = syscall((*call).number, (*call).args);
            at += 1;
        }
        at as i64
    }
}

unsafe fn make_pipes(p: *mut Parameters) -> i64 {
    // SAFETY: as in `parasite_main`; `slot` is in bounds.
    unsafe {
        let mut made = 0;
        while made < (*p).pipe_count as usize && made < PIPE_MAX {
            let slot = (&raw mut (*p).pipes).cast::<layout::Pipe>().add(made);
            // pipe2 writes both descriptors: read end first, as `Pipe` has them.
            let rc = syscall(nr::PIPE2, [slot as u64, O_CLOEXEC, 0, 0, 0, 0]);
            if rc < 0 {
                return if made == 0 { rc } else { made as i64 };
            }
            made += 1;
        }
        made as i64
    }
}

unsafe fn splice(base: *mut u8, p: *mut Parameters) -> i64 {
    // SAFETY: as in `parasite_main`; indices are checked against the bounds of the arrays.
    unsafe {
        let iovecs = base.add(IOVECS).cast::<IoVec>();
        let first = (*p).batch_first as usize;
        let mut at = first;
        while at < first + (*p).batch_len as usize && at < PIPE_MAX {
            let slot = (&raw mut (*p).pipes).cast::<layout::Pipe>().add(at);
            let list = iovecs.add((*slot).first as usize) as u64;
            let fd = (*slot).write_end as u64;
            let rc = syscall(nr::VMSPLICE, [fd, list, u64::from((*slot).count), SPLICE_F_NONBLOCK, 0, 0]);
            (*slot).spliced = rc;
            at += 1;
            // A gap would break the order of the bytes.
            if rc < 0 || (rc as u64) < (*slot).wanted {
                break;
            }
        }
        (at - first) as i64
    }
}

unsafe fn close_all(base: *mut u8, p: *mut Parameters) {
    // SAFETY: as in `parasite_main`; `slot` is in bounds.
    unsafe {
        make_calls(base.add(UNDO).cast(), (*p).undo_count as usize, UNDO_MAX);
        (*p).undo_count = 0;
        let mut at = 0;
        while at < PIPE_MAX {
            let slot = (&raw mut (*p).pipes).cast::<layout::Pipe>().add(at);
            close(&raw mut (*slot).read_end);
            close(&raw mut (*slot).write_end);
            at += 1;
        }
        close(&raw mut (*p).userfaultfd);
    }
}

unsafe fn close(fd: *mut i32) {
    // SAFETY: `fd` points into the parameters.
    unsafe {
        if *fd >= 0 {
            syscall(nr::CLOSE, [*fd as u64, 0, 0, 0, 0, 0]);
            *fd = -1;
        }
    }
}
