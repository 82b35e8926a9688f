//! Threads of our own, of which there may be one too many: a limit of processes counts threads (RLIMIT_NPROC, pids.max).

use std::num::NonZero;
use std::sync::atomic::{AtomicUsize, Ordering};
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

/// How many neighbours one processor takes: of two that write to the same huge page each waits for the other.
const FEW: usize = 8;

/// Does `work` with each of `items` on all processors, each of which takes the next few and has a buffer of its own; what it gave, in the
/// order of `items`. Threads that cannot be had are done without.
///
/// # Errors
/// One of those of `work`, if there are any; what has not begun then is left.
pub fn each<T: Sync, R: Send, E: Send>(
    name: &str,
    items: &[T],
    work: impl Fn(&mut Vec<u8>, &T) -> Result<R, E> + Sync,
) -> Result<Vec<R>, E> {
    let next = AtomicUsize::new(0);
    let some = || {
        let mut buffer = Vec::new();
        let mut done = Vec::new();
        loop {
            let at = next.fetch_add(FEW, Ordering::Relaxed);
            let few = items.iter().enumerate().skip(at).take(FEW);
            if few.len() == 0 {
                return Ok(done);
            }
            for (at, item) in few {
                match work(&mut buffer, item) {
                    Ok(result) => done.push((at, result)),
                    Err(error) => {
                        next.store(items.len(), Ordering::Relaxed);
                        return Err(error);
                    }
                }
            }
        }
    };
    let processors = std::thread::available_parallelism().map_or(1, NonZero::get).min(items.len());
    let mut done = std::thread::scope(|scope| {
        let others: Vec<_> = (1..processors).filter_map(|_| spawn(scope, name, some).ok()).collect();
        let mut done = some()?;
        for other in others {
            done.extend(join(other)?);
        }
        Ok(done)
    })?;
    done.sort_unstable_by_key(|(at, _)| *at);
    Ok(done.into_iter().map(|(_, result)| result).collect())
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn each_has_its_turn_and_its_place() {
        let items: Vec<u32> = (0..1000).collect();
        let doubled = each("test", &items, |_, item| Ok::<_, ()>(item * 2));
        assert_eq!(doubled, Ok((0..1000).map(|item| item * 2).collect()));
        assert_eq!(each("test", &[0; 0], |_, _| Err::<(), _>("called")), Ok(Vec::new()));
    }

    #[test]
    fn an_error_is_given_and_ends_the_others() {
        let done = AtomicUsize::new(0);
        let items = vec![(); 100_000];
        let result = each("test", &items, |_, ()| match done.fetch_add(1, Ordering::Relaxed) {
            10 => Err("ten"),
            // All of them would take a minute.
            n if n > 10 => {
                std::thread::sleep(Duration::from_millis(1));
                Ok(())
            }
            _ => Ok(()),
        });
        assert_eq!(result, Err("ten"));
        assert!(done.into_inner() < items.len());
    }
}
