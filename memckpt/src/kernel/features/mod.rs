//! What this kernel, and our rights, can really do: each feature is tried.

mod limits;
mod probes;
mod tracking;

use std::sync::OnceLock;

use serde::Serialize;

pub use limits::capability_is_effective;
#[cfg(test)]
pub(crate) use tracking::take_userfaultfd;

/// The features that memckpt uses.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum FeatureName {
    /// Soft-dirty bits: clear, write, read back.
    SoftDirty,
    /// A byte rewritten in a read-only mapping reads soft-dirty.
    SoftDirtyWitness,
    /// The PAGEMAP_SCAN ioctl.
    PagemapScan,
    /// Asynchronous write protection by userfaultfd.
    UffdWpAsync,
    /// /dev/userfaultfd can be opened.
    DevUserfaultfd,
    /// Page frame numbers are shown.
    PageFrames,
    /// The PROCMAP_QUERY ioctl.
    ProcmapQuery,
    /// PTRACE_SEIZE, INTERRUPT and DETACH.
    PtraceSeize,
    /// /proc/PID/mem through protections.
    ProcMem,
    /// process_vm_readv.
    ProcessVmReadv,
    /// pidfd_open and pidfd_getfd.
    Pidfd,
    /// kcmp.
    Kcmp,
    /// vmsplice into a pipe and back.
    Vmsplice,
    /// Pipes of 1 MiB, several at once.
    PipeSize,
    /// System V shared memory.
    SysvShm,
    /// CAP_SYS_PTRACE.
    CapSysPtrace,
    /// CAP_SYS_ADMIN.
    CapSysAdmin,
    /// CAP_BPF and CAP_PERFMON, or CAP_SYS_ADMIN.
    CapBpf,
    /// CAP_SYS_RESOURCE.
    CapSysResource,
}

/// One feature, tried.
#[derive(Clone, Debug, Serialize)]
pub struct Feature {
    /// Which.
    pub name: FeatureName,
    /// Whether it works here.
    pub works: bool,
    /// Where it does not: what happened.
    pub reason: Option<String>,
    /// What it is good for.
    pub enables: &'static str,
    /// How to get it.
    pub remedy: &'static str,
}

/// Every feature, tried on the running kernel with our rights.
#[derive(Clone, Debug, Serialize)]
pub struct Features {
    /// `uname -r`
    pub kernel: String,
    /// In the order of importance.
    pub features: Vec<Feature>,
}

impl FeatureName {
    /// The name in text and JSON.
    #[must_use]
    pub const fn name(self) -> &'static str {
        self.describe().0
    }

    /// Name, what it enables, how to get it.
    const fn describe(self) -> (&'static str, &'static str, &'static str) {
        match self {
            Self::SoftDirty => (
                "soft-dirty",
                "the soft-dirty tracker: incremental checkpoints on any VMA, the default where it works",
                "a kernel with CONFIG_MEM_SOFT_DIRTY (Debian's, not its cloud flavour); x86-64",
            ),
            Self::SoftDirtyWitness => (
                "soft-dirty-witness",
                "noticing that somebody else cleared the soft-dirty bits, even without a hook",
                "soft-dirty, and /proc/PID/mem writable",
            ),
            Self::PagemapScan => (
                "pagemap-scan",
                "page states as runs rather than a word a page; needed by the uffd-wp tracker",
                "Linux 6.7 or later",
            ),
            Self::UffdWpAsync => (
                "uffd-wp-async",
                "the uffd-wp tracker: incremental checkpoints where there is no soft-dirty",
                "Linux 6.7 or later with CONFIG_USERFAULTFD and CONFIG_PTE_MARKER_UFFD_WP",
            ),
            Self::DevUserfaultfd => (
                "dev-userfaultfd",
                "the uffd-wp tracker for targets whose seccomp filter forbids userfaultfd(2)",
                "Linux 6.1 or later, and access to /dev/userfaultfd",
            ),
            Self::PageFrames => (
                "page-frames",
                "telling zero pages from others without PAGEMAP_SCAN, and swap from markers; else these are dumped",
                "CAP_SYS_ADMIN in the first user namespace",
            ),
            Self::ProcmapQuery => (
                "procmap-query",
                "asking for single VMAs rather than reading the whole layout",
                "Linux 6.11 or later",
            ),
            Self::PtraceSeize => (
                "ptrace-seize",
                "any checkpoint: stopping the target and reading its registers",
                "CAP_SYS_PTRACE, and kernel.yama.ptrace_scope below 3",
            ),
            Self::ProcMem => ("proc-mem", "reading memory through any protection", "CAP_SYS_PTRACE"),
            Self::ProcessVmReadv => {
                ("process-vm-readv", "--pre-dump-mode read", "CONFIG_CROSS_MEMORY_ATTACH, CAP_SYS_PTRACE")
            }
            Self::Pidfd => (
                "pidfd",
                "naming a process safely, and taking descriptors from it",
                "Linux 5.6 or later, CAP_SYS_PTRACE",
            ),
            Self::Kcmp => ("kcmp", "finding processes that share the target's memory", "CONFIG_KCMP"),
            Self::Vmsplice => {
                ("vmsplice", "splice mode: pages leave the target through pipes", "a kernel with vmsplice(2)")
            }
            Self::PipeSize => (
                "pipe-size",
                "splice mode with few round trips",
                "fs.pipe-max-size of 1 MiB or more; for many pipes CAP_SYS_RESOURCE or fs.pipe-user-pages-soft=0",
            ),
            Self::SysvShm => (
                "sysv-shm",
                "infecting the target; without it memory is read from outside",
                "CONFIG_SYSVIPC, and kernel.shm_rmid_forced=0",
            ),
            Self::CapSysPtrace => {
                ("cap-sys-ptrace", "processes of other users", "run as root, or add CAP_SYS_PTRACE")
            }
            Self::CapSysAdmin => {
                ("cap-sys-admin", "page frames, /proc/PID/map_files", "run as root, or add CAP_SYS_ADMIN")
            }
            Self::CapBpf => {
                ("cap-bpf", "the eBPF agent: watch", "run as root, or add CAP_BPF and CAP_PERFMON")
            }
            Self::CapSysResource => {
                ("cap-sys-resource", "pipes above the soft limit", "add CAP_SYS_RESOURCE; nothing needs it")
            }
        }
    }
}

impl Features {
    /// Tries every feature. Takes some milliseconds and child processes of its own: never inside a freeze.
    #[must_use]
    pub fn probe() -> Self {
        use FeatureName as F;
        let tried: [(F, Result<(), String>); 19] = [
            (F::SoftDirty, soft_dirty()),
            (F::SoftDirtyWitness, tracking::witness()),
            (F::PagemapScan, tracking::pagemap_scan()),
            (F::UffdWpAsync, uffd_wp()),
            (F::DevUserfaultfd, tracking::dev_userfaultfd()),
            (F::PageFrames, tracking::page_frames()),
            (F::ProcmapQuery, probes::procmap_query()),
            (F::PtraceSeize, probes::ptrace_seize()),
            (F::ProcMem, probes::proc_mem()),
            (F::ProcessVmReadv, probes::process_vm_readv()),
            (F::Pidfd, probes::pidfd()),
            (F::Kcmp, probes::kcmp()),
            (F::Vmsplice, probes::vmsplice()),
            (F::PipeSize, limits::pipe_size()),
            (F::SysvShm, limits::sysv_shm()),
            (F::CapSysPtrace, limits::has_all(&[limits::CAP_SYS_PTRACE])),
            (F::CapSysAdmin, limits::has_all(&[limits::CAP_SYS_ADMIN])),
            (F::CapBpf, limits::may_load_bpf()),
            (F::CapSysResource, limits::has_all(&[limits::CAP_SYS_RESOURCE])),
        ];
        let features = tried.into_iter().map(|(name, outcome)| {
            let (_, enables, remedy) = name.describe();
            Feature { name, works: outcome.is_ok(), reason: outcome.err(), enables, remedy }
        });
        Self { kernel: limits::kernel_release(), features: features.collect() }
    }

    /// Whether a feature works here.
    #[must_use]
    pub fn works(&self, name: FeatureName) -> bool {
        self.features.iter().any(|feature| feature.name == name && feature.works)
    }
}

/// Whether soft-dirty bits work, tried at the first call: an untried kernel may show every page clean.
///
/// # Errors
/// What happened instead.
pub fn soft_dirty() -> Result<(), String> {
    static TRIED: OnceLock<Result<(), String>> = OnceLock::new();
    TRIED.get_or_init(tracking::soft_dirty).clone()
}

/// Whether asynchronous write protection works, tried at the first call.
///
/// # Errors
/// What happened instead.
pub fn uffd_wp() -> Result<(), String> {
    static TRIED: OnceLock<Result<(), String>> = OnceLock::new();
    TRIED.get_or_init(tracking::uffd_wp_async).clone()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_feature_is_tried_once_and_says_why_it_fails() {
        let features = Features::probe();
        let mut names: Vec<&str> = features.features.iter().map(|f| f.name.name()).collect();
        for feature in &features.features {
            assert_eq!(feature.works, feature.reason.is_none(), "{feature:?}");
            assert_eq!(serde_json::to_value(feature.name).unwrap(), feature.name.name());
        }
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), 19);
        // What every kernel of the test bed has.
        for name in
            [FeatureName::PtraceSeize, FeatureName::ProcMem, FeatureName::Pidfd, FeatureName::Vmsplice]
        {
            assert!(features.works(name), "{:?}", features.features);
        }
        assert!(features.works(FeatureName::SoftDirty) || features.works(FeatureName::UffdWpAsync));
    }
}
