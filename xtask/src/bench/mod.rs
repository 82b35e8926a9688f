//! `cargo xtask bench`: measurements with criteria.

mod scan;

use std::process::ExitCode;

use anyhow::Result;
use clap::Subcommand;

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, Subcommand)]
enum What {
    /// What an incremental checkpoint reads of the page tables, and whether clean memory costs anything.
    Scan(scan::Args),
}

/// `cargo xtask bench`.
pub(crate) fn run(args: &Args) -> Result<ExitCode> {
    match &args.what {
        What::Scan(args) => scan::run(args),
    }
}
