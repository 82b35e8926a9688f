//! Programs of others that are dumped and ended in the middle of their work, and restored: what they compute is right.

use std::process::Command;

use anyhow::Result;
use memckpt_tests::pair::{Pair, Tool, Wants};
use memckpt_tests::program::Program;
use memckpt_tests::victim::source;
use memckpt_tests::{going_on, in_guest};

const PAIR: Pair = Pair { dumper: Tool::Memckpt, restorer: Tool::Memckpt };

/// In the middle of a transaction, its database locked.
#[test]
fn sqlite_in_a_transaction() -> Result<()> {
    let wants = Wants { locks: true, ..Wants::default() };
    going_on::program(PAIR, "sqlite_in_a_transaction", &wants, |scratch| {
        Program::script("transaction.py", scratch, &[scratch.path().join("database").as_os_str()])
    })
}

/// CPython with 32 threads, whose buffers are as large as those of numpy.
#[test]
fn python_with_large_buffers() -> Result<()> {
    let kib = if in_guest() { "64" } else { "4096" };
    going_on::program(PAIR, "python_with_large_buffers", &Wants::default(), |scratch| {
        Program::script("buffers.py", scratch, &[kib.as_ref()])
    })
}

/// A JVM whose compiler and collector are at work.
#[test]
fn a_jvm() -> Result<()> {
    going_on::program(PAIR, "a_jvm", &Wants::default(), |scratch| {
        let output = scratch.path().join("output");
        let mut command = Command::new("java");
        command.args(["-Xmx256m", "-cp"]).arg(source("jit")).arg("Jit").arg(&output);
        Program::start(command, output)
    })
}

#[test]
fn node() -> Result<()> {
    going_on::program(PAIR, "node", &Wants::default(), |scratch| {
        let output = scratch.path().join("output");
        let mut command = Command::new("node");
        command.arg(source("busy.js")).arg(&output);
        Program::start(command, output)
    })
}
