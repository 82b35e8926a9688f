//! What a guest's console says, and what became of the guest.

use std::fmt;

/// How a guest ended. Exactly one of these comes out of every run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// The command ended with this exit code, and the kernel did not complain.
    Exited(i32),
    /// The kernel reported a bug: the line that says so.
    KernelBug(String),
    /// A processor did not schedule for a minute: the line that says so.
    Lockup(String),
    /// No end within the time limit, in seconds.
    TimedOut(u64),
    /// QEMU ended without the command's exit code.
    Died,
}

impl Verdict {
    /// The exit code to pass on: the command's own, or 124 for a time-out, 125 for a dead guest.
    pub(crate) fn code(&self) -> u8 {
        match self {
            Self::Exited(code) => u8::try_from(*code).unwrap_or(u8::MAX),
            Self::TimedOut(_) => 124,
            Self::KernelBug(_) | Self::Lockup(_) | Self::Died => 125,
        }
    }
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Exited(code) => write!(f, "exit {code}"),
            Self::KernelBug(line) => write!(f, "kernel bug: {line}"),
            Self::Lockup(line) => write!(f, "lockup: {line}"),
            Self::TimedOut(seconds) => write!(f, "timed out after {seconds} s"),
            Self::Died => f.write_str("the guest died without an exit code"),
        }
    }
}

/// What the kernel writes when it is past saving, or when it warns of itself (loglevel 3 lets these through).
const BUGS: [&str; 8] = [
    "Kernel panic - not syncing",
    "BUG: unable to handle",
    "BUG: kernel NULL pointer",
    "kernel BUG at",
    "Oops:",
    "general protection fault, probably",
    "BUG: Bad page",
    "BUG: Bad rss-counter",
];
const LOCKUPS: [&str; 2] = ["BUG: soft lockup", "watchdog: BUG: hard lockup"];

/// What one line of the console means, if anything.
pub(crate) fn judge(line: &str) -> Option<Verdict> {
    // The kernel's lines start with its clock; what tests print does not.
    let kernel = line.trim_start().starts_with('[') && line.contains(']');
    if kernel && BUGS.iter().any(|bug| line.contains(bug)) {
        return Some(Verdict::KernelBug(line.trim().to_owned()));
    }
    (kernel && LOCKUPS.iter().any(|bug| line.contains(bug))).then(|| Verdict::Lockup(line.trim().to_owned()))
}

#[cfg(test)]
mod tests {
    use super::{Verdict, judge};

    #[test]
    fn kernel_complaints_are_verdicts_and_test_output_is_not() {
        let panic = "[    4.2] Kernel panic - not syncing: Attempted to kill init!";
        assert_eq!(judge(panic), Some(Verdict::KernelBug(panic.into())));
        assert!(matches!(
            judge("[   63.1] watchdog: BUG: soft lockup - CPU#1 stuck for 62s!"),
            Some(Verdict::Lockup(_))
        ));
        assert_eq!(judge("test watches_for \"Kernel panic - not syncing\" ... ok"), None);
        assert_eq!(Verdict::TimedOut(3).code(), 124);
        assert_eq!(Verdict::Exited(7).code(), 7);
    }
}
