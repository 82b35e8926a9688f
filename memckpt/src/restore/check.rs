//! What can be known beforehand to be impossible, said before anything is made.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use crate::image::proto::TaskKobjIdsEntry;
use crate::kernel::features::capability_is_effective;
use crate::kernel::status;

use super::checkpoint::{Checkpoint, State};
use super::error::{Refusal, RestoreError};
use super::request::Request;
use super::sessions::Births;

/// Refuses a tree that cannot be made here.
pub(super) fn possible(checkpoint: &Checkpoint, request: &Request) -> Result<(), RestoreError> {
    may_choose_ids()?;
    for process in &checkpoint.processes {
        ids_are_free(process.pid, &process.state)?;
    }
    let root = checkpoint.root();
    let known = |id: i32| id == 0 || checkpoint.processes.iter().any(|process| process.pid == id);
    if !(request.shell_job || known(root.sid) && known(root.pgid)) {
        let what = format!(
            "it is of session {} and group {}, which are not in the checkpoint: --shell-job gives it yours",
            root.sid, root.pgid
        );
        return Err(Refusal::State { pid: root.pid, what }.into());
    }
    shared(checkpoint)
}

/// Refuses whoever may not say which ID a process gets (clone3(2), set_tid).
fn may_choose_ids() -> Result<(), RestoreError> {
    /// CAP_SYS_ADMIN; CAP_CHECKPOINT_RESTORE, from Linux 5.9 on (linux/capability.h).
    const EITHER: [u32; 2] = [21, 40];
    if EITHER.into_iter().any(capability_is_effective) {
        return Ok(());
    }
    let what = "its processes need the IDs that they had, and to choose those takes CAP_SYS_ADMIN or CAP_CHECKPOINT_RESTORE: run memckpt as root";
    Err(Refusal::Checkpoint(what.into()).into())
}

/// Refuses processes that share what only a fork can have them share, unless one is the other's child, and borne by it.
fn shared(checkpoint: &Checkpoint) -> Result<(), RestoreError> {
    let births = Births::of(&checkpoint.processes)?;
    type Number = fn(&TaskKobjIdsEntry) -> u32;
    let tables: [(&str, Number, bool); 3] = [
        ("memory", |ids| ids.vm_id, false),
        ("its table of descriptors", |ids| ids.files_id, true),
        ("its directories", |ids| ids.fs_id, true),
    ];
    for (what, number, is_made) in tables {
        let mut owners: HashMap<u32, i32> = HashMap::new();
        for (process, alive) in checkpoint.alive() {
            let parents = checkpoint.parent(process).map(|(_, parent)| number(&parent.ids));
            let borne = is_made && !births.is_orphan(process);
            let from_parent = borne && parents == Some(number(&alive.ids));
            let Some(other) = owners.insert(number(&alive.ids), process.pid).filter(|_| !from_parent) else {
                continue;
            };
            let pid = process.pid;
            let what = format!(
                "it shares {what} with process {other}, which memckpt does not restore{}",
                if is_made { " but of a process and its child" } else { "" }
            );
            return Err(Refusal::State { pid, what }.into());
        }
    }
    Ok(())
}

/// How long an ID may still be that of a process that has ended: the init of some containers takes seconds to wait for what has
/// become its child, as all of a tree does that a dump ends.
const UNTIL_WAITED_FOR: Duration = Duration::from_secs(10);

fn ids_are_free(pid: i32, state: &State) -> Result<(), Refusal> {
    let threads = match state {
        State::Alive(alive) => alive.threads.iter().map(|thread| thread.tid).collect(),
        State::Zombie { .. } => vec![pid],
    };
    let deadline = Instant::now() + UNTIL_WAITED_FOR;
    for tid in threads {
        // A thread's directory is there, too, though it is not listed.
        while let Ok(stat) = status::stat(tid) {
            let state = match stat.state {
                'Z' | 'X' if Instant::now() < deadline => {
                    std::thread::sleep(Duration::from_millis(5));
                    continue;
                }
                'Z' => format!(
                    "{} (it has ended, and its parent {} has not waited for it)",
                    stat.comm, stat.ppid
                ),
                _ => stat.comm,
            };
            return Err(Refusal::PidTaken { pid: tid, state });
        }
    }
    Ok(())
}
