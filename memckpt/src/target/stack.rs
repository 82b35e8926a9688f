//! Where the way home can lie: memory outside the parasite's segment that is the target's own and that nobody misses.
//!
//! That is below the red zone of a thread on a real stack. Fibers and goroutines have stacks of 2 KiB amid a heap, so
//! a stack counts only if it is the main thread's, or if a guard lies below it. Failing that, zeroes at the bottom of
//! the main thread's stack, far from all that is in use.

use super::blob::Frame;
use crate::addr::{Addr, AddrRange, PAGE_SIZE};
use crate::kernel::maps::{Prot, Vma};

/// What the x86-64 psABI lets a leaf function use below its stack pointer.
const RED_ZONE: u64 = 128;
/// Larger inaccessible areas are not guards: malloc and Go keep theirs below memory of any kind.
const GUARD_MAX: u64 = 1 << 20;
/// Heaps of glibc's malloc (HEAP_MAX_SIZE) start at multiples of this, and another's inaccessible rest may lie below.
const MALLOC_HEAP: u64 = 64 << 20;
/// Pages at the bottom of the main stack that may serve, and how far above them anything may be in use.
const SPARE_PAGES: u64 = 16;
const DISTANCE: u64 = 32 << 10;

/// A place for the way home.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Place {
    /// The frame that is to be taken when nothing but the segment is to be got rid of; see `chain.rs`.
    pub(super) chain: u64,
    /// The frame home.
    pub(super) frame: u64,
    /// Where the extended state goes.
    pub(super) xsave: u64,
    /// All that is written to.
    pub(super) region: AddrRange,
}

impl Place {
    /// The place that ends at `top`, for `xsave_len` bytes of extended state.
    pub(super) fn below(top: u64, xsave_len: u64) -> Self {
        let frame_below = |at: u64| at.saturating_sub(size_of::<Frame>() as u64) & !15;
        let xsave = top.saturating_sub(xsave_len + 4) & !63;
        let frame = frame_below(xsave);
        let chain = frame_below(frame);
        Self { chain, frame, xsave, region: AddrRange::new(chain, xsave + xsave_len + 4) }
    }
}

/// The stacks of a process, as its layout shows them.
#[derive(Clone, Debug, Default)]
pub(super) struct Stacks {
    real: Vec<AddrRange>,
    main: Option<AddrRange>,
}

impl Stacks {
    pub(super) fn of(maps: &[Vma]) -> Self {
        let mut stacks = Self::default();
        for (n, vma) in maps.iter().enumerate() {
            if vma.shared || !vma.is_anonymous() || !vma.prot.contains(Prot::READ | Prot::WRITE) {
                continue;
            }
            if vma.name == "[stack]" {
                stacks.main = Some(vma.range);
                stacks.real.push(vma.range);
            } else if n > 0 && is_guarded(&maps[n - 1], vma) {
                stacks.real.push(vma.range);
            }
        }
        stacks
    }

    /// Below the red zone of a thread that stands at `sp`.
    pub(super) fn on_own(&self, sp: u64, xsave_len: u64) -> Option<Place> {
        let at = self.real.partition_point(|stack| stack.end.get() < sp);
        let stack = self.real.get(at).filter(|stack| stack.start.get() < sp)?;
        let place = Place::below(sp.checked_sub(RED_ZONE)?, xsave_len);
        (place.region.start >= stack.start).then_some(place)
    }

    /// At the bottom of the main stack, while the threads stand at `stack_pointers`: to be used only where there are
    /// zeroes, or what a memckpt that was killed left. More than one: a parasite may yet go home by what it left.
    pub(super) fn on_main(&self, stack_pointers: &[u64], xsave_len: u64) -> Vec<Place> {
        let Some(main) = self.main else { return Vec::new() };
        let reserved = AddrRange::with_len(main.start, SPARE_PAGES * PAGE_SIZE + DISTANCE);
        if reserved.end > main.end || stack_pointers.iter().any(|&sp| reserved.contains(Addr(sp))) {
            return Vec::new();
        }
        let tops = (2..=SPARE_PAGES).rev().map(|page| main.start.get() + page * PAGE_SIZE);
        tops.map(|top| Place::below(top, xsave_len))
            .filter(|place| place.region.start >= main.start)
            .collect()
    }
}

fn is_guarded(below: &Vma, vma: &Vma) -> bool {
    below.range.end == vma.range.start
        && below.prot.is_empty()
        && !below.shared
        && below.is_anonymous()
        && below.range.len() <= GUARD_MAX
        && !vma.range.start.get().is_multiple_of(MALLOC_HEAP)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn vma(start: u64, end: u64, prot: Prot, name: &str) -> Vma {
        Vma {
            range: AddrRange::new(start, end),
            prot,
            shared: false,
            offset: 0,
            dev: (0, 0),
            inode: 0,
            name: name.into(),
        }
    }

    const RW: Prot = Prot::READ.union(Prot::WRITE);

    #[test]
    fn the_frame_fits_and_is_aligned() {
        for top in 0x7000_0000..0x7000_0100 {
            let place = Place::below(top, 2696);
            assert!(place.xsave.is_multiple_of(64) && place.frame.is_multiple_of(16));
            assert!(place.chain.is_multiple_of(16) && place.chain + size_of::<Frame>() as u64 <= place.frame);
            assert!(place.frame + size_of::<Frame>() as u64 <= place.xsave);
            assert!(place.region.end.get() <= top && place.region.len() < 3700);
        }
    }

    #[test]
    fn knows_a_stack_by_its_guard() {
        let maps = [
            vma(0x10000, 0x11000, Prot::empty(), ""),
            vma(0x11000, 0x31000, RW, ""),
            vma(0x40000, 0x80000, RW, "[heap]"),
            vma(0x100_0000, 0x400_0000, Prot::empty(), ""),
            vma(0x400_0000, 0x500_0000, RW, ""),
            vma(0x7ff0_0000, 0x7ff2_1000, RW, "[stack]"),
        ];
        let stacks = Stacks::of(&maps);
        assert!(stacks.on_own(0x20000, 2696).is_some());
        assert!(stacks.on_own(0x11800, 2696).is_none(), "no room");
        assert!(stacks.on_own(0x60000, 2696).is_none(), "in a heap");
        assert!(stacks.on_own(0x480_0000, 2696).is_none(), "above a heap's inaccessible rest");
        assert!(stacks.on_own(0x7ff2_0000, 2696).is_some());
        assert!(stacks.on_own(0x9000_0000, 2696).is_none());
        assert!(stacks.on_main(&[0x20000, 0x7ff2_0000], 2696).len() > 8);
        assert!(stacks.on_main(&[0x7ff0_8000], 2696).is_empty(), "in use");
    }
}
