//! Threads of our own, of which there may be one too many: a limit of processes counts threads (RLIMIT_NPROC, pids.max).

use std::thread::{Builder, Scope, ScopedJoinHandle};

use super::SyscallError;

/// Runs `work` on a new thread called `name`.
///
/// # Errors
/// clone(2) fails.
pub fn spawn<'scope, T: Send + 'scope>(
    scope: &'scope Scope<'scope, '_>,
    name: &str,
    work: impl FnOnce() -> T + Send + 'scope,
) -> Result<ScopedJoinHandle<'scope, T>, SyscallError> {
    let thread = Builder::new().name(name.to_owned()).spawn_scoped(scope, work);
    thread.map_err(|e| {
        SyscallError::new(
            "clone",
            format!("thread {name} of memckpt (a limit may forbid it: ulimit -u, pids.max)"),
            e,
        )
    })
}

/// What the thread's work gave, when it is done.
///
/// # Panics
/// Goes on with a panic of the work.
pub fn join<T>(thread: ScopedJoinHandle<'_, T>) -> T {
    thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}

/// Runs `work` on a thread of its own and waits for it.
///
/// # Errors
/// Those of `work`; clone(2) fails.
pub fn alone<T: Send, E: From<SyscallError> + Send>(
    name: &str,
    work: impl FnOnce() -> Result<T, E> + Send,
) -> Result<T, E> {
    std::thread::scope(|scope| join(spawn(scope, name, work)?))
}
