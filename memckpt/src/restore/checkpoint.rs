//! What a checkpoint says of a process tree, read and checked before anything is made.

use std::collections::{BTreeMap, HashSet};
use std::path::Path;

use crate::addr::{Addr, AddrRange};
use crate::image::chain::{KnownChecksums, Member};
use crate::image::proto::{
    CoreEntry, FdinfoEntry, FileEntry, FileLockEntry, FsEntry, March, MmEntry, PstreeEntry, SeccompEntry,
    TaskCoreEntry, TaskKobjIdsEntry, ThreadCoreEntry, ThreadInfoX86, VmaEntry,
};
use crate::image::{Chain, ImageKind, magic};
use crate::plan::classify::VmaStatus;
use crate::range_set::RangeSet;

use super::error::{Refusal, RestoreError};
use super::memory::Space;

/// One past the highest address of a process with four levels of page tables (TASK_SIZE_MAX).
pub(super) const TASK_SIZE: u64 = (1 << 47) - 4096;
/// The largest PID that Linux can be told to give (PID_MAX_LIMIT, include/linux/threads.h).
const PID_MAX: i32 = 4 << 20;

/// CRIU's numbers for what a task does.
const TASK_ALIVE: u32 = 1;
const TASK_DEAD: u32 = 2;
const TASK_STOPPED: u32 = 3;

/// A tree of processes, parents before their children, and the files that they have open.
#[derive(Debug)]
pub(super) struct Checkpoint {
    /// The memory of the root, and with it the directory.
    chain: Chain,
    pub(super) processes: Vec<Process>,
    pub(super) filters: SeccompEntry,
    pub(super) files: BTreeMap<u32, FileEntry>,
    pub(super) locks: Vec<FileLockEntry>,
}

/// A process.
#[derive(Debug)]
pub(super) struct Process {
    pub(super) pid: i32,
    /// 0 for the root.
    pub(super) ppid: i32,
    pub(super) pgid: i32,
    pub(super) sid: i32,
    pub(super) state: State,
}

/// Whether there is anything to it.
#[derive(Debug)]
pub(super) enum State {
    /// It has ended with this code, as wait(2) tells it, and was not waited for.
    Zombie { exit_code: u32, comm: String },
    /// It runs, or is stopped by a signal.
    Alive(Box<Alive>),
}

/// All of a process that lives.
#[derive(Debug)]
pub(super) struct Alive {
    pub(super) task: TaskCoreEntry,
    pub(super) stopped: bool,
    pub(super) mm: MmEntry,
    /// Where a touch is a fault, within its areas (MADV_GUARD_INSTALL).
    guards: RangeSet,
    /// Where pages are locked as they come.
    locked_on_fault: RangeSet,
    pub(super) memory: Chain,
    pub(super) ids: TaskKobjIdsEntry,
    pub(super) fs: FsEntry,
    pub(super) descriptors: Vec<FdinfoEntry>,
    /// The leader first.
    pub(super) threads: Vec<Thread>,
}

/// A thread.
#[derive(Debug)]
pub(super) struct Thread {
    pub(super) tid: i32,
    pub(super) arch: ThreadInfoX86,
    pub(super) core: ThreadCoreEntry,
}

impl Checkpoint {
    /// Reads the checkpoint in `path`, and its parents.
    pub(super) fn read(path: &Path) -> Result<Self, RestoreError> {
        let root = Chain::open(path)?;
        let member = root.youngest();
        let tree = member.tree()?;
        if tree.is_empty() {
            return Err(missing(member, magic::PSTREE, "; a pre-dump holds memory only"));
        }
        check_tree(&tree).map_err(|(record, reason)| member.damaged(magic::PSTREE, record, reason))?;
        let files = member.files()?.into_iter().map(|file| (file.id, file)).collect();
        let filters =
            member.records(magic::SECCOMP, ImageKind::Seccomp)?.into_iter().next().unwrap_or_default();
        let locks = member.records(magic::FILE_LOCKS, ImageKind::FileLocks)?;
        let processes: Vec<Process> =
            tree.iter().map(|entry| process(path, entry)).collect::<Result<_, _>>()?;
        if matches!(processes[0].state, State::Zombie { .. }) {
            return Err(Refusal::Checkpoint("its root has ended: there is nothing to restore".into()).into());
        }
        Ok(Self { chain: root, processes, filters, files, locks })
    }

    /// Compares all pages with their checksums, if it has some.
    pub(super) fn verify(&self) -> Result<(), RestoreError> {
        let mut known = KnownChecksums::default();
        for (_, alive) in self.alive() {
            alive.memory.verify(&mut known)?;
        }
        self.verify_shared()
    }

    /// Compares the pages of shared memory only.
    pub(super) fn verify_shared(&self) -> Result<(), RestoreError> {
        Ok(self.member().verify_shared(&mut KnownChecksums::default())?)
    }

    /// The directory.
    pub(super) fn member(&self) -> &Member {
        self.chain.youngest()
    }

    /// A file of `files.img` that process `pid` uses.
    pub(super) fn file(&self, pid: i32, id: u32) -> Result<&FileEntry, RestoreError> {
        self.files.get(&id).ok_or_else(|| {
            let reason = format!("file {id}, which process {pid} uses, is missing");
            self.member().damaged(magic::FILES, self.files.len(), reason).into()
        })
    }

    /// The process that all others descend from.
    pub(super) fn root(&self) -> &Process {
        &self.processes[0]
    }

    /// The parent of a process, if it lives.
    pub(super) fn parent(&self, child: &Process) -> Option<(&Process, &Alive)> {
        self.alive().find(|(parent, _)| parent.pid == child.ppid)
    }

    /// Those that live.
    pub(super) fn alive(&self) -> impl Iterator<Item = (&Process, &Alive)> {
        self.processes.iter().filter_map(|process| match &process.state {
            State::Alive(alive) => Some((process, &**alive)),
            State::Zombie { .. } => None,
        })
    }
}

impl Alive {
    /// Its areas.
    pub(super) fn space(&self) -> Space<'_> {
        Space { vmas: &self.mm.vmas, guards: &self.guards, locked_on_fault: &self.locked_on_fault }
    }

    /// Its VMAs, as ranges.
    pub(super) fn ranges(&self) -> impl Iterator<Item = AddrRange> {
        self.mm.vmas.iter().map(range)
    }
}

/// The addresses of a VMA.
pub(super) fn range(vma: &VmaEntry) -> AddrRange {
    AddrRange { start: Addr(vma.start), end: Addr(vma.end) }
}

fn missing(member: &Member, file: &str, hint: &'static str) -> RestoreError {
    RestoreError::Missing { path: member.path().to_owned(), file: file.to_owned(), hint }
}

/// Every process has a number of its own, and a parent before it.
fn check_tree(tree: &[PstreeEntry]) -> Result<(), (usize, String)> {
    let mut seen = HashSet::new();
    let number = |n: u32| i32::try_from(n).ok().filter(|n| (1..PID_MAX).contains(n));
    for (record, entry) in tree.iter().enumerate() {
        let wrong = |reason: String| Err((record, reason));
        if number(entry.pid).is_none() {
            return wrong(format!("{} is no PID", entry.pid));
        }
        if [entry.pgid, entry.sid].into_iter().any(|n| n != 0 && number(n).is_none()) {
            return wrong(format!("process {} has an impossible group or session", entry.pid));
        }
        let is_root = record == 0;
        if is_root != (entry.ppid == 0) || !is_root && !seen.contains(&entry.ppid) {
            return wrong(format!("process {} has parent {}, which is not before it", entry.pid, entry.ppid));
        }
        // Of a process that has ended CRIU does not tell the thread (`alive` checks those that live).
        let threads = if entry.threads.len() < 2 { &[entry.pid][..] } else { &entry.threads };
        if threads.first().is_some_and(|leader| *leader != entry.pid) {
            return wrong(format!("the first thread of process {} is another", entry.pid));
        }
        for tid in threads {
            if number(*tid).is_none() || !seen.insert(*tid) {
                return wrong(format!("thread {tid} of process {} is impossible or twice there", entry.pid));
            }
        }
    }
    Ok(())
}

fn process(path: &Path, entry: &PstreeEntry) -> Result<Process, RestoreError> {
    let [pid, ppid, pgid, sid] = [entry.pid, entry.ppid, entry.pgid, entry.sid].map(|n| n as i32);
    let memory = Chain::open_task(path, pid)?;
    let member = memory.youngest();
    let name = magic::core_name(pid);
    let core = member.core(pid)?.ok_or_else(|| missing(member, &name, ""))?;
    let task = core.tc.clone().ok_or_else(|| member.damaged(&name, 0, "tells nothing of the process"))?;
    let state = match task.task_state {
        TASK_DEAD => State::Zombie { exit_code: task.exit_code, comm: task.comm },
        TASK_ALIVE | TASK_STOPPED => State::Alive(Box::new(alive(entry, core, task, memory)?)),
        other => return Err(member.damaged(&name, 0, format!("{other} is no state of a process")).into()),
    };
    Ok(Process { pid, ppid, pgid, sid, state })
}

fn alive(
    entry: &PstreeEntry,
    core: CoreEntry,
    task: TaskCoreEntry,
    memory: Chain,
) -> Result<Alive, RestoreError> {
    let pid = entry.pid as i32;
    let member = memory.youngest();
    let mut mm = member.mm()?.ok_or_else(|| missing(member, &magic::mm_name(pid), ""))?;
    let told =
        member.meta().and_then(|meta| meta.process(pid)).map(|process| process.space).unwrap_or_default();
    let guards = guards(&mut mm, told.guards);
    check_layout(&mm.vmas, &guards).map_err(|reason| member.damaged(&magic::mm_name(pid), 0, reason))?;
    let ids = match (core.ids.clone(), member.ids(pid)?) {
        (Some(ids), _) | (None, Some(ids)) => ids,
        (None, None) => return Err(missing(member, &magic::ids_name(pid), "")),
    };
    let fs = member.fs(pid)?.ok_or_else(|| missing(member, &magic::fs_name(pid), ""))?;
    let descriptors = member.descriptors(ids.files_id)?;
    if entry.threads.first() != Some(&entry.pid) {
        let what = format!("its first thread is {:?}", entry.threads.first());
        return Err(Refusal::State { pid, what }.into());
    }
    let mut leader = thread(member, pid, core)?;
    // CRIU tells the leader's mask with what belongs to the process.
    leader.core.blk_sigset.get_or_insert(task.blk_sigset);
    let mut threads = vec![leader];
    for tid in entry.threads.iter().skip(1) {
        let tid = *tid as i32;
        let core = member.core(tid)?.ok_or_else(|| missing(member, &magic::core_name(tid), ""))?;
        threads.push(thread(member, tid, core)?);
    }
    let stopped = task.task_state == TASK_STOPPED;
    let (guards, locked_on_fault) =
        (guards.into_iter().collect(), told.locked_on_fault.into_iter().collect());
    Ok(Alive { stopped, task, mm, guards, locked_on_fault, ids, fs, descriptors, threads, memory })
}

/// Takes the guard regions out of the areas, where CRIU has them since 4.2, and adds those that memckpt `told`.
fn guards(mm: &mut MmEntry, told: Vec<AddrRange>) -> Vec<AddrRange> {
    let vmas = std::mem::take(&mut mm.vmas);
    let (guards, vmas): (Vec<_>, Vec<_>) =
        vmas.into_iter().partition(|vma| vma.status & VmaStatus::GUARD.bits() != 0);
    mm.vmas = vmas;
    guards.iter().map(range).chain(told).collect()
}

fn thread(member: &Member, tid: i32, core: CoreEntry) -> Result<Thread, RestoreError> {
    let name = magic::core_name(tid);
    if core.mtype != March::X8664 as i32 {
        let what = format!("{name} is of another kind of processor ({})", core.mtype);
        return Err(Refusal::Checkpoint(what).into());
    }
    match (core.thread_info, core.thread_core) {
        (Some(arch), Some(core)) => Ok(Thread { tid, arch, core }),
        _ => Err(member.damaged(&name, 0, "has no registers").into()),
    }
}

/// VMAs are whole pages, in order, below the end of user space; only the vsyscall page is above. So are guard regions, in any order.
fn check_layout(vmas: &[VmaEntry], guards: &[AddrRange]) -> Result<(), String> {
    let possible = |range: AddrRange, limit: u64| {
        let aligned = range.start.is_page_aligned() && range.end.is_page_aligned();
        aligned && !range.is_empty() && range.end.get() <= limit
    };
    if let Some(guard) = guards.iter().find(|guard| !possible(**guard, TASK_SIZE)) {
        return Err(format!("there can be no guard region {guard} here"));
    }
    let mut before = 0;
    for vma in vmas {
        let range = range(vma);
        let limit = if vma.status & VmaStatus::VSYSCALL.bits() == 0 { TASK_SIZE } else { u64::MAX };
        if !possible(range, limit) || range.start.get() < before {
            return Err(format!("there can be no area {range} here"));
        }
        before = vma.end;
    }
    Ok(())
}
