//! What a session reports of itself and its target.

use std::fmt;
use std::time::Duration;

use serde::Serialize;

use crate::addr::PageCount;
use crate::tracker::agent::HintMode;
use crate::tracker::dirty::TrackerKind;
use crate::tracker::epoch::Epoch;

/// The state at one moment.
#[derive(Clone, Debug, Serialize)]
pub struct Sample {
    /// Seconds since 1970.
    pub time: f64,
    /// The target.
    pub pid: i32,
    /// How many VMAs it has.
    pub vmas: usize,
    /// Its resident pages.
    pub resident: PageCount,
    /// Pages dirtied since the epoch began; absent where nothing tells.
    pub dirty: Option<PageCount>,
    /// Pages newly dirtied in a second, since the last sample of this epoch.
    pub dirty_rate: Option<f64>,
    /// 2 MiB chunks touched in this epoch.
    pub chunks_touched: usize,
    /// Layout events since the session began.
    pub events: u64,
    /// Events, faults and addresses lost since the session began.
    pub losses: u64,
    /// The mm's write-lock count.
    pub generation: u64,
    /// What tells dirty pages.
    pub tracker: Option<TrackerKind>,
    /// Whether fault hints are complete.
    pub hint_mode: HintMode,
    /// The running epoch.
    pub epoch: Epoch,
    /// Why nothing of the epoch may be inherited, if so.
    pub broken: Option<String>,
}

/// What ended a session.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum End {
    /// The target exited or was killed.
    TargetEnded,
    /// A client asked for it (`watch --stop`).
    Stopped,
    /// This signal came.
    Signal(i32),
    /// The asked-for time was up.
    Duration,
    /// The target made a userfaultfd of its own.
    Userfaultfd,
    /// After an exec the new program could not be tracked.
    Exec {
        /// Why.
        reason: String,
    },
    /// Something broke.
    Failed {
        /// What.
        reason: String,
    },
}

impl End {
    /// Whether it came against the user's will.
    #[must_use]
    pub fn is_failure(&self) -> bool {
        matches!(self, Self::Userfaultfd | Self::Exec { .. } | Self::Failed { .. })
    }
}

impl fmt::Display for End {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::TargetEnded => f.write_str("the process ended"),
            Self::Stopped => f.write_str("stopped on request"),
            Self::Signal(number) => match nix::sys::signal::Signal::try_from(*number) {
                Ok(signal) => write!(f, "stopped by {signal}"),
                Err(_) => write!(f, "stopped by signal {number}"),
            },
            Self::Duration => f.write_str("the time was up"),
            Self::Userfaultfd => f.write_str("the process uses userfaultfd itself"),
            Self::Exec { reason } => write!(f, "the process called exec and cannot be tracked on: {reason}"),
            Self::Failed { reason } => write!(f, "failed: {reason}"),
        }
    }
}

/// What a session was, at its end.
#[derive(Clone, Debug, Serialize)]
pub struct Summary {
    /// The target.
    pub pid: i32,
    /// What ended it.
    pub end: End,
    /// How long it ran.
    pub seconds: f64,
    /// Its last epoch.
    pub epoch: Epoch,
    /// Layout events seen.
    pub events: u64,
    /// Losses.
    pub losses: u64,
}

/// Turns counts of dirty pages into a rate. The count falls when an epoch begins or pages are dropped.
#[derive(Clone, Debug, Default)]
pub(super) struct Rate {
    last: Option<(Epoch, PageCount, Duration)>,
}

impl Rate {
    /// Pages a second since the last call, within one epoch. `at`: time since any fixed moment.
    pub(super) fn update(&mut self, epoch: Epoch, dirty: PageCount, at: Duration) -> Option<f64> {
        let last = self.last.replace((epoch, dirty, at));
        let (_, before, then) = last.filter(|l| l.0 == epoch)?;
        let seconds = at.checked_sub(then)?.as_secs_f64();
        (seconds > 0.0).then(|| dirty.get().saturating_sub(before.get()) as f64 / seconds)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rate_spans_one_epoch() {
        let mut rate = Rate::default();
        let at = Duration::from_secs;
        assert_eq!(rate.update(Epoch(1), PageCount(10), at(1)), None);
        assert_eq!(rate.update(Epoch(1), PageCount(30), at(3)), Some(10.0));
        assert_eq!(rate.update(Epoch(1), PageCount(5), at(4)), Some(0.0));
        assert_eq!(rate.update(Epoch(2), PageCount(50), at(5)), None);
        assert_eq!(rate.update(Epoch(2), PageCount(50), at(5)), None);
    }
}
