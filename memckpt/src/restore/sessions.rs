//! How a process comes into its session. A child begins in that of its parent, and can leave it only for one of its own: so it
//! matters whether its parent forks before or after it makes its session. And there are orphans, whose parent is a stranger: a
//! sibling bears them for it, their session's leader or what stands for that.

use std::collections::{HashMap, HashSet};

use super::checkpoint::Process;
use super::error::{Refusal, RestoreError};

/// How the processes of a tree come into their sessions.
#[derive(Debug)]
pub(super) struct Births {
    /// For each process, the session that it must be born in, where that matters.
    born: HashMap<i32, Option<i32>>,
    orphans: HashSet<i32>,
}

impl Births {
    /// For a tree, parents before their children.
    pub(super) fn of(processes: &[Process]) -> Result<Self, RestoreError> {
        let orphans = orphans(processes)?;
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
            born.insert(process.pid, wanted.filter(|_| !orphans.contains(&process.pid)));
        }
        Ok(Self { born, orphans })
    }

    /// Whether `child` must be forked before its parent `parent` makes its own session.
    pub(super) fn before_session(&self, parent: &Process, child: &Process) -> bool {
        let born = self.born.get(&child.pid).copied().flatten();
        parent.sid == parent.pid && born.is_some_and(|sid| sid != parent.pid)
    }

    /// Whether no ancestor of a process is of its session.
    pub(super) fn is_orphan(&self, process: &Process) -> bool {
        self.orphans.contains(&process.pid)
    }
}

/// The processes of whose session no ancestor is.
fn orphans(processes: &[Process]) -> Result<HashSet<i32>, Refusal> {
    let by_pid: HashMap<i32, &Process> = processes.iter().map(|process| (process.pid, process)).collect();
    // The root's may be that of whoever restores it, which its children may be of, too.
    let outer = processes.first().map(|root| root.sid);
    // By session, the parent of the leader, or the one that it is taken to have had.
    let mut parents: HashMap<i32, i32> = HashMap::new();
    let mut orphans = HashSet::new();
    for process in processes {
        let (pid, sid) = (process.pid, process.sid);
        let mut ancestors = std::iter::successors(by_pid.get(&process.ppid), |of| by_pid.get(&of.ppid));
        if sid == pid || Some(sid) == outer || ancestors.any(|ancestor| ancestor.sid == sid) {
            continue;
        }
        orphans.insert(pid);
        let leaders = by_pid.get(&sid).map_or(process.ppid, |leader| leader.ppid);
        let parent = *parents.entry(sid).or_insert(leaders);
        if parent != process.ppid {
            let what = format!(
                "it is of session {sid}, which others are of that are children of process {parent}; it is the child of process {}, and no child of that can have borne it",
                process.ppid
            );
            return Err(Refusal::State { pid, what });
        }
    }
    Ok(orphans)
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
        let torn = [process(1, 0, 9), process(2, 1, 2), process(3, 2, 9), process(4, 2, 4), process(5, 4, 2)];
        assert!(Births::of(&torn).is_ok());
        // 3's children are of two sessions, both older than its own: it cannot have been born in both.
        let both = [process(1, 0, 1), process(2, 1, 2), process(3, 2, 3), process(4, 3, 1), process(5, 3, 2)];
        assert!(Births::of(&both).is_err());
    }

    #[test]
    fn nobody_bears_an_orphan_who_is_not_its_parents_child() {
        let tree = [
            process(1, 0, 1),
            process(2, 1, 7),
            process(3, 2, 7),
            process(4, 2, 4),
            process(5, 4, 7),
            process(6, 1, 7),
        ];
        let births = Births::of(&tree).unwrap();
        let orphans: Vec<bool> = tree.iter().map(|process| births.is_orphan(process)).collect();
        assert_eq!(orphans, [false, true, false, false, false, true]);
        assert!(!births.before_session(&tree[0], &tree[1]));
        assert!(births.before_session(&tree[3], &tree[4]));
        // The leader lives, and bears it.
        let led = [process(1, 0, 1), process(2, 1, 2), process(3, 1, 2)];
        assert!(Births::of(&led).unwrap().is_orphan(&led[2]));
        // A session of the restore's own has a leader.
        let job = [process(1, 0, 9), process(2, 1, 9)];
        assert!(!Births::of(&job).unwrap().is_orphan(&job[1]));
        for apart in [
            [process(1, 0, 1), process(2, 1, 2), process(3, 1, 7), process(4, 2, 7)],
            [process(1, 0, 1), process(2, 1, 2), process(5, 1, 5), process(4, 2, 5)],
        ] {
            assert!(Births::of(&apart).is_err());
        }
    }
}
