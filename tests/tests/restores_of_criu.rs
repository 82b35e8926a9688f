//! What Debian's `criu dump` dumped, memckpt restores, and the program goes on rightly. Not a thread in a restartable sequence: that dump
//! loses it, and `criu restore` does not bring it back either.

use anyhow::Result;
use memckpt_tests::going_on;
use memckpt_tests::pair::{Pair, Tool, Wants};
use memckpt_tests::program::Program;

const PAIR: Pair = Pair { dumper: Tool::Criu, restorer: Tool::Memckpt };

#[test]
fn a_ring_of_twenty_processes() -> Result<()> {
    going_on::victim(PAIR, "a_ring_of_twenty_processes", "ring")
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
fn terminals_of_its_own() -> Result<()> {
    going_on::terminals(PAIR, "terminals_of_its_own")
}

#[test]
fn the_job_of_a_shell() -> Result<()> {
    going_on::shell_job(PAIR, "the_job_of_a_shell")
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
fn fifty_threads_blocked_in_different_calls() -> Result<()> {
    going_on::victim(PAIR, "fifty_threads_blocked_in_different_calls", "patient")
}

#[test]
fn one_of_every_kind_of_descriptor() -> Result<()> {
    going_on::descriptors(PAIR, "one_of_every_kind_of_descriptor")
}

#[test]
fn connections_whose_peers_wait() -> Result<()> {
    going_on::connections(PAIR, "connections_whose_peers_wait")
}

#[test]
fn redis_with_data_and_a_connected_client() -> Result<()> {
    going_on::redis(PAIR, "redis_with_data_and_a_connected_client", 20_000)
}
