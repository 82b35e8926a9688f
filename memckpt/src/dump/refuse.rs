//! Everything that memckpt does not capture is refused here, by name and reason, before the target is touched.

use crate::addr::{AddrRange, PAGE_SIZE};
use crate::kernel::cgroup::Cgroup;
use crate::kernel::maps::Vma;
use crate::kernel::process::{self, Bitness, TargetId};
use crate::kernel::{SyscallError, status, sysv_shm};
use crate::plan::{SharedKind, VmaClass, VmaFacts};
use crate::range_set::RangeSet;
use crate::target::{Frozen, FrozenTree};

use super::error::DumpError;
use super::layout::Layout;
use super::request::Request;

/// What is refused, why, and the way out.
#[derive(Debug, thiserror::Error)]
pub enum Refusal {
    /// There is no such process.
    #[error("no such process: {0}")]
    NoProcess(i32),
    /// The PID names a thread of another process.
    #[error("{tid} is a thread of process {pid}: checkpoint that one")]
    NotLeader {
        /// The thread.
        tid: i32,
        /// Its process.
        pid: i32,
    },
    /// A kernel thread has no memory of its own.
    #[error("process {0} is a kernel thread: it has no memory to checkpoint")]
    KernelThread(i32),
    /// A zombie has no memory any more.
    #[error("process {0} is a zombie: it has ended, and waits for its parent {1} to take notice")]
    Zombie(i32, i32),
    /// Only one tracer at a time.
    #[error("process {pid} is already traced by process {tracer} ({comm}): end that one first")]
    Traced {
        /// The target.
        pid: i32,
        /// Its tracer.
        tracer: i32,
        /// The tracer's name.
        comm: String,
    },
    /// Stopping ourselves, or whoever waits for us, would never end.
    #[error(
        "process {0} is memckpt itself or one of its ancestors: it would wait for itself for ever. Start memckpt from elsewhere, for example with setsid"
    )]
    Ancestor(i32),
    /// The parasite and the images are x86-64's.
    #[error("process {0} is a 32-bit task: memckpt captures 64-bit x86 processes only")]
    ThirtyTwoBit(i32),
    /// Another process shares the target's memory and would go on changing it.
    #[error(
        "process {other} shares the memory of process {pid} (vfork or clone(CLONE_VM)): it would change the memory during the checkpoint. Wait until it has called exec or ended"
    )]
    SharedMm {
        /// The target.
        pid: i32,
        /// The other process.
        other: i32,
    },
    /// We may not.
    #[error("no permission to checkpoint process {pid}: {need}")]
    Rights {
        /// The target.
        pid: i32,
        /// What is missing.
        need: String,
    },
    /// A mapping that cannot be captured.
    #[error("process {pid}: the mapping at {range}{name} {reason}")]
    Mapping {
        /// The target.
        pid: i32,
        /// Where.
        range: AddrRange,
        /// ` (name)`, or nothing.
        name: String,
        /// Why, and the way out.
        reason: String,
    },
    /// A descriptor whose kernel side writes memory behind every tracker's back.
    #[error("process {pid}: descriptor {fd} ({kind}) {reason}")]
    Descriptor {
        /// The target.
        pid: i32,
        /// The descriptor.
        fd: i32,
        /// What it is.
        kind: &'static str,
        /// Why, and the way out.
        reason: &'static str,
    },
    /// An open file that is not captured.
    #[error("process {pid}: {place} ({kind}) {reason}")]
    File {
        /// The process.
        pid: i32,
        /// Which of its files: `descriptor 5`.
        place: String,
        /// What it is.
        kind: String,
        /// Why, and the way out.
        reason: String,
    },
    /// A process of the cgroup is not in the tree.
    #[error(
        "process {pid} is in the cgroup {cgroup}, but does not descend from process {root}: it would not be in the checkpoint. Move it out first"
    )]
    Foreign {
        /// The process.
        pid: i32,
        /// The cgroup.
        cgroup: String,
        /// The root of the tree.
        root: i32,
    },
    /// The cgroup stands still already.
    #[error(
        "the cgroup {0} is frozen, so that its processes cannot be asked for their state: thaw it first. memckpt stops them itself, and all at one moment"
    )]
    FrozenCgroup(String),
    /// Another namespace than ours.
    #[error(
        "process {pid} lives in another {kind} namespace than memckpt: namespaces are not captured. Run memckpt inside of it"
    )]
    Namespace {
        /// The process.
        pid: i32,
        /// Which namespace.
        kind: &'static str,
    },
    /// The packets of its connections cannot be dropped until it is restored.
    #[error(
        "the process would end, and its peers be told that their connections are closed, as their packets cannot be held back: {0}. --leave-running takes a checkpoint all the same"
    )]
    CannotBlock(#[source] SyscallError),
    /// Its session was begun by somebody outside of the tree.
    #[error(
        "process {pid} would end, and could not be brought back: it is no session leader, and who is, process {sid}, is outside of the tree. With --shell-job it comes back in the session that the restore runs in; --leave-running takes a checkpoint without that"
    )]
    OuterSession {
        /// The root of the tree.
        pid: i32,
        /// Its session.
        sid: i32,
    },
    /// What only the process itself can tell would be missing, and it could not be brought back.
    #[error(
        "process {pid} would end, and could not be brought back: its signal handlers and timers are known to itself only, and it cannot be asked ({reason}). --leave-running or --leave-stopped take the rest"
    )]
    CannotAsk {
        /// The process.
        pid: i32,
        /// Why it cannot be asked.
        reason: String,
    },
    /// Asked for an incremental checkpoint where nothing can track.
    #[error("{0}")]
    NoTracker(String),
}

/// The target's identity, once it is certain that this process can be checkpointed.
pub(super) fn process(request: &Request) -> Result<TargetId, DumpError> {
    let pid = request.pid;
    let target = checkable(pid)?;
    let sid = status::stat(pid)?.sid;
    if request.ends_the_tree() && sid != pid && !request.files.shell_job {
        return Err(Refusal::OuterSession { pid, sid }.into());
    }
    Ok(target)
}

/// The cgroup whose processes are to be the tree of `request`.
pub(super) fn cgroup(request: &Request) -> Result<Option<Cgroup>, DumpError> {
    let Some(directory) = &request.cgroup else { return Ok(None) };
    let cgroup = Cgroup::open(directory)?;
    if cgroup.is_frozen()? {
        return Err(Refusal::FrozenCgroup(directory.display().to_string()).into());
    }
    Ok(Some(cgroup))
}

/// Refuses a cgroup with processes that are not in `tree`, which stands still.
pub(super) fn foreigners(cgroup: &Cgroup, tree: &FrozenTree, request: &Request) -> Result<(), DumpError> {
    for pid in cgroup.processes()? {
        let known = tree.processes().iter().any(|frozen| frozen.pid() == pid)
            || tree.zombies().iter().any(|zombie| zombie.pid == pid);
        if !known && status::stat(pid).is_ok_and(|stat| !matches!(stat.state, 'Z' | 'X' | 'x')) {
            let cgroup = cgroup.directory().display().to_string();
            return Err(Refusal::Foreign { pid, cgroup, root: request.pid }.into());
        }
    }
    Ok(())
}

/// Refuses to end a process that could not be brought back: one that cannot be asked, because of `no_parasite`, or that maps
/// what no restore makes again.
pub(super) fn irrecoverable(
    pid: i32,
    no_parasite: Option<&str>,
    layout: &Layout,
    request: &Request,
) -> Result<(), Refusal> {
    if !request.ends_the_tree() {
        return Ok(());
    }
    if let Some(reason) = no_parasite {
        return Err(Refusal::CannotAsk { pid, reason: reason.to_owned() });
    }
    segments(pid, layout)
}

/// Refuses System V segments that shmat(2) would not attach again as they are.
fn segments(pid: i32, layout: &Layout) -> Result<(), Refusal> {
    let attached = layout.iter().filter(|(_, class, _)| *class == VmaClass::SharedAnon(SharedKind::SysV));
    let attached: Vec<(&Vma, VmaFacts)> = attached.map(|(vma, _, facts)| (vma, facts)).collect();
    for (vma, facts) in &attached {
        let refused = |what: &str| {
            let reason = format!(
                "is a System V segment {what}, which memckpt does not restore: --leave-running or --leave-stopped take its content"
            );
            Err(refused_mapping(pid, vma, reason))
        };
        if facts.hugetlb {
            return refused("of huge pages");
        }
        let size = sysv_shm::stat(vma.inode as i32).map_or(0, |stat| stat.size.next_multiple_of(PAGE_SIZE));
        let end = |vma: &Vma| vma.offset + vma.range.len();
        let is_neighbour = |before: &Vma, after: &Vma| {
            before.inode == after.inode
                && before.range.end == after.range.start
                && end(before) == after.offset
        };
        let begins = vma.offset == 0 || attached.iter().any(|(other, _)| is_neighbour(other, vma));
        let ends = end(vma) == size || attached.iter().any(|(other, _)| is_neighbour(vma, other));
        if !(begins && ends) {
            return refused("of which a part was unmapped");
        }
    }
    Ok(())
}

/// Whether `pid` is a process that memckpt can watch and checkpoint: who it is.
///
/// # Errors
/// Why not.
pub fn checkable(pid: i32) -> Result<TargetId, Refusal> {
    let gone = |_| Refusal::NoProcess(pid);
    let status = status::status(pid).map_err(gone)?;
    let stat = status::stat(pid).map_err(gone)?;
    if status.tgid != pid {
        return Err(Refusal::NotLeader { tid: pid, pid: status.tgid });
    }
    if process::is_kernel_thread(pid).map_err(gone)? {
        return Err(Refusal::KernelThread(pid));
    }
    if matches!(stat.state, 'Z' | 'X' | 'x') {
        return Err(Refusal::Zombie(pid, stat.ppid));
    }
    if status.tracer_pid != 0 {
        // TracerPid names the tracing thread.
        let tracer = status::status(status.tracer_pid).map_or(status.tracer_pid, |s| s.tgid);
        let comm = status::stat(tracer).map(|s| s.comm).unwrap_or_default();
        return Err(Refusal::Traced { pid, tracer, comm });
    }
    // Each of them waits for us, or is us: frozen, it would never let us finish.
    if process::ancestors().is_ok_and(|ancestors| ancestors.contains(&pid))
        || pid == std::process::id() as i32
    {
        return Err(Refusal::Ancestor(pid));
    }
    capturable(pid)
}

/// The rest of [`checkable`], also of a process that we have stopped ourselves.
pub(super) fn capturable(pid: i32) -> Result<TargetId, Refusal> {
    let gone = |_| Refusal::NoProcess(pid);
    rights(pid)?;
    if process::bitness(pid).is_ok_and(|bits| bits == Bitness::Bits32) {
        return Err(Refusal::ThirtyTwoBit(pid));
    }
    // Looked at twice: a vfork that has ended after the first time is none that the second could see.
    let shares = |other: &i32| process::shares_mm(pid, *other).unwrap_or(false);
    if let Some(other) = sharing_mm(pid).filter(|&other| !may_wait_for(pid, other)).filter(shares) {
        return Err(Refusal::SharedMm { pid, other });
    }
    descriptors(pid)?;
    TargetId::of(pid).map_err(gone)
}

/// Another process with the same address space: clone(2) with CLONE_VM and without CLONE_THREAD, as vfork(2) makes.
fn sharing_mm(pid: i32) -> Option<i32> {
    let processes = std::fs::read_dir("/proc").ok()?;
    processes
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse::<i32>().ok())
        .find(|&other| other != pid && process::shares_mm(pid, other).unwrap_or(false))
}

/// Whether `other` may be a vfork(2) child of `pid`: then the two part by themselves, and no sooner does `pid` stand still. Its
/// thread sleeps uninterruptibly until then (kernel_clone, kernel/fork.c), or has not begun to.
fn may_wait_for(pid: i32, other: i32) -> bool {
    let busy = |tid: i32| status::stat(tid).is_ok_and(|stat| matches!(stat.state, 'D' | 'R'));
    status::stat(other).is_ok_and(|stat| stat.ppid == pid)
        && process::threads(pid).is_ok_and(|threads| threads.into_iter().any(busy))
}

/// Refuses processes of a frozen tree that share the memory of their parent: this is no vfork.
pub(super) fn sharers(tree: &FrozenTree) -> Result<(), Refusal> {
    let stands = |pid: i32| tree.processes().iter().any(|frozen| frozen.pid() == pid);
    for other in tree.processes().iter().map(Frozen::pid) {
        let Ok(pid) = status::stat(other).map(|stat| stat.ppid) else { continue };
        if stands(pid) && process::shares_mm(pid, other).unwrap_or(false) {
            return Err(Refusal::SharedMm { pid, other });
        }
    }
    Ok(())
}

/// ptrace's own check (ptrace(2), PTRACE_MODE_ATTACH) on a file that asks for it, so that the answer is the kernel's.
fn rights(pid: i32) -> Result<(), Refusal> {
    match std::fs::File::open(format!("/proc/{pid}/mem")) {
        Ok(_) => Ok(()),
        // ESRCH: it is ending, and has no memory any more.
        Err(e) if matches!(e.raw_os_error(), Some(libc::ENOENT | libc::ESRCH)) => {
            Err(Refusal::NoProcess(pid))
        }
        Err(e) => Err(Refusal::Rights {
            pid,
            need: format!(
                "/proc/{pid}/mem: {e}. It takes root, or the capabilities CAP_SYS_PTRACE and CAP_CHECKPOINT_RESTORE"
            ),
        }),
    }
}

/// Descriptors whose kernel side changes memory where no tracker sees it.
fn descriptors(pid: i32) -> Result<(), Refusal> {
    let Ok(entries) = std::fs::read_dir(format!("/proc/{pid}/fd")) else { return Ok(()) };
    for entry in entries.flatten() {
        let Some(fd) = entry.file_name().to_str().and_then(|n| n.parse::<i32>().ok()) else { continue };
        let Ok(link) = std::fs::read_link(entry.path()) else { continue };
        match link.to_str() {
            Some("anon_inode:[userfaultfd]") => {
                return Err(Refusal::Descriptor {
                    pid,
                    fd,
                    kind: "userfaultfd",
                    reason: "lets the process install pages that no tracker sees: memckpt does not checkpoint such a process while the descriptor is open",
                });
            }
            Some("anon_inode:[io_uring]") if has_registered_buffers(pid, fd) => {
                return Err(Refusal::Descriptor {
                    pid,
                    fd,
                    kind: "io_uring with registered buffers",
                    reason: "lets the kernel write into pinned pages that no tracker sees: unregister the buffers first",
                });
            }
            _ => {}
        }
    }
    Ok(())
}

/// Whether a descriptor of the process is an io_uring.
pub(super) fn has_io_uring(pid: i32) -> bool {
    let Ok(entries) = std::fs::read_dir(format!("/proc/{pid}/fd")) else { return false };
    let is_ring = |path: std::path::PathBuf| {
        std::fs::read_link(path).is_ok_and(|link| link.as_os_str() == "anon_inode:[io_uring]")
    };
    entries.flatten().any(|entry| is_ring(entry.path()))
}

/// `UserBufs:` in an io_uring's fdinfo (io_uring/fdinfo.c) counts its registered buffers.
fn has_registered_buffers(pid: i32, fd: i32) -> bool {
    std::fs::read_to_string(format!("/proc/{pid}/fdinfo/{fd}")).is_ok_and(|text| {
        text.lines()
            .filter_map(|l| l.strip_prefix("UserBufs:"))
            .any(|n| n.trim().parse::<u64>().is_ok_and(|n| n > 0))
    })
}

/// Mappings that cannot be captured.
pub(super) fn mapping(pid: i32, vma: &Vma, class: VmaClass) -> Result<(), Refusal> {
    match class {
        VmaClass::Refused(reason) => Err(refused_mapping(pid, vma, reason.to_string())),
        _ => Ok(()),
    }
}

/// A mapping in which remap_file_pages(2) was seen.
pub(super) fn nonlinear(pid: i32, vmas: &[Vma], observed: &RangeSet) -> Result<(), Refusal> {
    let Some(vma) = vmas.iter().find(|v| observed.overlaps(v.range)) else { return Ok(()) };
    let reason = "was rearranged by remap_file_pages(2): non-linear mappings are not captured. Kernels from 4.0 on make \
                  ordinary mappings of them: --allow-emulated-nonlinear captures those";
    Err(refused_mapping(pid, vma, reason.to_owned()))
}

fn refused_mapping(pid: i32, vma: &Vma, reason: String) -> Refusal {
    let name = if vma.name.is_empty() { String::new() } else { format!(" ({})", vma.name) };
    Refusal::Mapping { pid, range: vma.range, name, reason }
}
