//! What is decided about pages, and how each class of memory is handled.

use crate::addr::AddrRange;
use crate::kernel::maps::{Prot, Vma};

use super::classify::{PrivateKind, VmaClass, VmaFacts};

/// How the pages of an area come into a checkpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Handling {
    /// Its private pages are saved, or inherited where they are clean.
    Tracked,
    /// Its private pages are saved every time: no tracker sees all that happens to them.
    Always,
    /// All of it is saved every time, whoever's pages they are.
    Whole,
    /// Nothing of it is saved.
    Nothing,
}

/// An area of the address space, as far as its pages are concerned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Area {
    /// Its addresses, of whole pages.
    pub range: AddrRange,
    /// How its pages are handled.
    pub handling: Handling,
    /// PROT_READ: a parasite can vmsplice(2) it. The rest is read through `/proc/PID/mem`.
    pub readable: bool,
    /// Its pages may be restored on first access.
    pub lazy: bool,
}

impl Area {
    /// The area of `vma`, which is of `class`.
    #[must_use]
    pub fn new(vma: &Vma, class: VmaClass, facts: VmaFacts) -> Self {
        let anonymous = matches!(class, VmaClass::Private(_)) && vma.is_anonymous();
        Self {
            range: vma.range,
            handling: class.handling(),
            readable: vma.prot.contains(Prot::READ),
            lazy: anonymous && !facts.locked,
        }
    }

    /// Its pages may be written where no tracker sees it: by asynchronous I/O that was under way when the dirty state
    /// was read, and lands later in a page that reads clean (docs/soundness.md, row 34).
    pub fn distrust(&mut self) {
        if self.handling == Handling::Tracked {
            self.handling = Handling::Always;
        }
    }
}

impl VmaClass {
    /// How memory of this class is handled.
    #[must_use]
    pub fn handling(self) -> Handling {
        match self {
            Self::Private(PrivateKind::Hugetlb | PrivateKind::Mergeable | PrivateKind::Droppable) => {
                Handling::Always
            }
            Self::Private(_) => Handling::Tracked,
            Self::Vdso | Self::AioRing => Handling::Whole,
            Self::SharedFile
            | Self::SharedAnon(_)
            | Self::Vvar
            | Self::Vsyscall
            | Self::Uprobes
            | Self::Refused(_) => Handling::Nothing,
        }
    }
}

/// Where a page of the new checkpoint comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum PageAction {
    /// Its bytes are saved now.
    Dump,
    /// It is left to the parent.
    Inherit,
}

/// A run of pages of the new checkpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PlannedRun {
    /// Its addresses.
    pub range: AddrRange,
    /// Where they come from.
    pub action: PageAction,
    /// They may be restored on first access.
    pub lazy: bool,
}
