//! A peer's proof: what memckpt dumped, and ended, Debian's `criu restore` brings back, and the program goes on rightly.

use anyhow::Result;
use memckpt_tests::features::Tracker;
use memckpt_tests::goes_on;
use memckpt_tests::pair::{Pair, Tool, Wants};
use memckpt_tests::program::Program;
use memckpt_tests::{Scratch, criu, memckpt, skip};

const PAIR: Pair = Pair { dumper: Tool::Memckpt, restorer: Tool::Criu };

goes_on! { PAIR;
    fn a_ring_of_twenty_processes() victim("ring");
    fn fifty_threads_blocked_in_different_calls() victim("threads");
    /// Restoring runs other code on the thread, which ends its sequence: it must begin anew.
    fn a_thread_in_a_restartable_sequence() victim("sequence");
    fn memory_that_is_checked() victim("memory");
    fn a_shell_loop_that_writes_a_file() program(&Wants::default(), Program::shell_loop);
    fn python_with_threads_a_pipe_a_timer_and_a_deleted_file() program(&Wants::default(), Program::python);
    fn one_of_every_kind_of_descriptor() descriptors();
    fn terminals_of_its_own() terminals();
    fn the_job_of_a_shell() shell_job();
    fn connections_whose_peers_wait() connections();
    fn a_pipe_that_leads_outside() outer_pipe();
    fn datagrams_that_go_outside() outer_datagrams();
    fn redis_with_data_and_a_connected_client() redis(20_000);
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
