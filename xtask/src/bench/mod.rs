//! `cargo xtask bench`: measurements with criteria.

mod place;
mod redis;
mod restore;
mod scan;

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Result;
use clap::Subcommand;

use place::Place;

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, Subcommand)]
enum What {
    /// What an incremental checkpoint reads of the page tables, and whether clean memory costs anything.
    Scan(Place),
    /// What being watched costs redis-server, no checkpoint being taken.
    Redis(Place),
    /// How long it takes to bring 1 GiB back, against a program that reads as much.
    Restore(restore::Args),
}

/// `cargo xtask bench`.
pub(crate) fn run(args: &Args) -> Result<ExitCode> {
    match &args.what {
        What::Scan(place) => scan::run(place),
        What::Redis(place) => redis::run(place),
        What::Restore(args) => restore::run(args),
    }
}

/// What both measure, by turns the one or the other first, so that a machine that becomes faster or slower favours neither.
fn by_turns(
    turn: usize,
    one: impl FnOnce() -> Result<u64>,
    other: impl FnOnce() -> Result<u64>,
) -> Result<(u64, u64)> {
    if turn.is_multiple_of(2) {
        let other = other()?;
        Ok((one()?, other))
    } else {
        let one = one()?;
        Ok((one, other()?))
    }
}

/// A directory in memory, for images.
fn scratch() -> Result<tempfile::TempDir> {
    let base = std::env::var_os("TMPDIR").map_or_else(|| PathBuf::from("/dev/shm"), PathBuf::from);
    Ok(tempfile::Builder::new().prefix("memckpt-bench-").tempdir_in(base)?)
}

fn median(mut values: Vec<u64>) -> u64 {
    values.sort_unstable();
    values.get(values.len() / 2).copied().unwrap_or(0)
}

fn word(passed: bool) -> &'static str {
    if passed { "PASS" } else { "FAIL" }
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_median_is_the_middle_one() {
        assert_eq!(super::median(vec![9, 1, 5]), 5);
        assert_eq!(super::median(Vec::new()), 0);
    }
}
