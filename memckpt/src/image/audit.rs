//! What `--audit` found, as `memckpt.json` and the user get it.

use serde::{Deserialize, Serialize};

use crate::addr::{AddrRange, PageCount};

/// How many disagreements are told one by one.
const TOLD: usize = 16;

/// What an audit looked at and found.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Audit {
    /// VMAs compared with `/proc/PID/maps`.
    pub vmas: u64,
    /// Pages that a scan of everything decided on.
    pub pages_scanned: PageCount,
    /// Inherited pages whose bytes were compared with the chain.
    pub pages_compared: PageCount,
    /// Of them, pages that a full scan called changed and no hint named, and that hold what they held.
    pub pages_overstated: PageCount,
    /// Pages, or for the layout VMAs, that were found wrong.
    pub disagreements: u64,
    /// The first of them.
    pub told: Vec<Disagreement>,
}

/// Something that the narrowed view has wrong.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Disagreement {
    /// Where.
    pub range: AddrRange,
    /// What is wrong.
    pub what: Wrong,
}

/// What can be wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[serde(rename_all = "kebab-case")]
pub enum Wrong {
    /// The session's layout differs from the kernel's: an event was missed.
    #[error("the session takes the layout for another one: an event was missed")]
    Layout,
    /// A changed page would have been left to the parent: no hint named its chunk.
    #[error("changed, and no hint says so: a fault was missed")]
    Unseen,
    /// A page that is gone would have been left to the parent: no hint named its chunk.
    #[error("dropped, and no hint says so: a zap was missed")]
    Dropped,
    /// The source of truth called it clean, and its bytes are others than in the chain.
    #[error("other bytes than in the chain, although nothing says that they changed")]
    Bytes,
}

impl Audit {
    /// Adds what was found in another process of the tree.
    pub fn add(&mut self, other: Self) {
        self.vmas += other.vmas;
        self.pages_scanned += other.pages_scanned;
        self.pages_compared += other.pages_compared;
        self.pages_overstated += other.pages_overstated;
        self.disagreements += other.disagreements;
        self.told.extend(other.told);
        self.told.truncate(TOLD);
    }

    /// Notes that `what` is wrong with `range`.
    pub fn found(&mut self, range: AddrRange, what: Wrong) {
        self.disagreements += if what == Wrong::Layout { 1 } else { range.pages().get() };
        if self.told.len() < TOLD {
            self.told.push(Disagreement { range, what });
        }
    }
}
