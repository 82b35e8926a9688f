//! What the integration tests share: the built `memckpt`, victims, a look at a process from outside, and an oracle that reads
//! images without memckpt's own code.

#![allow(
    clippy::print_stderr,
    reason = "skips are reported on standard error, which the test harness collects"
)]

pub mod command;
pub mod criu;
pub mod elf32;
pub mod features;
pub mod gate;
pub mod going_on;
pub mod memory;
pub mod oracle;
pub mod outward;
pub mod pair;
pub mod peer;
pub mod program;
pub mod redis;
pub mod scratch;
pub mod session;
pub mod strike;
pub mod victim;

pub use command::memckpt;
pub use scratch::Scratch;
pub use victim::Victim;

/// Says that test `name` cannot run here, and why. The test then returns.
pub fn skip(name: &str, reason: &str) {
    eprintln!("memckpt-test-skip: {name}: {reason}");
}

/// Says something that `cargo xtask test` shows although the test passes.
pub fn say(text: &str) {
    eprintln!("memckpt-test-says: {text}");
}

/// Tells what came of row `row` of docs/soundness.md under `mode`, for the table that `cargo xtask test` prints at its end.
pub fn cell(row: u32, mode: &str, outcome: &str) {
    eprintln!("memckpt-test-cell: {row}|{mode}|{outcome}");
}

/// Whether the run was asked to be quick.
#[must_use]
pub fn quick() -> bool {
    std::env::var_os("MEMCKPT_TEST_QUICK").is_some()
}

/// Whether we are in a guest, which is emulated.
#[must_use]
pub fn in_guest() -> bool {
    std::env::var("MEMCKPT_TEST_PLACE").is_ok_and(|place| place.starts_with("guest"))
}

/// Whether we are root.
#[must_use]
pub fn is_root() -> bool {
    nix::unistd::geteuid().is_root()
}
