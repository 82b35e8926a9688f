//! What is run in one place, written by `cargo xtask test` and read by the runner there.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::cells::Cell;

/// One test binary.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Binary {
    /// What its tests' names start with: the crate's or file's name.
    pub(crate) name: String,
    /// The executable.
    pub(crate) path: PathBuf,
    /// Its package, where it is run.
    pub(crate) directory: PathBuf,
    /// Each test in a process of its own, with a time limit of its own (integration), or all in one (unit).
    pub(crate) isolated: bool,
}

/// What one place has to run.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Plan {
    /// `host`, `guest 6.12`, …
    pub(crate) place: String,
    /// The binaries, in order.
    pub(crate) binaries: Vec<Binary>,
    /// Only tests whose `BINARY::TEST` contains this.
    pub(crate) filter: Option<String>,
    /// The environment to add.
    pub(crate) environment: Vec<(String, String)>,
    /// The part of these tests that is run.
    #[serde(default)]
    pub(crate) share: Share,
    /// Seconds that an isolated test may take; a whole binary may take five times that.
    pub(crate) limit_seconds: u64,
}

/// Every `of`th test, counted from `number`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Share {
    pub(crate) number: usize,
    pub(crate) of: usize,
}

impl Default for Share {
    fn default() -> Self {
        Self { number: 0, of: 1 }
    }
}

impl Share {
    /// Whether it holds the test at `position` of the whole plan.
    pub(crate) fn holds(self, position: usize) -> bool {
        position % self.of == self.number
    }
}

/// What happened to one test.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Outcome {
    /// It ran and held.
    Passed,
    /// It ran and did not: the end of its output.
    Failed(String),
    /// It cannot run in this place: why.
    Skipped(String),
}

/// A line of the results: a test that begins, or one that has ended.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Record {
    /// `BINARY::TEST`.
    pub(crate) test: String,
    /// `None`: it begins now.
    pub(crate) outcome: Option<Outcome>,
    /// What it told for the table of docs/soundness.md.
    #[serde(default)]
    pub(crate) cells: Vec<Cell>,
}

impl Record {
    pub(crate) fn new(test: impl Into<String>, outcome: Option<Outcome>) -> Self {
        Self { test: test.into(), outcome, cells: Vec::new() }
    }
}

#[cfg(test)]
mod tests {
    use super::Share;

    #[test]
    fn shares_hold_every_test_once() {
        for of in 1..5 {
            for position in 0..20 {
                let holders = (0..of).filter(|number| Share { number: *number, of }.holds(position)).count();
                assert_eq!(holders, 1, "test {position} of {of} shares");
            }
        }
        assert!((0..20).all(|position| Share::default().holds(position)));
    }
}
