//! What the agent knows, given the hooks that are attached.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::table::{BY_LOCK_POINT, PURPOSES};

/// How kernel functions are hooked.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum HookChoice {
    /// The best that works, hook by hook.
    #[default]
    Auto,
    /// BPF trampolines (Linux 5.5 with BTF).
    Fentry,
    /// kprobes and kretprobes (CONFIG_KPROBES).
    Kprobe,
    /// Tracepoints alone: faults taken on behalf of other tasks, and zaps, are not seen.
    Tracepoint,
}

/// Something that the agent knows for sure while it is attached.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Fact {
    /// Faults that the target's own threads take.
    OwnFaults,
    /// Faults that others take in the target: process_vm_writev, ptrace, `/proc/PID/mem`, io_uring, AIO.
    RemoteFaults,
    /// Faults are marked when handle_mm_fault returns, so that a pre-dump needs no freeze.
    FaultsAtReturn,
    /// Pages dropped, by whomever.
    Zaps,
    /// Small pages collapsed into a writable huge page.
    Collapses,
    /// Layout system calls of the target, with arguments and, where they are hooked at their return, results.
    LayoutCalls,
    /// madvise by any route: io_uring, process_madvise.
    AnyMadvise,
    /// The VMA generation moves with each change of the layout.
    Generation,
    /// The end of the mm.
    End,
    /// exec, at once.
    Exec,
    /// System calls by which another task may have written into the target, or may be writing still. Others run on while
    /// the target is frozen, and what they write between the scan and the clear is in no bit afterwards.
    ForeignWrites,
    /// Another task's write to the target's clear_refs, at once.
    ForeignClears,
    /// Every hook run that the kernel skipped is counted.
    MissesCounted,
}

impl Fact {
    /// What the tracker spares because of it, or what it could not do without.
    #[must_use]
    pub const fn spares(self) -> &'static str {
        match self {
            Self::OwnFaults => "reading chunks in which the target did not fault",
            Self::RemoteFaults => "reading chunks in which nobody else faulted for it",
            Self::FaultsAtReturn => "a freeze before reading what was touched",
            Self::Zaps => "reading chunks of which no page was dropped",
            Self::Collapses => "reading chunks that were not made huge pages",
            Self::LayoutCalls => "dumping whole the mappings that no call changed",
            Self::AnyMadvise => "nothing: it says which madvise it was",
            Self::Generation => "reading /proc/PID/maps while the layout stays as it is",
            Self::End => "asking whether the address space is still there",
            Self::Exec => "nothing: it ends the epoch at once, where the end of the mm would",
            Self::ForeignWrites => "dumping whole what nobody else was writing while it was read",
            Self::ForeignClears => "nothing: it ends the epoch at once, where the witness page would",
            Self::MissesCounted => "reading everything although no hook was missed",
        }
    }
}

/// What fault hints are worth.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "mode")]
pub enum HintMode {
    /// Whatever the hooks did not mark did not change: scans may be narrowed.
    Complete,
    /// Hints are good for showing, not for skipping.
    Incomplete {
        /// What is not known.
        missing: Vec<Fact>,
    },
    /// No hook sees faults.
    None,
}

/// What [`HintMode::Complete`] needs.
const COMPLETE: &[Fact] = &[
    Fact::OwnFaults,
    Fact::RemoteFaults,
    Fact::Zaps,
    Fact::Collapses,
    Fact::LayoutCalls,
    Fact::Generation,
    Fact::End,
    Fact::MissesCounted,
];

/// A way that did not work.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Refusal {
    /// Program type and place: `fexit/handle_mm_fault`.
    pub hook: String,
    /// Why not.
    pub reason: String,
}

/// What came of one purpose.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HookState {
    /// What it is for.
    pub purpose: String,
    /// The hooks that are attached: `fexit/handle_mm_fault`. Empty: none.
    pub attached: Vec<String>,
    /// The facts that they give by themselves. Where the kernel lacks what there would be to hook, those that hold anyway.
    pub gives: Vec<Fact>,
    /// The family of the attached hooks; `auto` for those that every choice uses.
    pub family: Option<HookChoice>,
    /// What was tried before, and what stood in the way.
    pub refused: Vec<Refusal>,
}

/// Which hooks are attached and what they tell.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct HookReport {
    /// One entry a purpose.
    pub hooks: Vec<HookState>,
    /// What is known.
    pub facts: BTreeSet<Fact>,
    /// Facts that a hook promised and the self-test, or the kernel, did not keep: why.
    pub withdrawn: BTreeMap<Fact, String>,
}

impl HookReport {
    /// Whether `fact` is known.
    #[must_use]
    pub fn knows(&self, fact: Fact) -> bool {
        self.facts.contains(&fact)
    }

    /// What fault hints are worth.
    #[must_use]
    pub fn hint_mode(&self) -> HintMode {
        if !self.knows(Fact::OwnFaults) {
            return HintMode::None;
        }
        let missing: Vec<Fact> = COMPLETE.iter().copied().filter(|f| !self.knows(*f)).collect();
        if missing.is_empty() { HintMode::Complete } else { HintMode::Incomplete { missing } }
    }

    /// Whether layout calls are told when they let go of the mmap lock, and not when they return.
    #[must_use]
    pub fn layout_by_lock(&self) -> bool {
        self.hooks.iter().any(|h| h.attached.iter().any(|a| *a == BY_LOCK_POINT.to_string()))
    }

    /// The family that faults are hooked by: what `memckpt check` and the table call the hook mode.
    #[must_use]
    pub fn family(&self) -> Option<HookChoice> {
        self.hooks.iter().find(|h| h.purpose == PURPOSES[0].name)?.family
    }

    pub(super) fn withdraw(&mut self, fact: Fact, reason: impl Into<String>) {
        if self.facts.remove(&fact) {
            self.withdrawn.insert(fact, reason.into());
        }
    }
}

impl fmt::Display for HookChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Auto => "auto",
            Self::Fentry => "fentry",
            Self::Kprobe => "kprobe",
            Self::Tracepoint => "tracepoint",
        })
    }
}

impl FromStr for HookChoice {
    type Err = String;
    fn from_str(s: &str) -> Result<Self, String> {
        match s {
            "auto" => Ok(Self::Auto),
            "fentry" => Ok(Self::Fentry),
            "kprobe" => Ok(Self::Kprobe),
            "tracepoint" => Ok(Self::Tracepoint),
            _ => Err(format!("{s:?} is none of auto, fentry, kprobe, tracepoint")),
        }
    }
}

impl fmt::Display for Fact {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::OwnFaults => "own faults",
            Self::RemoteFaults => "faults by others",
            Self::FaultsAtReturn => "faults at their return",
            Self::Zaps => "dropped pages",
            Self::Collapses => "huge-page collapses",
            Self::LayoutCalls => "layout calls",
            Self::AnyMadvise => "madvise by any route",
            Self::Generation => "VMA generation",
            Self::End => "end of the address space",
            Self::Exec => "exec",
            Self::ForeignWrites => "writes by others",
            Self::ForeignClears => "clears by others",
            Self::MissesCounted => "count of missed hook runs",
        })
    }
}

impl fmt::Display for HintMode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Complete => f.write_str("complete"),
            Self::Incomplete { missing } => {
                f.write_str("incomplete (not seen: ")?;
                for (i, fact) in missing.iter().enumerate() {
                    write!(f, "{}{fact}", if i == 0 { "" } else { ", " })?;
                }
                f.write_str(")")
            }
            Self::None => f.write_str("none"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn complete_needs_every_fact_and_none_means_no_faults() {
        let mut report = HookReport { facts: COMPLETE.iter().copied().collect(), ..HookReport::default() };
        assert_eq!(report.hint_mode(), HintMode::Complete);
        for fact in COMPLETE {
            let mut less = report.clone();
            less.withdraw(*fact, "test");
            let expected = if *fact == Fact::OwnFaults {
                HintMode::None
            } else {
                HintMode::Incomplete { missing: vec![*fact] }
            };
            assert_eq!(less.hint_mode(), expected);
            assert_eq!(less.withdrawn[fact], "test");
        }
        report.facts.clear();
        assert_eq!(report.hint_mode(), HintMode::None);
    }

    #[test]
    fn every_required_fact_but_the_count_of_misses_has_a_hook() {
        for fact in COMPLETE.iter().filter(|f| **f != Fact::MissesCounted) {
            assert!(PURPOSES.iter().flat_map(|p| p.ways).any(|w| w.gives.contains(fact)), "{fact}");
        }
    }

    #[test]
    fn choices_survive_their_text() {
        for choice in [HookChoice::Auto, HookChoice::Fentry, HookChoice::Kprobe, HookChoice::Tracepoint] {
            assert_eq!(choice.to_string().parse(), Ok(choice));
        }
        assert!("ebpf".parse::<HookChoice>().is_err());
    }
}
