//! What can be known beforehand to be impossible, said before anything is made.

use std::time::{Duration, Instant};

use crate::kernel::status;

use super::checkpoint::{Checkpoint, State};
use super::error::{Refusal, RestoreError};
use super::request::Request;

/// Refuses a tree that cannot be made here.
pub(super) fn possible(checkpoint: &Checkpoint, request: &Request) -> Result<(), RestoreError> {
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
    let shares = |number: fn(&crate::image::proto::TaskKobjIdsEntry) -> u32| {
        let mut seen = std::collections::HashMap::new();
        checkpoint.alive().find_map(|(process, alive)| {
            seen.insert(number(&alive.ids), process.pid).map(|other| (process.pid, other))
        })
    };
    for (what, twice) in [
        ("memory", shares(|ids| ids.vm_id)),
        ("its table of descriptors", shares(|ids| ids.files_id)),
        ("its directories", shares(|ids| ids.fs_id)),
    ] {
        if let Some((pid, other)) = twice {
            let what = format!("it shares {what} with process {other}, which memckpt does not restore yet");
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
