//! Epochs: what one clear of the dirty state began, and what ends its use.

use std::fmt;
use std::io;

use serde::{Deserialize, Serialize};

/// Which epoch of a session: 1 began with the session's own first clear, each commit or exec begins the next.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Epoch(pub u64);

impl Epoch {
    /// The first epoch of a session.
    pub const FIRST: Self = Self(1);

    /// The epoch after this one.
    #[must_use]
    pub const fn next(self) -> Self {
        Self(self.0 + 1)
    }
}

impl fmt::Display for Epoch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.0, f)
    }
}

macro_rules! random_id {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(try_from = "String", into = "String")]
        pub struct $name(u128);

        impl $name {
            /// A fresh one from getrandom(2), Linux 3.17.
            ///
            /// # Errors
            /// The kernel gave no random bytes.
            pub fn random() -> io::Result<Self> {
                random().map(Self)
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{:032x}", self.0)
            }
        }

        impl From<$name> for String {
            fn from(id: $name) -> Self {
                id.to_string()
            }
        }

        impl TryFrom<String> for $name {
            type Error = NotAnId;

            fn try_from(text: String) -> Result<Self, NotAnId> {
                text.parse()
            }
        }

        impl std::str::FromStr for $name {
            type Err = NotAnId;

            fn from_str(text: &str) -> Result<Self, NotAnId> {
                if text.len() != 32 || !text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f')) {
                    return Err(NotAnId(text.to_owned()));
                }
                u128::from_str_radix(text, 16).map(Self).map_err(|_| NotAnId(text.to_owned()))
            }
        }
    };
}

random_id! {
    /// A watch session: one agent process watching one target. 128 random bits, 32 lower-case hexadecimal digits.
    SessionId
}
random_id! {
    /// A checkpoint. 128 random bits, 32 lower-case hexadecimal digits.
    CheckpointId
}

/// A text that is no identifier.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("not an identifier of 32 lower-case hexadecimal digits: {0:?}")]
pub struct NotAnId(String);

fn random() -> io::Result<u128> {
    let mut bytes = [0u8; 16];
    // SAFETY: the pointer and length are those of `bytes`, which the kernel fills.
    let got = unsafe { libc::getrandom(bytes.as_mut_ptr().cast(), bytes.len(), 0) };
    // Up to 256 bytes come whole, and without EINTR once the pool is initialised: getrandom(2).
    match usize::try_from(got) {
        Ok(n) if n == bytes.len() => Ok(u128::from_ne_bytes(bytes)),
        Ok(_) => Err(io::ErrorKind::UnexpectedEof.into()),
        Err(_) => Err(io::Error::last_os_error()),
    }
}

/// Why nothing of the running epoch may be inherited. The next commit begins a sound one.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Broken {
    /// The witness page reads clean, or a write to clear_refs was seen.
    #[error("somebody else cleared the dirty bits (clear_refs)")]
    ForeignClear,
    /// A checkpoint's client went away without saying whether it had cleared the dirty state.
    #[error("a memckpt client ended between taking the dirty pages and committing; it may have cleared them")]
    ClientVanished,
    /// A client said that it cleared, or began to clear, and then gave up.
    #[error("a checkpoint failed after it had begun to clear the dirty pages")]
    AbortedAfterClear,
    /// No layout events: an mremap of whole page tables would go unnoticed.
    #[error("layout events cannot be observed: {0}")]
    NoEvents(String),
    /// The witness could not be read.
    #[error("whether somebody else cleared the dirty bits cannot be told: {0}")]
    NoWitness(String),
    /// The kernel offers no dirty source for this target.
    #[error("dirty pages cannot be tracked: {0}")]
    NoTracker(String),
    /// The target called exec: another address space.
    #[error("the target called exec")]
    Exec,
}

/// The running epoch of a session.
#[derive(Clone, Debug)]
pub struct EpochState {
    number: Epoch,
    checkpoint: Option<CheckpointId>,
    broken: Option<Broken>,
}

impl Default for EpochState {
    fn default() -> Self {
        Self { number: Epoch::FIRST, checkpoint: None, broken: None }
    }
}

impl EpochState {
    /// Its number.
    #[must_use]
    pub fn number(&self) -> Epoch {
        self.number
    }

    /// The checkpoint whose clear began it; `None` where the session's own did.
    #[must_use]
    pub fn checkpoint(&self) -> Option<&CheckpointId> {
        self.checkpoint.as_ref()
    }

    /// Why nothing of it may be inherited, if so.
    #[must_use]
    pub fn broken(&self) -> Option<&Broken> {
        self.broken.as_ref()
    }

    /// Breaks it; the first reason stays.
    pub fn break_off(&mut self, why: Broken) {
        if self.broken.is_none() {
            tracing::warn!(epoch = %self.number, "epoch broken: {why}");
            self.broken = Some(why);
        }
    }

    /// The next epoch begins, with the clear of `checkpoint` (`None`: of the session itself).
    pub fn begin_next(&mut self, checkpoint: Option<CheckpointId>) -> Epoch {
        *self = Self { number: self.number.next(), checkpoint, broken: None };
        self.number
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn identifiers_are_distinct_and_survive_json() {
        let ids: Vec<CheckpointId> = (0..2).filter_map(|_| CheckpointId::random().ok()).collect();
        assert_eq!(ids.len(), 2);
        assert_ne!(ids[0], ids[1]);
        let json = serde_json::to_string(&ids).unwrap_or_default();
        assert_eq!(json.len(), 2 * 34 + 3);
        assert_eq!(serde_json::from_str::<Vec<CheckpointId>>(&json).ok(), Some(ids));
        for bad in ["\"\"", "\"+1\"", "\"ABCDEF00000000000000000000000000\"", "7"] {
            assert!(serde_json::from_str::<SessionId>(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn the_first_reason_stays_until_the_next_epoch() {
        let mut epoch = EpochState::default();
        assert_eq!((epoch.number(), epoch.broken()), (Epoch(1), None));
        epoch.break_off(Broken::ForeignClear);
        epoch.break_off(Broken::Exec);
        assert_eq!(epoch.broken(), Some(&Broken::ForeignClear));
        let id = CheckpointId::random().ok();
        assert!(id.is_some());
        assert_eq!(epoch.begin_next(id.clone()), Epoch(2));
        assert_eq!((epoch.broken(), epoch.checkpoint()), (None, id.as_ref()));
    }
}
