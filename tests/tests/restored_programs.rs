//! Programs of others that are dumped and ended in the middle of their work, and restored: what they compute is right.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::Result;
use memckpt_tests::going_on;
use memckpt_tests::pair::{Pair, Tool, Wants};
use memckpt_tests::program::Program;

const PAIR: Pair = Pair { dumper: Tool::Memckpt, restorer: Tool::Memckpt };

fn victims() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("victims")
}

/// In the middle of a transaction, its database locked.
#[test]
fn sqlite_in_a_transaction() -> Result<()> {
    let wants = Wants { locks: true, ..Wants::default() };
    going_on::program(PAIR, "sqlite_in_a_transaction", &wants, |scratch| {
        let output = scratch.path().join("output");
        let mut command = Command::new("/usr/bin/python3");
        command.arg(victims().join("transaction.py")).arg(&output).arg(scratch.path().join("database"));
        Program::start(command, output)
    })
}

/// CPython with 32 threads, whose buffers are as large as those of numpy.
#[test]
fn python_with_large_buffers() -> Result<()> {
    let guest = std::env::var("MEMCKPT_TEST_PLACE").is_ok_and(|place| place.starts_with("guest"));
    let kib = if guest { "64" } else { "4096" };
    going_on::program(PAIR, "python_with_large_buffers", &Wants::default(), |scratch| {
        let output = scratch.path().join("output");
        let mut command = Command::new("/usr/bin/python3");
        command.arg(victims().join("buffers.py")).arg(&output).arg(kib);
        Program::start(command, output)
    })
}

/// A JVM whose compiler and collector are at work.
#[test]
fn a_jvm() -> Result<()> {
    going_on::program(PAIR, "a_jvm", &Wants::default(), |scratch| {
        let output = scratch.path().join("output");
        let mut command = Command::new("java");
        command.args(["-Xmx256m", "-cp"]).arg(victims().join("jit")).arg("Jit").arg(&output);
        Program::start(command, output)
    })
}

#[test]
fn node() -> Result<()> {
    going_on::program(PAIR, "node", &Wants::default(), |scratch| {
        let output = scratch.path().join("output");
        let mut command = Command::new("node");
        command.arg(victims().join("busy.js")).arg(&output);
        Program::start(command, output)
    })
}
