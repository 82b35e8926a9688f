//! What the hooks may have missed. Any movement of any of these means: read everything.

use serde::{Deserialize, Serialize};

/// Counters since the agent was attached.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Losses {
    /// Events that found the ring full.
    pub ring: u64,
    /// Faults at or above 2^47.
    pub high_addr: u64,
    /// Marks given up on because the buffers kept flipping.
    pub flip: u64,
    /// Calls or foreign accesses that found their map full.
    pub map_full: u64,
    /// Huge-page collapses whose address is not known.
    pub collapse: u64,
    /// Program runs that the kernel skipped because the program was already running on that CPU (`recursion_misses` of
    /// bpf_prog_info, Linux 5.12).
    pub recursion: u64,
    /// Probe hits that the kernel missed (`missed` of bpf_link_info, Linux 6.7; 0 where no probe is attached).
    pub nmissed: u64,
}

impl Losses {
    /// All together.
    #[must_use]
    pub const fn total(&self) -> u64 {
        self.ring + self.high_addr + self.flip + self.map_full + self.collapse + self.recursion + self.nmissed
    }

    /// What was lost since `before`. A counter that went backwards counts as moved.
    #[must_use]
    pub fn since(&self, before: &Self) -> Self {
        let moved = |now: u64, then: u64| if now >= then { now - then } else { now.max(1) };
        Self {
            ring: moved(self.ring, before.ring),
            high_addr: moved(self.high_addr, before.high_addr),
            flip: moved(self.flip, before.flip),
            map_full: moved(self.map_full, before.map_full),
            collapse: moved(self.collapse, before.collapse),
            recursion: moved(self.recursion, before.recursion),
            nmissed: moved(self.nmissed, before.nmissed),
        }
    }
}

/// What the agent has seen since it was attached. Statistics: updates can be lost to preemption.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Counters {
    /// Page faults of the target's mm, by whomever.
    pub faults: u64,
    /// Ranges of pages dropped.
    pub zaps: u64,
    /// Layout events.
    pub events: u64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_counter_that_went_backwards_is_a_movement() {
        let (before, now) =
            (Losses { ring: 5, ..Losses::default() }, Losses { ring: 0, nmissed: 2, ..Losses::default() });
        let moved = now.since(&before);
        assert_eq!((moved.ring, moved.nmissed, moved.total()), (1, 2, 3));
        assert_eq!(before.since(&before).total(), 0);
    }
}
