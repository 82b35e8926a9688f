//! A process held still: find all threads, seize, infect, call, cure.
//!
//! Whatever happens to memckpt, the target runs on as if it had seen SIGSTOP and SIGCONT: docs on [`Frozen`] and
//! [`Infected`] say how. ptrace binds a tracee to the *thread* that seized it: run a whole checkpoint in
//! [`on_tracer_thread`], and its end, however it comes about, releases everything.

mod adopt;
mod blob;
mod calls;
mod chain;
mod commit;
mod cure;
mod freeze;
mod gadgets;
mod grab;
mod infected;
mod injection;
mod proc;
mod registers;
mod robust;
mod seccomp;
mod segment;
mod stack;
mod stops;
mod tree;

use crate::kernel::{SyscallError, own_thread};

pub(crate) use blob::Call;
pub use calls::{Answers, Arg, Buffer, Calls, Nth};
pub use commit::InfectError;
pub use cure::CureError;
pub use freeze::{FreezeError, Frozen};
pub use grab::GrabError;
pub use infected::{CommandError, Infected};
pub use injection::{InfectRefusal, Injection};
pub use registers::ThreadRegisters;
pub use segment::sweep;
pub use tree::{FrozenTree, Zombie, children, descendants};

/// Runs `work` on a thread of its own and waits for it. When that thread ends, whatever it still traces is released by
/// the kernel, also a thread that did not stop in time and so cannot be detached from.
///
/// # Errors
/// Those of `work`; there may be no other thread (clone(2)).
pub fn on_tracer_thread<T: Send, E: From<SyscallError> + Send>(
    work: impl FnOnce() -> Result<T, E> + Send,
) -> Result<T, E> {
    own_thread::alone("tracer", work)
}
