//! Stopping a process and all its descendants.
//!
//! ```text
//! memckpt                           a process of the tree
//! freeze what is known
//! list the children: none new       forks, and is then stopped
//! ```
//!
//! So the list is made again after everything known stands, until there is nothing new on it: who stands cannot fork, and a
//! child that was there before is on its parent's list until it has ended and been waited for.

use std::io;
use std::time::{Duration, Instant};

use super::freeze::{FreezeError, Frozen};
use super::proc;
use crate::kernel::status::{self, Stat};

/// A process and its descendants, all threads of which stand still. As with [`Frozen`], dropping it lets them go.
#[derive(Debug)]
pub struct FrozenTree {
    processes: Vec<Frozen>,
    zombies: Vec<Zombie>,
}

/// A descendant that has ended, and whose parent has not taken notice yet.
#[derive(Clone, Debug)]
pub struct Zombie {
    /// Its process ID.
    pub pid: i32,
    /// What `/proc/PID/stat` keeps of it.
    pub stat: Stat,
}

impl FrozenTree {
    /// Stops `root` and whatever descends from it, within `timeout` in all.
    ///
    /// # Errors
    /// See [`FreezeError`]; everything runs again.
    pub fn freeze(root: i32, timeout: Duration) -> Result<Self, FreezeError> {
        let deadline = Instant::now() + timeout;
        let mut tree = Self { processes: vec![Frozen::freeze(root, timeout)?], zombies: Vec::new() };
        while tree.freeze_new_children(deadline)? {
            if Instant::now() >= deadline {
                let reason = "it creates processes faster than they can be stopped".to_owned();
                return Err(FreezeError::Timeout { pid: root, tid: root, timeout, reason });
            }
        }
        Ok(tree)
    }

    /// The processes, parents before their children; the root first.
    #[must_use]
    pub fn processes(&self) -> &[Frozen] {
        &self.processes
    }

    /// The same, to be worked on.
    pub fn processes_mut(&mut self) -> &mut [Frozen] {
        &mut self.processes
    }

    /// Descendants that have ended.
    #[must_use]
    pub fn zombies(&self) -> &[Zombie] {
        &self.zombies
    }

    /// Takes it apart; each process is let go when its part is dropped.
    #[must_use]
    pub fn into_processes(self) -> Vec<Frozen> {
        self.processes
    }

    /// Whether there was anything new.
    fn freeze_new_children(&mut self, deadline: Instant) -> Result<bool, FreezeError> {
        let mut new = Vec::new();
        let mut zombies = Vec::new();
        for pid in self.processes.iter().map(Frozen::pid) {
            for child in children(pid)? {
                let Ok(stat) = status::stat(child) else { continue };
                if matches!(stat.state, 'Z' | 'X' | 'x') {
                    zombies.push(Zombie { pid: child, stat });
                } else if self.processes.iter().all(|known| known.pid() != child) {
                    new.push(child);
                }
            }
        }
        let any = !new.is_empty();
        for child in new {
            match Frozen::freeze(child, deadline.saturating_duration_since(Instant::now())) {
                Ok(frozen) => self.processes.push(frozen),
                // It ended meanwhile, and is a zombie at the next look, or nobody's.
                Err(FreezeError::Gone { .. }) => {}
                Err(error) => return Err(error),
            }
        }
        self.zombies = zombies;
        Ok(any)
    }
}

/// The children of all threads of a process.
///
/// # Errors
/// The process is gone, or the kernel has no `/proc/PID/task/TID/children` (CONFIG_PROC_CHILDREN).
pub fn children(pid: i32) -> Result<Vec<i32>, FreezeError> {
    let failed = |source: io::Error| match source.raw_os_error() {
        Some(libc::ENOENT | libc::ESRCH) => FreezeError::Gone { pid },
        _ => FreezeError::Threads { pid, source },
    };
    let mut children = Vec::new();
    for tid in proc::threads(pid).map_err(failed)? {
        match std::fs::read_to_string(format!("/proc/{pid}/task/{tid}/children")) {
            Ok(text) => children.extend(text.split_ascii_whitespace().filter_map(|c| c.parse::<i32>().ok())),
            // The thread has ended: its children are another's now.
            Err(e) if matches!(e.raw_os_error(), Some(libc::ENOENT | libc::ESRCH)) => {}
            Err(source) => return Err(FreezeError::Threads { pid, source }),
        }
    }
    children.sort_unstable();
    Ok(children)
}

/// A process and its descendants at this moment, parents first; they run on, so the list is a guess. Without those that have ended.
///
/// # Errors
/// As [`children`], of `root`.
pub fn descendants(root: i32) -> Result<Vec<i32>, FreezeError> {
    let mut all = vec![root];
    let mut at = 0;
    while let Some(&pid) = all.get(at) {
        at += 1;
        match children(pid) {
            Ok(children) => {
                let lives = |pid: &i32| status::stat(*pid).is_ok_and(|s| !matches!(s.state, 'Z' | 'X' | 'x'));
                all.extend(children.into_iter().filter(lives));
            }
            Err(FreezeError::Gone { .. }) if pid != root => {}
            Err(error) => return Err(error),
        }
    }
    Ok(all)
}
