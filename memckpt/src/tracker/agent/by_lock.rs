//! What a layout call may have changed, by its arguments and the hole that the kernel found for it: where it is told at
//! the mmap lock, it has no result yet. It is taken to succeed, which at worst dumps too much.

use super::events::{EVERYTHING, EventKind, LayoutEvent};
use crate::addr::{Addr, AddrRange};

/// What a mremap may have done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Remap {
    /// Only this range, behind what stays, is another: it grew or shrank in place.
    Tail(AddrRange),
    /// The pages of `from` are in `to`: at its start where `exact`, else somewhere in it.
    Moved {
        /// Where they were.
        from: AddrRange,
        /// Where they are.
        to: AddrRange,
        /// Whether `to` is where, and not just around it.
        exact: bool,
    },
    /// It is not known where to, if at all.
    Unknown(AddrRange),
}

fn pages(start: u64, len: u64) -> AddrRange {
    AddrRange::with_len(Addr(start), len).page_aligned()
}

impl LayoutEvent {
    /// Whether it was told at the mmap lock, its result being unknown.
    #[must_use]
    pub const fn is_by_lock(&self) -> bool {
        self.by_lock
    }

    /// Where a mapping was made, by a call with an address, a length and perhaps MAP_FIXED. `None`: anywhere.
    ///
    /// Without MAP_FIXED it lies in a hole: one that was searched for (every search goes through vm_unmapped_area(),
    /// mm/mmap.c, and the mapping lies inside what it finds), or the one that the caller's hint names.
    #[must_use]
    pub fn placed(&self) -> Option<AddrRange> {
        let [address, len, _, flags, ..] = self.args;
        let fixed = i64::from(self.call) == libc::SYS_mmap
            && flags & (libc::MAP_FIXED | libc::MAP_FIXED_NOREPLACE) as u64 != 0;
        match self.area {
            Some(area) if !fixed => Some(area),
            _ if fixed || address != 0 => Some(pages(address, len)).filter(|r| !r.is_empty()),
            _ => None,
        }
    }

    /// Whether [`Self::placed`] is only what the caller would like: the kernel raises low hints (round_hint_to_min(),
    /// mm/mmap.c), and drivers have ideas of their own.
    #[must_use]
    pub fn is_placed_by_hint(&self) -> bool {
        let fixed = i64::from(self.call) == libc::SYS_mmap && self.args[3] & libc::MAP_FIXED as u64 != 0;
        !fixed && self.area.is_none()
    }

    /// Where shmat and its like found room.
    #[must_use]
    pub const fn found(&self) -> Option<AddrRange> {
        self.area
    }

    /// What a mremap may have done.
    ///
    /// It moves to MREMAP_FIXED's address; or to a hole that it searches for; or with MREMAP_DONTUNMAP to one that the
    /// fifth argument hints at. Without any of these it stays in place: no get_unmapped_area() of a file
    /// goes without a search (as of 6.18 but for BPF arenas, which mremap refuses).
    #[must_use]
    pub fn remapped(&self) -> Remap {
        let [old, old_len, new_len, flags, new, _] = self.args;
        let has = |flag: i32| flags & flag as u64 != 0;
        let (from, wanted) = (pages(old, old_len), pages(old, new_len));
        let keeps_source = has(libc::MREMAP_DONTUNMAP);
        if has(libc::MREMAP_FIXED) {
            return Remap::Moved { from, to: pages(new, new_len), exact: true };
        }
        match self.area {
            Some(to) => Remap::Moved { from, to, exact: to.len() == wanted.len() },
            None if keeps_source && new != 0 => Remap::Moved { from, to: pages(new, new_len), exact: true },
            None if keeps_source => Remap::Unknown(from),
            None => {
                let (short, long) = (from.end.min(wanted.end), from.end.max(wanted.end));
                Remap::Tail(AddrRange { start: short, end: long })
            }
        }
    }

    pub(super) fn ranges_by_lock(&self) -> Vec<AddrRange> {
        let ranges = match self.kind {
            EventKind::Mremap => match self.remapped() {
                Remap::Tail(tail) => vec![tail],
                Remap::Moved { from, to, .. } => vec![from, to],
                Remap::Unknown(_) => vec![EVERYTHING],
            },
            _ => vec![self.placed().unwrap_or(EVERYTHING)],
        };
        ranges.into_iter().filter(|r| !r.is_empty()).collect()
    }
}
