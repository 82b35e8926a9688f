//! What Debian's `criu dump` dumped, memckpt restores, and the program goes on rightly. Not a thread in a restartable sequence: that dump
//! loses it, and `criu restore` does not bring it back either.

use memckpt_tests::goes_on;
use memckpt_tests::pair::{Pair, Tool, Wants};
use memckpt_tests::program::Program;

const PAIR: Pair = Pair { dumper: Tool::Criu, restorer: Tool::Memckpt };

goes_on! { PAIR;
    fn a_ring_of_twenty_processes() victim("ring");
    fn memory_that_is_checked() victim("memory");
    fn a_shell_loop_that_writes_a_file() program(&Wants::default(), Program::shell_loop);
    fn python_with_threads_a_pipe_a_timer_and_a_deleted_file() program(&Wants::default(), Program::python);
    fn a_deleted_file_with_holes() program(&Wants::default(), |scratch| {
        Program::script("sparse.py", scratch, &[scratch.path().join("deleted").as_os_str()])
    });
    fn terminals_of_its_own() terminals();
    fn the_job_of_a_shell() shell_job();
    fn a_pipe_that_leads_outside() outer_pipe();
    fn datagrams_that_go_outside() outer_datagrams();
    fn fifty_threads_blocked_in_different_calls() victim("patient");
    fn one_of_every_kind_of_descriptor() descriptors();
    fn connections_whose_peers_wait() connections();
    fn redis_with_data_and_a_connected_client() redis(20_000);
}
