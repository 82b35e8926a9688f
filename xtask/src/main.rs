//! memckpt's build and test commands: `cargo xtask run | test | vm | ebpf | bench | fuzz`.
#![allow(clippy::print_stdout, clippy::print_stderr, reason = "a command line tool: this is its output")]

mod bench;
mod ebpf;
mod fuzz;
mod packages;
mod process;
mod run;
mod service;
mod table;
mod test;
mod tools;
mod vm;
mod workspace;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// Builds, runs and tests memckpt.
#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask", max_term_width = 100)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Build memckpt and show its main job on a demo process, or run `memckpt ARGS`.
    Run(run::Args),
    /// Run every test: unit and doc tests, then the integration tests on the host and in QEMU guests.
    Test(test::Args),
    /// Run one command in a QEMU guest with a stock Debian kernel, which sees the host's files.
    Vm(vm::Args),
    /// Rebuild the BPF object in the repository.
    Ebpf(ebpf::Args),
    /// Measure, print a table, and say PASS or FAIL for each criterion.
    Bench(bench::Args),
    /// Fuzz the readers of images with cargo-fuzz, beginning with real checkpoints.
    Fuzz(fuzz::Args),
    /// Run a prepared list of tests in this place (what `test` starts here, with sudo, or in a guest).
    #[command(hide = true)]
    RunTests(test::runner::Args),
}

fn main() -> ExitCode {
    let result = match Cli::parse().command {
        Command::Run(args) => run::run(&args),
        Command::Test(args) => test::run(&args),
        Command::Vm(args) => vm::run(&args),
        Command::Bench(args) => bench::run(&args),
        Command::Fuzz(args) => fuzz::run(&args),
        Command::RunTests(args) => test::runner::run(&args),
        Command::Ebpf(args) => ebpf::run(&args),
    };
    result.unwrap_or_else(|error| {
        eprintln!("error: {error:#}");
        ExitCode::FAILURE
    })
}
