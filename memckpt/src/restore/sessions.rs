//! When a process makes its session: before or after it forks. A child begins in the session of its parent, and can leave it
//! only for one of its own.

use std::collections::HashMap;

use super::checkpoint::Process;
use super::error::{Refusal, RestoreError};

/// For each process, the session that it must be born in, where that matters.
#[derive(Debug)]
pub(super) struct Births(HashMap<i32, Option<i32>>);

impl Births {
    /// For a tree, parents before their children.
    pub(super) fn of(processes: &[Process]) -> Result<Self, RestoreError> {
        let mut born: HashMap<i32, Option<i32>> = HashMap::new();
        // Children first.
        for process in processes.iter().rev() {
            let mut wanted = (process.sid != process.pid).then_some(process.sid);
            for child in processes.iter().filter(|child| child.ppid == process.pid) {
                let Some(sid) = born.get(&child.pid).copied().flatten() else { continue };
                if sid == process.pid {
                    continue;
                }
                if *wanted.get_or_insert(sid) != sid {
                    let what = format!(
                        "its child {} is of session {sid}, which it cannot have been born in",
                        child.pid
                    );
                    return Err(Refusal::State { pid: process.pid, what }.into());
                }
            }
            born.insert(process.pid, wanted);
        }
        Ok(Self(born))
    }

    /// Whether `child` must be forked before its parent `parent` makes its own session.
    pub(super) fn before_session(&self, parent: &Process, child: &Process) -> bool {
        let born = self.0.get(&child.pid).copied().flatten();
        parent.sid == parent.pid && born.is_some_and(|sid| sid != parent.pid)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::restore::checkpoint::State;

    fn process(pid: i32, ppid: i32, sid: i32) -> Process {
        let state = State::Zombie { exit_code: 0, comm: String::new() };
        Process { pid, ppid, pgid: pid, sid, state }
    }

    #[test]
    fn a_child_of_the_old_session_comes_first() {
        let tree = [process(1, 0, 1), process(2, 1, 2), process(3, 2, 1), process(4, 2, 2), process(5, 2, 5)];
        let births = Births::of(&tree).unwrap();
        assert!(births.before_session(&tree[1], &tree[2]));
        assert!(!births.before_session(&tree[1], &tree[3]));
        assert!(!births.before_session(&tree[1], &tree[4]));
        assert!(!births.before_session(&tree[0], &tree[1]));
        // 4's grandchild is of session 1, so must 4 be.
        let deep = [process(1, 0, 1), process(2, 1, 2), process(4, 2, 4), process(5, 4, 1)];
        let births = Births::of(&deep).unwrap();
        assert!(births.before_session(&deep[1], &deep[2]) && births.before_session(&deep[2], &deep[3]));
        assert!(Births::of(&[process(1, 0, 1), process(2, 1, 7), process(3, 2, 8)]).is_err());
    }
}
