//! `cargo xtask bench`: measurements with criteria.

mod place;
mod redis;
mod restore;
mod scan;

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
