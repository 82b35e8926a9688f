//! The target's layout with each VMA's class: what is dumped, what is only recorded, what is refused.

use crate::addr::AddrRange;
use crate::image::meta::AsyncIo;
use crate::kernel::maps::Vma;
use crate::kernel::smaps::{self, VmFlags};
use crate::plan::{Area, SharedKind, VmaClass, VmaFacts, classify};
use crate::range_set::RangeSet;
use crate::tracker::dirty::TrackerKind;
use crate::tracker::model::Relayout;

use super::error::DumpError;
use super::refuse;

/// What our own tracking sets: it registers for write protection, and nothing else.
const OWN_UFFD: VmFlags = VmFlags::UFFD_WP;

/// VMAs and their classes, in address order.
pub(super) struct Layout {
    pub(super) vmas: Vec<Vma>,
    pub(super) classes: Vec<(VmaClass, VmaFacts)>,
    /// What plan needs of each.
    pub(super) areas: Vec<Area>,
    flags: Vec<(AddrRange, VmFlags)>,
    /// It had an io_uring at the last look at its descriptors.
    io_uring: bool,
}

impl Layout {
    /// Classifies `vmas` by their VmFlags and refuses what cannot be captured. With a uffd-wp session, `tracker`, the
    /// registrations are ours and not the target's.
    ///
    /// Reads smaps, which costs time in proportion to the resident memory: before the freeze.
    pub(super) fn read(pid: i32, vmas: Vec<Vma>, tracker: Option<TrackerKind>) -> Result<Self, DumpError> {
        let mut flags = smaps::vm_flags(pid)?;
        if tracker == Some(TrackerKind::UffdWp) {
            flags.iter_mut().for_each(|(_, f)| f.remove(OWN_UFFD));
        }
        Self::classify(pid, vmas, flags, refuse::has_io_uring(pid))
    }

    /// The layout as it is now, in the freeze. smaps is read again only where a line of maps does not tell a new
    /// VMA's class: private anonymous memory that was never there before needs no flags.
    pub(super) fn updated(
        self,
        pid: i32,
        relayout: Relayout,
        tracker: Option<TrackerKind>,
    ) -> Result<Self, DumpError> {
        let vmas = relayout.apply(&self.vmas);
        let unclear = |v: &Vma| (v.shared || !v.is_anonymous()) && !self.was_there(v);
        if vmas.iter().any(unclear) {
            Self::read(pid, vmas, tracker)
        } else {
            Self::classify(pid, vmas, self.flags, self.io_uring)
        }
    }

    /// Whether `vma` is one that was there before, or a part of it.
    fn was_there(&self, vma: &Vma) -> bool {
        let at = self.vmas.partition_point(|old| old.range.end <= vma.range.start);
        self.vmas.get(at).is_some_and(|old| {
            old.range.start <= vma.range.start
                && vma.range.end <= old.range.end
                && (old.shared, old.dev, old.inode) == (vma.shared, vma.dev, vma.inode)
        })
    }

    fn classify(
        pid: i32,
        vmas: Vec<Vma>,
        flags: Vec<(AddrRange, VmFlags)>,
        io_uring: bool,
    ) -> Result<Self, DumpError> {
        let mut classes = Vec::with_capacity(vmas.len());
        let mut areas = Vec::with_capacity(vmas.len());
        for vma in &vmas {
            let facts = facts(&flags, vma.range);
            let class = classify(vma, facts);
            refuse::mapping(pid, vma, class)?;
            classes.push((class, facts));
            areas.push(Area::new(vma, class, facts));
        }
        Ok(Self { vmas, classes, areas, flags, io_uring })
    }

    /// Its asynchronous I/O, in the freeze: `made` an io_uring since the parent was taken, at which it had `before`.
    /// While any may be under way, or may have been at the parent, no page can be trusted to be what it was.
    pub(super) fn look_for_async_io(&mut self, pid: i32, made: bool, before: AsyncIo) -> AsyncIo {
        self.io_uring |= made && refuse::has_io_uring(pid);
        let aio = self.classes.iter().any(|(class, _)| *class == VmaClass::AioRing);
        let now = match before {
            _ if self.io_uring || aio => AsyncIo::Present,
            AsyncIo::Present => AsyncIo::Ending,
            _ if made => AsyncIo::Ending,
            _ => AsyncIo::None,
        };
        if now != AsyncIo::None || before != AsyncIo::None {
            self.areas.iter_mut().for_each(Area::distrust);
        }
        now
    }

    /// The VMAs with their classes.
    pub(super) fn iter(&self) -> impl Iterator<Item = (&Vma, VmaClass, VmaFacts)> {
        self.vmas.iter().zip(&self.classes).map(|(vma, (class, facts))| (vma, *class, *facts))
    }

    /// The advice of madvise(2) that `vma` is under, as it was before the freeze: a bit for each, by its number.
    pub(super) fn advice(&self, vma: &Vma) -> u64 {
        /// What lasts, and shows in smaps.
        const LASTING: [(VmFlags, i32); 8] = [
            (VmFlags::RANDOM_READ, libc::MADV_RANDOM),
            (VmFlags::SEQUENTIAL_READ, libc::MADV_SEQUENTIAL),
            (VmFlags::DONT_COPY, libc::MADV_DONTFORK),
            (VmFlags::MERGEABLE, libc::MADV_MERGEABLE),
            (VmFlags::HUGE_PAGE, libc::MADV_HUGEPAGE),
            (VmFlags::NO_HUGE_PAGE, libc::MADV_NOHUGEPAGE),
            (VmFlags::DONT_DUMP, libc::MADV_DONTDUMP),
            (VmFlags::WIPE_ON_FORK, libc::MADV_WIPEONFORK),
        ];
        let at = self.flags.partition_point(|(range, _)| range.end <= vma.range.start);
        let flags = self.flags.get(at).filter(|(range, _)| range.start <= vma.range.start);
        let flags = flags.map_or(VmFlags::empty(), |(_, flags)| *flags);
        LASTING.iter().filter(|(flag, _)| flags.contains(*flag)).fold(0, |all, (_, advice)| all | 1 << advice)
    }

    /// What is locked page by page, as they come.
    pub(super) fn locked_on_fault(&self) -> RangeSet {
        self.iter().filter(|(.., facts)| facts.locked_on_fault).map(|(vma, ..)| vma.range).collect()
    }

    /// Private memory: what a dirty source can track.
    pub(super) fn private(&self) -> RangeSet {
        self.iter()
            .filter(|(_, class, _)| matches!(class, VmaClass::Private(_)))
            .map(|(vma, ..)| vma.range)
            .collect()
    }

    /// Shared memory that belongs to no file, and so is nowhere but in the process.
    pub(super) fn shared_anonymous(&self) -> impl Iterator<Item = (&Vma, SharedKind)> {
        self.iter().filter_map(|(vma, class, _)| match class {
            VmaClass::SharedAnon(kind) => Some((vma, kind)),
            _ => None,
        })
    }
}

/// The flags of all VMAs that `range` shares an address with: a VMA that was split or merged since smaps was read keeps
/// what its parts had.
fn facts(flags: &[(AddrRange, VmFlags)], range: AddrRange) -> VmaFacts {
    let from = flags.partition_point(|(r, _)| r.end <= range.start);
    let all = flags[from..]
        .iter()
        .take_while(|(r, _)| r.start < range.end)
        .fold(VmFlags::empty(), |all, (_, f)| all | *f);
    VmaFacts {
        nonlinear: all.contains(VmFlags::NON_LINEAR),
        io: all.contains(VmFlags::IO),
        pfnmap: all.contains(VmFlags::PFN_MAP),
        hugetlb: all.contains(VmFlags::HUGETLB),
        uffd: all.intersects(VmFlags::UFFD_MISSING.union(VmFlags::UFFD_WP).union(VmFlags::UFFD_MINOR)),
        mergeable: all.contains(VmFlags::MERGEABLE),
        grows_down: all.contains(VmFlags::GROWS_DOWN),
        locked: all.contains(VmFlags::LOCKED),
        // Which 6.1 has no letters for, and shows as `??`.
        locked_on_fault: all.contains(VmFlags::LOCKED_ON_FAULT)
            || all.contains(VmFlags::LOCKED.union(VmFlags::UNKNOWN)),
        no_reserve: all.contains(VmFlags::NO_RESERVE),
        droppable: all.contains(VmFlags::DROPPABLE),
        wipe_on_fork: all.contains(VmFlags::WIPE_ON_FORK),
        shadow_stack: all.contains(VmFlags::SHADOW_STACK),
    }
}
