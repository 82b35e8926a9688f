//! Namespaces, and the other kernel objects that processes may share.

use crate::dump::Refusal;
use crate::dump::error::DumpError;
use crate::image::proto::TaskKobjIdsEntry;
use crate::kernel::{SyscallError, kcmp};

use super::Task;
use std::collections::BTreeMap;

/// The links of `/proc/PID/ns`, namespaces(7).
const NAMESPACES: [&str; 8] = ["cgroup", "ipc", "mnt", "net", "pid", "time", "user", "uts"];

/// Refuses a process that lives in other namespaces than ours: what CRIU would make again is not captured.
pub(super) fn same_as_ours(pid: i32) -> Result<(), DumpError> {
    for kind in NAMESPACES {
        let (Some(theirs), Some(ours)) = (namespace(&pid.to_string(), kind)?, namespace("self", kind)?)
        else {
            // A kernel without namespaces of that kind has one for all.
            continue;
        };
        if theirs != ours {
            return Err(Refusal::Namespace { pid, kind }.into());
        }
    }
    Ok(())
}

fn namespace(pid: &str, kind: &str) -> Result<Option<std::path::PathBuf>, SyscallError> {
    let path = format!("/proc/{pid}/ns/{kind}");
    match std::fs::read_link(&path) {
        Ok(link) => Ok(Some(link)),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(SyscallError::new("readlink", path, e)),
    }
}

/// What the inventory has: our own objects. The tree has none of them but the namespaces.
pub(super) fn ours() -> TaskKobjIdsEntry {
    numbered(1)
}

fn numbered(number: u32) -> TaskKobjIdsEntry {
    TaskKobjIdsEntry {
        vm_id: number,
        files_id: number,
        fs_id: number,
        sighand_id: number,
        // The root of a tree has the caller's namespaces, and the rest the root's: the same numbers for all.
        pid_ns_id: Some(1),
        net_ns_id: Some(2),
        ipc_ns_id: Some(3),
        uts_ns_id: Some(4),
        time_ns_id: Some(5),
        mnt_ns_id: Some(6),
        user_ns_id: Some(7),
        cgroup_ns_id: Some(8),
    }
}

/// A number for each kernel object that each process has: the same number, the same object.
///
/// Memory and signal handlers are each process's own: a process that shares its memory with another one is refused, and handlers
/// cannot be shared without memory (clone(2)).
pub(super) fn objects(tasks: &[Task<'_>]) -> Result<BTreeMap<i32, TaskKobjIdsEntry>, DumpError> {
    let mut ids: BTreeMap<i32, TaskKobjIdsEntry> = BTreeMap::new();
    // 1 is ours.
    for (number, task) in (2..).zip(tasks) {
        let mut own = numbered(number);
        for (other, theirs) in &ids {
            if kcmp::share_descriptors(task.pid, *other)? {
                own.files_id = theirs.files_id;
            }
            if kcmp::share_fs(task.pid, *other)? {
                own.fs_id = theirs.fs_id;
            }
        }
        ids.insert(task.pid, own);
    }
    Ok(ids)
}
