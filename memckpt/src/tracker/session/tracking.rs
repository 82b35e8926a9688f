//! The dirty source of a session, and what must be done around it.

use std::os::fd::{AsRawFd, OwnedFd};

use crate::addr::AddrRange;
use crate::kernel::clear_refs;
use crate::kernel::maps::Vma;
use crate::range_set::RangeSet;
use crate::tracker::dirty::{DirtyError, DirtySource, SoftDirty, TrackerKind, UffdWp, Verdict, Witness};
use crate::tracker::epoch::Broken;
use crate::tracker::uffd::WriteProtect;

/// What tells dirty pages.
pub(super) enum Tracking {
    /// The kernel's soft-dirty bits; the witness tells when somebody else clears them.
    SoftDirty { source: SoftDirty, witness: Option<Witness> },
    /// Asynchronous write-protection. Dropping it unregisters everything.
    UffdWp {
        source: UffdWp,
        protect: WriteProtect,
        number: i32,
        /// Where registering was tried: a second time would take the protection off all pages.
        registered: RangeSet,
    },
    /// Nothing: everything counts as dirty.
    Nothing,
}

impl Tracking {
    pub(super) fn soft_dirty(pid: i32) -> Result<Self, DirtyError> {
        Ok(Self::SoftDirty { source: SoftDirty::open(pid)?, witness: None })
    }

    pub(super) fn uffd_wp(pid: i32, userfaultfd: OwnedFd) -> Result<Self, DirtyError> {
        let number = userfaultfd.as_raw_fd();
        let (source, protect) = (UffdWp::open(pid)?, WriteProtect::adopt(userfaultfd, pid)?);
        Ok(Self::UffdWp { source, protect, number, registered: RangeSet::new() })
    }

    pub(super) fn kind(&self) -> Option<TrackerKind> {
        match self {
            Self::SoftDirty { .. } => Some(TrackerKind::SoftDirty),
            Self::UffdWp { .. } => Some(TrackerKind::UffdWp),
            Self::Nothing => None,
        }
    }

    pub(super) fn source(&mut self) -> Option<&mut dyn DirtySource> {
        match self {
            Self::SoftDirty { source, .. } => Some(source),
            Self::UffdWp { source, .. } => Some(source),
            Self::Nothing => None,
        }
    }

    /// The number of the userfaultfd, where there is one.
    pub(super) fn userfaultfd(&self) -> Option<i32> {
        match self {
            Self::UffdWp { number, .. } => Some(*number),
            _ => None,
        }
    }

    /// Whether memory of this kind can be inherited at all, and so is worth registering. Shared memory is written
    /// through other page tables too; the vDSO and its data are the kernel's.
    pub(super) fn is_trackable(vma: &Vma) -> bool {
        !vma.shared && !vma.name.starts_with("[v") && vma.name != "[uprobes]"
    }

    /// Registers what of `vmas` is not yet, where that is needed at all, and returns it; in `renewed` they may be other ones than those
    /// that were registered. What cannot be (a special mapping, somebody else's userfaultfd) scans as dirty.
    ///
    /// The target is frozen. Registering cuts VMAs at the ends of the range, so that `vmas` must be what is mapped now:
    ///
    /// | target | session |
    /// |---|---|
    /// | maps A..B | |
    /// | | reads the mappings: A..B is new |
    /// | unmaps A..B, maps A..C | |
    /// | | registers A..B: A..B and B..C are two now |
    /// | mremap(2) of A..C: EFAULT | |
    pub(super) fn register_new(&mut self, vmas: &[Vma], renewed: &RangeSet) -> RangeSet {
        let Self::UffdWp { protect, registered, .. } = self else { return RangeSet::new() };
        registered.subtract(renewed);
        let trackable = vmas.iter().filter(|vma| Self::is_trackable(vma));
        let pieces: Vec<AddrRange> = trackable.flat_map(|vma| registered.outside(vma.range)).collect();
        // One call for all that lie side by side: the target waits.
        let new: RangeSet = pieces.iter().copied().collect();
        for run in new.iter() {
            if protect.register(run).is_err() {
                // Registered is all of it or nothing: which is it?
                for piece in pieces.iter().filter(|piece| piece.overlaps(run)) {
                    if let Err(e) = protect.register(*piece) {
                        tracing::debug!(range = %piece, "not registered: {e}");
                    }
                }
            }
        }
        registered.union(&new);
        new
    }

    /// Clears the dirty state of all of `ranges`; the target is frozen.
    pub(super) fn clear(&mut self, pid: i32, ranges: &[AddrRange]) -> Result<(), DirtyError> {
        match self {
            Self::SoftDirty { .. } => Ok(clear_refs::clear_soft_dirty(pid)?),
            Self::UffdWp { source, .. } => source.clear(ranges),
            Self::Nothing => Ok(()),
        }
    }

    /// After a clear, the target still frozen: sets the trap for the next foreign one. `events_tell`: writes to
    /// clear_refs are events too, so that a process without a fit page can do without.
    pub(super) fn arm(&mut self, vmas: &[Vma], pid: i32, events_tell: bool) -> Result<(), Broken> {
        let Self::SoftDirty { witness, .. } = self else { return Ok(()) };
        *witness = None;
        *witness = Witness::arm(pid, vmas).map_err(|e| Broken::NoWitness(e.to_string()))?;
        if witness.is_some() || events_tell {
            Ok(())
        } else {
            Err(Broken::NoWitness(
                "it has no read-only page of its own, and no hook sees clear_refs".to_owned(),
            ))
        }
    }

    /// Whether the dirty state is still that of our last clear, as far as can be told without events.
    pub(super) fn vouch(&self) -> Result<(), Broken> {
        let Self::SoftDirty { witness: Some(witness), .. } = self else { return Ok(()) };
        match witness.verdict() {
            Ok(Verdict::Undisturbed) => Ok(()),
            Ok(Verdict::Cleared) => Err(Broken::ForeignClear),
            Ok(Verdict::Lost) => Err(Broken::NoWitness("the page that told is gone".to_owned())),
            Err(e) => Err(Broken::NoWitness(e.to_string())),
        }
    }

    /// Whether the absence of a clear since the last [`Self::arm`] can be proven, as far as the dirty source goes.
    /// Write-protection has no such proof.
    pub(super) fn is_untouched(&self, events_tell: bool) -> bool {
        match self {
            Self::SoftDirty { witness: Some(witness), .. } => {
                matches!(witness.verdict(), Ok(Verdict::Undisturbed))
            }
            // Then a clear is an event, and the record has it.
            Self::SoftDirty { witness: None, .. } => events_tell,
            _ => false,
        }
    }
}

impl std::fmt::Debug for Tracking {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Tracking").field(&self.kind()).finish()
    }
}
