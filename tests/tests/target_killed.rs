//! memckpt is killed with SIGKILL at any moment, and the target never notices.
//!
//! `MEMCKPT_KILLS` sets how many kills at random moments each victim gets (200), `MEMCKPT_SEED` which moments.

#![expect(clippy::print_stdout, reason = "says what was tried")]

#[path = "target/victim.rs"]
#[expect(dead_code, reason = "shared with target.rs, which uses all of it")]
mod victim;

use std::io::Read;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use memckpt::target;
use victim::{Belongings, Victim, eventually};

fn injector(victim: &Victim, rounds: u64) -> Command {
    let range = victim.memory();
    let mut command = Command::new(env!("CARGO_BIN_EXE_injector"));
    command.args([victim.pid() as u64, range.start.get(), range.len(), rounds].map(|n| n.to_string()));
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

/// What a memckpt that was killed leaves behind: nothing in the target, and no segment once the next one has swept.
fn unhurt(victim: &Victim, before: &Belongings, dead: u32) -> Result<()> {
    victim.progresses()?;
    victim.has(before)?;
    // Another test's sweep may be looking at the same segment.
    eventually("its segment is gone", || {
        let swept = target::sweep(victim.pid());
        let segments = std::fs::read_to_string("/proc/sysvipc/shm").unwrap_or_default();
        let of_the_dead = |line: &str| line.split_whitespace().nth(4) == Some(&dead.to_string());
        swept.is_ok() && !segments.is_empty() && !segments.lines().any(of_the_dead)
    })
}

fn wait_for_start(child: &mut Child) -> Result<()> {
    let mut byte = [0];
    child.stdout.as_mut().context("no pipe")?.read_exact(&mut byte).context("the injector did not start")
}

fn killed_at_random(workers: &str, idle: usize) -> Result<()> {
    let number = |name, otherwise| std::env::var(name).ok().and_then(|v| v.parse().ok()).unwrap_or(otherwise);
    let (kills, mut seed): (u64, u64) =
        (number("MEMCKPT_KILLS", if memckpt_tests::quick() { 20 } else { 200 }), number("MEMCKPT_SEED", 1));
    println!("{kills} kills of {workers} with {idle} more, seed {seed}");
    let victim = Victim::start(workers, idle)?;
    let before = victim.belongings()?;
    for kill in 0..kills {
        let mut child = injector(&victim, u64::MAX).spawn()?;
        wait_for_start(&mut child)?;
        seed = seed.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(0x1405_7b7e_f767_814f);
        let moment = Instant::now() + Duration::from_nanos((seed >> 20) % 4_000_000);
        while Instant::now() < moment {
            std::hint::spin_loop();
        }
        child.kill()?;
        let id = child.id();
        let ended = child.wait_with_output()?;
        // It may have been killed while it was giving up.
        let said = String::from_utf8_lossy(&ended.stderr);
        ensure!(
            ended.status.code().is_none() && said.is_empty(),
            "the injector gave up: {}: {said}",
            ended.status
        );
        unhurt(&victim, &before, id).with_context(|| format!("kill {kill}"))?;
    }
    println!("EINTR seen: {}", victim.state().interrupted.load(Relaxed));
    victim.finish()
}

#[test]
fn threads_of_every_kind() -> Result<()> {
    killed_at_random("fmswrrt", 0)
}

#[test]
fn a_busy_loop_alone() -> Result<()> {
    killed_at_random("f", 0)
}

#[test]
fn a_sleeper_alone() -> Result<()> {
    killed_at_random("s", 0)
}

#[test]
fn a_signal_handler_alone() -> Result<()> {
    killed_at_random("m", 0)
}

#[test]
fn a_restartable_sequence_alone() -> Result<()> {
    killed_at_random("r", 0)
}

#[test]
fn a_tiny_stack_alone() -> Result<()> {
    killed_at_random("t", 0)
}

#[test]
fn a_seccomp_filter() -> Result<()> {
    killed_at_random("!fsw", 0)
}

#[test]
fn fifty_threads() -> Result<()> {
    killed_at_random("fmsw", 46)
}

/// A round is killed at its first system call, the next at its second, and so on.
fn killed_at_every_call(workers: &str) -> Result<()> {
    let victim = Victim::start(workers, 0)?;
    let before = victim.belongings()?;
    // A quick run takes every 29th.
    for stops in (1..).step_by(if memckpt_tests::quick() { 29 } else { 1 }) {
        let mut command = injector(&victim, 1);
        command.stderr(Stdio::inherit());
        let mut child = spawn_traced(&mut command)?;
        let mut left = stops;
        let whole = run_until(&mut child, |_| {
            left -= 1;
            left == 0
        })?;
        if !whole {
            child.kill()?;
            child.wait()?;
        }
        unhurt(&victim, &before, child.id()).with_context(|| format!("killed at stop {stops}"))?;
        if whole {
            println!(
                "{} system call stops, EINTR seen: {}",
                stops - 1,
                victim.state().interrupted.load(Relaxed)
            );
            break;
        }
    }
    victim.finish()
}

fn spawn_traced(command: &mut Command) -> Result<Child> {
    // SAFETY: ptrace is async-signal-safe.
    unsafe { command.pre_exec(|| nix::sys::ptrace::traceme().map_err(Into::into)) };
    Ok(command.spawn()?)
}

/// Runs until a system call stop, after its first byte, of which `here` says so; whether it ended before.
fn run_until(child: &mut Child, mut here: impl FnMut(&libc::user_regs_struct) -> bool) -> Result<bool> {
    use nix::sys::ptrace;
    use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
    let pid = nix::unistd::Pid::from_raw(child.id() as i32);
    let mut started = false;
    let mut signal = None;
    waitpid(pid, None)?;
    ptrace::setoptions(pid, ptrace::Options::PTRACE_O_TRACESYSGOOD)?;
    loop {
        ptrace::syscall(pid, signal.take())?;
        match waitpid(pid, Some(WaitPidFlag::__WALL))? {
            WaitStatus::PtraceSyscall(_) => {
                let regs = ptrace::getregs(pid)?;
                if started && here(&regs) {
                    return Ok(false);
                }
                started |= regs.orig_rax == libc::SYS_write as u64 && regs.rdi == 1;
            }
            WaitStatus::Stopped(_, s) => signal = Some(s),
            WaitStatus::Exited(_, code) => {
                ensure!(code == 0, "the injector failed with {code}");
                return Ok(true);
            }
            other => anyhow::bail!("{other:?}"),
        }
    }
}

#[test]
fn at_every_system_call_with_every_kind() -> Result<()> {
    killed_at_every_call("fmswrrt")
}

#[test]
fn at_every_system_call_on_a_tiny_stack() -> Result<()> {
    killed_at_every_call("t")
}

#[test]
fn at_every_system_call_with_a_sleeper() -> Result<()> {
    killed_at_every_call("s")
}

#[test]
fn segments_of_the_dead_are_swept() -> Result<()> {
    // In a namespace where nobody else sweeps.
    let victim = Victim::start_with("f", 0, |command| {
        let unshare = || nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWIPC).map_err(Into::into);
        // SAFETY: unshare is async-signal-safe.
        unsafe { command.pre_exec(unshare) };
    })?;
    // Killed before it writes the way home: the segment exists, the target has not attached it.
    let mut child = spawn_traced(&mut injector(&victim, 1))?;
    let ended = run_until(&mut child, |regs| regs.orig_rax == libc::SYS_pwrite64 as u64)?;
    ensure!(!ended, "it never wrote to the target");
    assert_eq!(target::sweep(victim.pid())?, 0, "swept under its owner's feet");
    child.kill()?;
    child.wait()?;
    assert_eq!(target::sweep(victim.pid())?, 1);
    assert_eq!(target::sweep(victim.pid())?, 0);
    victim.progresses()?;
    victim.finish()
}
