//! The table of hooks: what there is to learn, the ways to, and the facts that each gives.

use std::fmt;

use super::hooks::{Fact, HookChoice};

/// A place in the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Point {
    /// A tracepoint, by BTF.
    Tracepoint(&'static str),
    /// A function's return with its arguments (fexit).
    Exit(&'static str),
    /// A function's entry (kprobe).
    ProbeEntry(&'static str),
    /// A function's return (kretprobe).
    ProbeReturn(&'static str),
}

impl Point {
    /// The function, where it is one.
    pub(super) const fn function(self) -> Option<&'static str> {
        match self {
            Self::Tracepoint(_) => None,
            Self::Exit(f) | Self::ProbeEntry(f) | Self::ProbeReturn(f) => Some(f),
        }
    }
}

impl fmt::Display for Point {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tracepoint(name) => write!(f, "tp_btf/{name}"),
            Self::Exit(name) => write!(f, "fexit/{name}"),
            Self::ProbeEntry(name) => write!(f, "kprobe/{name}"),
            Self::ProbeReturn(name) => write!(f, "kretprobe/{name}"),
        }
    }
}

/// When an alternative applies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum When {
    Always,
    /// Per-VMA locks: faults do not take the mmap lock (Linux 6.4). The tracepoint passes (mm, write, success).
    PerVmaLocks,
    /// The same, but (mm, memcg_path, write, success), as in 6.12.
    PerVmaLocksAndPath,
    NoPerVmaLocks,
    /// Per-VMA locks, and whatever a system call does to memory shows at the mmap lock, or when every page is read: from
    /// 6.16 on madvise and process_madvise drop pages under a VMA's own lock (struct madvise_behavior is as old).
    MmapLockTells,
}

/// One way to serve a purpose: all its programs, or none.
#[derive(Debug)]
pub(super) struct Way {
    /// [`HookChoice::Auto`]: whatever was chosen.
    pub(super) family: HookChoice,
    pub(super) when: When,
    /// Facts without which its programs do not work.
    pub(super) needs: &'static [Fact],
    pub(super) programs: &'static [(&'static str, Point)],
    pub(super) gives: &'static [Fact],
}

/// Something to learn, and the ways to, best first.
#[derive(Debug)]
pub(super) struct Purpose {
    pub(super) name: &'static str,
    /// The parameters that the programs rely on, in order from the first; checked against BTF.
    pub(super) parameters: &'static [&'static str],
    /// Where the kernel has no such function there is nothing to hook.
    pub(super) may_be_absent: bool,
    /// A fact that others give and that does not hold unless this is hooked too, where there is something to hook.
    pub(super) completes: Option<Fact>,
    pub(super) ways: &'static [Way],
}

const fn way(family: HookChoice, programs: &'static [(&'static str, Point)], gives: &'static [Fact]) -> Way {
    Way { family, when: When::Always, needs: &[], programs, gives }
}

/// Of no family, under a condition.
const fn on(
    when: When,
    needs: &'static [Fact],
    programs: &'static [(&'static str, Point)],
    gives: &'static [Fact],
) -> Way {
    Way { family: Auto, when, needs, programs, gives }
}

use HookChoice::{Auto, Fentry, Kprobe};
use Point::{Exit, ProbeEntry, ProbeReturn, Tracepoint};

/// Its argument 0 is the mm that was locked.
pub(super) const LOCK_TRACEPOINT: &str = "mmap_lock_acquire_returned";
/// Its argument 0 is the mm that is unlocked at once.
pub(super) const UNLOCK_TRACEPOINT: &str = "mmap_lock_released";
/// Where layout calls are told at the mmap lock, this is hooked.
pub(super) const BY_LOCK_POINT: Point = Tracepoint("vm_unmapped_area");

/// Everything that the agent hooks.
pub(super) const PURPOSES: &[Purpose] = &[
    Purpose {
        name: "faults",
        parameters: &["vma", "address", "flags", "regs"],
        may_be_absent: false,
        completes: None,
        ways: &[
            way(
                Fentry,
                &[("fault_return", Exit("handle_mm_fault"))],
                &[Fact::OwnFaults, Fact::RemoteFaults, Fact::FaultsAtReturn],
            ),
            way(
                Kprobe,
                &[("fault_entry", ProbeEntry("handle_mm_fault"))],
                &[Fact::OwnFaults, Fact::RemoteFaults],
            ),
            way(
                HookChoice::Tracepoint,
                &[
                    ("fault_user", Tracepoint("page_fault_user")),
                    ("fault_kernel", Tracepoint("page_fault_kernel")),
                ],
                &[Fact::OwnFaults],
            ),
        ],
    },
    Purpose {
        name: "unmapped pages",
        parameters: &["tlb", "vma", "addr", "end"],
        may_be_absent: false,
        completes: None,
        ways: &[
            way(Fentry, &[("unmap_return", Exit("unmap_page_range"))], &[Fact::Zaps]),
            way(
                Kprobe,
                &[
                    ("unmap_entry", ProbeEntry("unmap_page_range")),
                    ("unmap_done", ProbeReturn("unmap_page_range")),
                ],
                &[Fact::Zaps],
            ),
        ],
    },
    // The compiler may have inlined unmap_page_range into these, which live in the same file.
    Purpose {
        name: "zapped pages",
        parameters: &["vma", "address", "size"],
        may_be_absent: true,
        completes: Some(Fact::Zaps),
        ways: &[
            way(Fentry, &[("zap_return", Exit("zap_page_range_single"))], &[]),
            way(
                Kprobe,
                &[
                    ("zap_entry", ProbeEntry("zap_page_range_single")),
                    ("zap_done", ProbeReturn("zap_page_range_single")),
                ],
                &[],
            ),
        ],
    },
    Purpose {
        name: "zapped pages, batched",
        parameters: &["tlb", "vma", "address", "size"],
        may_be_absent: true,
        completes: Some(Fact::Zaps),
        ways: &[
            way(Fentry, &[("zap_batched_return", Exit("zap_page_range_single_batched"))], &[]),
            way(
                Kprobe,
                &[
                    ("zap_batched_entry", ProbeEntry("zap_page_range_single_batched")),
                    ("zap_done", ProbeReturn("zap_page_range_single_batched")),
                ],
                &[],
            ),
        ],
    },
    Purpose {
        name: "huge-page collapses",
        parameters: &["mm", "address"],
        // Without CONFIG_TRANSPARENT_HUGEPAGE there are none.
        may_be_absent: true,
        completes: None,
        ways: &[
            way(Fentry, &[("collapse_return", Exit("collapse_huge_page"))], &[Fact::Collapses]),
            way(Kprobe, &[("collapse_entry", ProbeEntry("collapse_huge_page"))], &[Fact::Collapses]),
            way(Auto, &[("collapse_seen", Tracepoint("mm_collapse_huge_page"))], &[Fact::Collapses]),
        ],
    },
    Purpose {
        name: "madvise by any route",
        parameters: &["mm", "start", "len_in", "behavior"],
        may_be_absent: false,
        completes: None,
        ways: &[
            way(Fentry, &[("madvise_return", Exit("do_madvise"))], &[Fact::AnyMadvise]),
            way(
                Kprobe,
                &[("madvise_entry", ProbeEntry("do_madvise")), ("madvise_done", ProbeReturn("do_madvise"))],
                &[Fact::AnyMadvise],
            ),
        ],
    },
    Purpose {
        name: "VMA generation",
        parameters: &[],
        may_be_absent: false,
        completes: None,
        ways: &[
            on(When::PerVmaLocks, &[], &[("lock_taken", Tracepoint(LOCK_TRACEPOINT))], &[Fact::Generation]),
            on(
                When::PerVmaLocksAndPath,
                &[],
                &[("lock_taken_with_path", Tracepoint(LOCK_TRACEPOINT))],
                &[Fact::Generation],
            ),
            on(When::NoPerVmaLocks, &[], &[("tree_written", Tracepoint("ma_write"))], &[Fact::Generation]),
        ],
    },
    Purpose {
        name: "the mmap lock's release",
        parameters: &[],
        may_be_absent: false,
        completes: None,
        // None without per-VMA locks, as every fault would pay for it.
        ways: &[
            on(
                When::PerVmaLocks,
                &[Fact::Generation],
                &[("lock_released", Tracepoint(UNLOCK_TRACEPOINT))],
                &[Fact::ForeignWrites, Fact::ForeignClears],
            ),
            on(
                When::PerVmaLocksAndPath,
                &[Fact::Generation],
                &[("lock_released_with_path", Tracepoint(UNLOCK_TRACEPOINT))],
                &[Fact::ForeignWrites, Fact::ForeignClears],
            ),
        ],
    },
    // Not the functions that get pages for them: those have more arguments than a trampoline takes.
    Purpose {
        name: "accesses by others",
        parameters: &[],
        may_be_absent: false,
        completes: None,
        ways: &[Way {
            family: Fentry,
            when: When::NoPerVmaLocks,
            needs: &[],
            programs: &[
                ("remote_mm", Exit("mm_access")),
                ("remote_memory", Exit("access_remote_vm")),
                ("remote_word", Exit("__access_remote_vm")),
            ],
            gives: &[Fact::ForeignWrites],
        }],
    },
    Purpose {
        name: "layout calls",
        parameters: &[],
        may_be_absent: false,
        completes: None,
        ways: &[
            on(
                When::MmapLockTells,
                &[Fact::Generation, Fact::ForeignWrites],
                &[("area_found", BY_LOCK_POINT)],
                &[Fact::LayoutCalls],
            ),
            // Every system call of the machine goes the slow way while this is attached.
            way(Auto, &[("call_return", Tracepoint("sys_exit"))], &[Fact::LayoutCalls]),
        ],
    },
    Purpose {
        name: "io_uring rings made",
        parameters: &[],
        may_be_absent: true,
        completes: Some(Fact::LayoutCalls),
        ways: &[on(
            When::MmapLockTells,
            &[Fact::LayoutCalls],
            &[("ring_made", Tracepoint("io_uring_create"))],
            &[],
        )],
    },
    Purpose {
        name: "io_uring registrations",
        parameters: &[],
        may_be_absent: true,
        completes: Some(Fact::LayoutCalls),
        ways: &[on(
            When::MmapLockTells,
            &[Fact::LayoutCalls],
            &[("ring_registered", Tracepoint("io_uring_register"))],
            &[],
        )],
    },
    Purpose {
        name: "end of the mm",
        parameters: &[],
        may_be_absent: false,
        completes: None,
        ways: &[way(Auto, &[("mm_exit", Tracepoint("exit_mmap"))], &[Fact::End])],
    },
    Purpose {
        name: "exec",
        parameters: &[],
        may_be_absent: false,
        completes: None,
        ways: &[way(Auto, &[("exec", Tracepoint("sched_process_exec"))], &[Fact::Exec])],
    },
];
