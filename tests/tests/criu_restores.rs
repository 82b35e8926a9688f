//! A peer's proof: what memckpt dumped, and ended, Debian's `criu restore` brings back, and the program goes on rightly.

use anyhow::Result;
use memckpt_tests::features::Tracker;
use memckpt_tests::going_on;
use memckpt_tests::pair::{Pair, Tool, Wants};
use memckpt_tests::program::Program;
use memckpt_tests::{Scratch, criu, memckpt, skip};

const PAIR: Pair = Pair { dumper: Tool::Memckpt, restorer: Tool::Criu };

#[test]
fn a_ring_of_twenty_processes() -> Result<()> {
    going_on::victim(PAIR, "a_ring_of_twenty_processes", "ring")
}

#[test]
fn fifty_threads_blocked_in_different_calls() -> Result<()> {
    going_on::victim(PAIR, "fifty_threads_blocked_in_different_calls", "threads")
}

/// Restoring runs other code on the thread, which ends its sequence: it must begin anew.
#[test]
fn a_thread_in_a_restartable_sequence() -> Result<()> {
    going_on::victim(PAIR, "a_thread_in_a_restartable_sequence", "sequence")
}

#[test]
fn memory_that_is_checked() -> Result<()> {
    going_on::victim(PAIR, "memory_that_is_checked", "memory")
}

#[test]
fn a_shell_loop_that_writes_a_file() -> Result<()> {
    going_on::program(PAIR, "a_shell_loop_that_writes_a_file", &Wants::default(), Program::shell_loop)
}

#[test]
fn python_with_threads_a_pipe_a_timer_and_a_deleted_file() -> Result<()> {
    going_on::program(
        PAIR,
        "python_with_threads_a_pipe_a_timer_and_a_deleted_file",
        &Wants::default(),
        Program::python,
    )
}

#[test]
fn one_of_every_kind_of_descriptor() -> Result<()> {
    going_on::descriptors(PAIR, "one_of_every_kind_of_descriptor")
}

#[test]
fn terminals_of_its_own() -> Result<()> {
    going_on::terminals(PAIR, "terminals_of_its_own")
}

#[test]
fn the_job_of_a_shell() -> Result<()> {
    going_on::shell_job(PAIR, "the_job_of_a_shell")
}

#[test]
fn connections_whose_peers_wait() -> Result<()> {
    going_on::connections(PAIR, "connections_whose_peers_wait")
}

#[test]
fn a_pipe_that_leads_outside() -> Result<()> {
    going_on::outer_pipe(PAIR, "a_pipe_that_leads_outside")
}

#[test]
fn datagrams_that_go_outside() -> Result<()> {
    going_on::outer_datagrams(PAIR, "datagrams_that_go_outside")
}

#[test]
fn redis_with_data_and_a_connected_client() -> Result<()> {
    going_on::redis(PAIR, "redis_with_data_and_a_connected_client", 20_000)
}

/// pre-dump, pre-dump, dump by memckpt; restored by criu.
#[test]
fn a_chain_of_ours() -> Result<()> {
    const NAME: &str = "a_chain_of_ours";
    if let Some(reason) = criu::missing()? {
        skip(NAME, &reason);
        return Ok(());
    }
    let scratch = Scratch::new()?;
    let mut program = Program::victim("memory", &scratch)?;
    let pid = program.pid.to_string();
    for number in 1..=2 {
        let images = scratch.directory(&number.to_string())?;
        let mut command = memckpt(["pre-dump", "-t", &pid, "-D"]).arg(&images);
        if number > 1 {
            command = command.args(&["--prev-images-dir", "../1"]);
        }
        command.ok()?;
        program.wait_for(program.lines()? + 3)?;
    }
    let images = scratch.directory("3")?;
    memckpt(["dump", "-t", &pid, "--prev-images-dir", "../2", "-D"]).arg(&images).ok()?;
    let before = program.ended()?;
    PAIR.restore(&images, &Wants::default())?;
    program.wait_for(before + 10)
}

/// memckpt as a pre-dumper for criu: its pre-dump is the parent of criu's dump.
#[test]
fn criu_dumps_on_top_of_our_pre_dump() -> Result<()> {
    const NAME: &str = "criu_dumps_on_top_of_our_pre_dump";
    let reason = criu::missing()?.or_else(|| Tracker::SoftDirty.missing().map(str::to_owned));
    if let Some(reason) = reason {
        skip(NAME, &reason);
        return Ok(());
    }
    let scratch = Scratch::new()?;
    let mut program = Program::victim("memory", &scratch)?;
    let pid = program.pid.to_string();
    let (first, second) = (scratch.directory("1")?, scratch.directory("2")?);
    memckpt(["pre-dump", "--tracker", "soft-dirty", "-t", &pid, "-D"]).arg(&first).ok()?;
    program.wait_for(program.lines()? + 3)?;
    criu::run("dump", &second, &["-t", &pid, "--track-mem", "--prev-images-dir", "../1"])?;
    let before = program.ended()?;
    criu::run("restore", &second, &["-d"])?;
    program.wait_for(before + 10)
}
