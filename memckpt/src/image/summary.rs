//! What a checkpoint and its chain hold, in figures.

use std::path::PathBuf;

use serde::Serialize;

use crate::addr::{AddrRange, PageCount};

use super::chain::{Chain, ChainError, Member};
use super::core::TASK_DEAD;
use super::meta::{CheckpointKind, CheckpointMeta};
use super::pagemap::PagemapFlags;
use super::proto::{PstreeEntry, TaskCoreEntry, VmaEntry};

/// A checkpoint and its chain.
#[derive(Clone, Debug, Serialize)]
pub struct Summary {
    /// The process whose memory the figures are of.
    pub pid: i32,
    /// All processes; empty for a pre-dump that recorded none.
    pub processes: Vec<ProcessSummary>,
    /// The layout; empty for a pre-dump that recorded none.
    pub vmas: Vec<VmaSummary>,
    /// Bytes in this directory.
    pub bytes_own: u64,
    /// Bytes left to parents.
    pub bytes_inherited: u64,
    /// Bytes of private anonymous memory that no page is held of: they read as zeroes.
    pub bytes_zero: u64,
    /// The chain, youngest first.
    pub chain: Vec<MemberSummary>,
}

/// A process.
#[derive(Clone, Debug, Serialize)]
pub struct ProcessSummary {
    /// PID.
    pub pid: u32,
    /// Its parent; 0 for the root.
    pub ppid: u32,
    /// How it ended, as wait(2) tells it: nobody had taken notice yet. `None`: it lived.
    pub exit_code: Option<u32>,
    /// Process group.
    pub pgid: u32,
    /// Session.
    pub sid: u32,
    /// Its threads; only those whose core image is there have more than a number.
    pub threads: Vec<ThreadSummary>,
}

/// A thread.
#[derive(Clone, Debug, Serialize)]
pub struct ThreadSummary {
    /// Thread ID.
    pub tid: u32,
    /// Its name.
    pub comm: Option<String>,
    /// Its instruction pointer.
    pub ip: Option<u64>,
    /// Its stack pointer.
    pub sp: Option<u64>,
}

/// An area of memory.
#[derive(Clone, Debug, Serialize)]
pub struct VmaSummary {
    /// Its addresses.
    pub range: AddrRange,
    /// As in `/proc/PID/maps`: `rw-p`.
    pub perms: String,
    /// What it is, in words.
    pub kind: &'static str,
    /// Pages in this directory.
    pub pages_own: PageCount,
    /// Pages left to parents.
    pub pages_inherited: PageCount,
}

/// One directory of the chain.
#[derive(Clone, Debug, Serialize)]
pub struct MemberSummary {
    /// The directory.
    pub path: PathBuf,
    /// Memory only, or more.
    pub kind: CheckpointKind,
    /// Pages whose bytes are here.
    pub pages_own: PageCount,
    /// Pages left to its parents.
    pub pages_inherited: PageCount,
    /// What memckpt recorded; `None` for a checkpoint that CRIU made.
    pub meta: Option<CheckpointMeta>,
}

impl Summary {
    /// The figures of a chain.
    ///
    /// # Errors
    /// An image of the youngest directory is unreadable or damaged.
    pub fn of(chain: &Chain) -> Result<Self, ChainError> {
        let youngest = chain.youngest();
        let vmas: Vec<VmaEntry> = youngest.mm()?.map(|mm| mm.vmas).unwrap_or_default();
        let of_member = |own: bool| {
            chain
                .runs()
                .iter()
                .filter(|run| (run.member == 0) == own)
                .map(|run| run.range.pages())
                .sum::<PageCount>()
        };
        let zero = |vma: &VmaEntry| {
            let range = AddrRange::new(vma.start, vma.end);
            let held: PageCount = chain.within(range).map(|run| run.range.pages()).sum();
            range.len() - held.bytes()
        };
        Ok(Self {
            pid: chain.pid(),
            processes: processes(youngest)?,
            bytes_zero: vmas
                .iter()
                .filter(|vma| kind(vma.status) == ANONYMOUS || kind(vma.status) == HEAP)
                .map(zero)
                .sum(),
            vmas: vmas.iter().map(|vma| vma_summary(vma, chain)).collect(),
            bytes_own: of_member(true).bytes(),
            bytes_inherited: of_member(false).bytes(),
            chain: chain.members().iter().map(member_summary).collect(),
        })
    }
}

fn processes(member: &Member) -> Result<Vec<ProcessSummary>, ChainError> {
    let mut processes = Vec::new();
    for process in member.tree()? {
        let mut threads = Vec::new();
        let mut exit_code = None;
        for tid in process.threads {
            let core = member.core(tid as i32)?;
            let ended = |tc: &&TaskCoreEntry| tc.task_state == TASK_DEAD;
            if let Some(tc) = core.as_ref().and_then(|core| core.tc.as_ref()).filter(ended) {
                exit_code = Some(tc.exit_code);
                continue;
            }
            let regs = core.as_ref().and_then(|core| core.thread_info.as_ref()).map(|info| &info.gpregs);
            threads.push(ThreadSummary {
                tid,
                ip: regs.map(|regs| regs.ip),
                sp: regs.map(|regs| regs.sp),
                comm: core.as_ref().and_then(|core| core.thread_core.as_ref()?.comm.clone()),
            });
        }
        let PstreeEntry { pid, ppid, pgid, sid, .. } = process;
        processes.push(ProcessSummary { pid, ppid, exit_code, pgid, sid, threads });
    }
    Ok(processes)
}

fn vma_summary(vma: &VmaEntry, chain: &Chain) -> VmaSummary {
    let range = AddrRange::new(vma.start, vma.end);
    let (mut own, mut inherited) = (PageCount::ZERO, PageCount::ZERO);
    for run in chain.within(range) {
        *(if run.member == 0 { &mut own } else { &mut inherited }) += run.range.pages();
    }
    let letter = |bit: i32, letter| if vma.prot & bit as u32 != 0 { letter } else { '-' };
    let shared = vma.flags & libc::MAP_SHARED as u32 != 0;
    VmaSummary {
        range,
        perms: [
            letter(libc::PROT_READ, 'r'),
            letter(libc::PROT_WRITE, 'w'),
            letter(libc::PROT_EXEC, 'x'),
            if shared { 's' } else { 'p' },
        ]
        .iter()
        .collect(),
        kind: kind(vma.status),
        pages_own: own,
        pages_inherited: inherited,
    }
}

const ANONYMOUS: &str = "anonymous";
const HEAP: &str = "heap";

/// What CRIU's status bits say; the most telling first.
fn kind(status: u32) -> &'static str {
    const NAMES: [(u32, &str); 14] = [
        (2, "vsyscall"),
        (3, "vdso"),
        (12, "vvar"),
        (13, "aio ring"),
        (15, "shadow stack"),
        (16, "guard region"),
        (17, "uprobes"),
        (5, HEAP),
        (14, "memfd"),
        (10, "SysV shared memory"),
        (6, "private file"),
        (7, "shared file"),
        (8, "shared anonymous"),
        (9, ANONYMOUS),
    ];
    NAMES.iter().find(|(bit, _)| status & (1 << bit) != 0).map_or("unknown", |(_, name)| name)
}

fn member_summary(member: &Member) -> MemberSummary {
    let count = |present: bool| {
        let runs = member.pagemap().runs().iter();
        runs.filter(|run| run.flags.contains(PagemapFlags::PRESENT) == present)
            .map(|run| run.range.pages())
            .sum()
    };
    let from_inventory = match member.inventory().pre_dump_mode {
        Some(_) => CheckpointKind::PreDump,
        None => CheckpointKind::Dump,
    };
    MemberSummary {
        path: member.path().to_owned(),
        kind: member.meta().map_or(from_inventory, |meta| meta.kind),
        pages_own: count(true),
        pages_inherited: count(false),
        meta: member.meta().cloned(),
    }
}
