//! kill -9 at random moments of `pre-dump` and `dump`, of one memckpt process or of all of them: the target runs on, finds nothing
//! wrong with itself, and has what it had before.
//!
//! `MEMCKPT_KILLS` says how often (default 28); the seed is printed.

#![allow(clippy::print_stderr, reason = "the seed, to repeat a failure")]

#[path = "target/victim.rs"]
#[allow(dead_code, reason = "shared with target.rs, which uses all of it")]
mod victim;

use std::fs;
use std::os::unix::process::CommandExt as _;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, ensure};
use memckpt_tests::memory::Random;
use memckpt_tests::{Scratch, command, is_root, memckpt, quick, skip};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use victim::Victim;

/// Workers of `crowd`: a busy loop always, since it wakes the others; sleeps; waits; a small alternate stack under
/// signals; restartable sequences; a stack of 2 KiB; seccomp filters that allow all, and that deny shmat.
const CROWDS: [&str; 7] = ["f", "fs", "fw", "fm", "frr", "ft", "fmswrrt"];
const FILTERED: [&str; 2] = ["!fsw", "-fsw"];

/// Marks the processes of a test in their environment.
const MARK: &str = "MEMCKPT_TEST_KILLS";

/// Who dies.
#[derive(Debug, Clone, Copy)]
enum Whom {
    Command,
    Session,
    All,
}

/// The memckpt processes that carry our mark: the command itself and any session in the background.
fn marked(mark: &str) -> Vec<i32> {
    let wanted = format!("{MARK}={mark}");
    let Ok(entries) = fs::read_dir("/proc") else { return Vec::new() };
    entries
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse::<i32>().ok())
        .filter(|pid| {
            fs::read(format!("/proc/{pid}/environ")).is_ok_and(|environment| {
                environment.split(|&byte| byte == 0).any(|word| word == wanted.as_bytes())
            })
        })
        .collect()
}

fn kill_all(pids: &[i32]) {
    for &pid in pids {
        // ESRCH: it ended by itself.
        let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
    }
}

fn start(kind: &str, pid: i32, images: &std::path::Path, mark: &str) -> Result<Child> {
    let mut run = Command::new(command::binary());
    run.args([kind, "-t", &pid.to_string(), "-D"]).arg(images);
    if kind == "dump" {
        run.args(["--leave-running", "--track-mem"]);
    }
    run.env(MARK, mark).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).process_group(0);
    run.spawn().context("start memckpt")
}

/// Kills on `crowd`, `count` of them.
fn kills(crowd: &str, count: usize, random: &mut Random) -> Result<()> {
    let scratch = Scratch::new()?;
    let victim = Victim::start(crowd, 2)?;
    let before = victim.belongings()?;
    let mark = format!("{}-{crowd}", std::process::id());

    // How long they take, undisturbed.
    let mut took = [Duration::ZERO; 2];
    for (index, kind) in ["pre-dump", "dump"].into_iter().enumerate() {
        let images = scratch.directory(&format!("whole-{kind}"))?;
        let begin = Instant::now();
        let status = start(kind, victim.pid(), &images, &mark)?.wait()?;
        took[index] = begin.elapsed();
        ensure!(status.success(), "{kind} of crowd {crowd} fails undisturbed ({status})");
    }
    stop_session(&victim, &mark);
    victim.has(&before).context("after undisturbed checkpoints")?;

    for round in 0..count {
        let (index, kind) = if round % 2 == 0 { (0, "pre-dump") } else { (1, "dump") };
        let whom = [Whom::Command, Whom::Session, Whom::All][random.below(3)];
        let limit = usize::try_from(took[index].as_micros())? * 6 / 5;
        let delay = Duration::from_micros(random.below(limit.max(1)) as u64);
        let images = scratch.directory(&format!("{round}"))?;

        let begin = Instant::now();
        let mut child = start(kind, victim.pid(), &images, &mark)?;
        // A moment is what is wanted here: sleep most of the way, spin the rest.
        std::thread::sleep(delay.saturating_sub(Duration::from_micros(200)));
        while begin.elapsed() < delay {
            std::hint::spin_loop();
        }
        let command = i32::try_from(child.id())?;
        match whom {
            Whom::Command => kill_all(&[command]),
            Whom::Session => {
                kill_all(&marked(&mark).into_iter().filter(|&pid| pid != command).collect::<Vec<_>>());
            }
            Whom::All => kill_all(&marked(&mark)),
        }
        child.wait()?;
        let what = || format!("crowd {crowd}, round {round}: {kind}, {whom:?} killed after {delay:?}");
        victim.progresses().with_context(what)?;
        // A session that still lives keeps what it needs in the target; with it gone, nothing may remain.
        stop_session(&victim, &mark);
        victim.has(&before).with_context(what)?;
        // A checkpoint is whole or visibly not.
        if images.join("inventory.img").exists() {
            memckpt(["show"]).arg(&images).ok().with_context(what)?;
        }
        fs::remove_dir_all(&images)?;
    }
    // And the next one, after all those deaths, works.
    let images = scratch.directory("after")?;
    let status = start("pre-dump", victim.pid(), &images, &mark)?.wait()?;
    ensure!(status.success(), "no checkpoint of crowd {crowd} can be taken any more ({status})");
    stop_session(&victim, &mark);
    victim.has(&before)?;
    victim.finish()
}

/// Ends the session if one lives: by its command, and where that cannot be, by force.
fn stop_session(victim: &Victim, mark: &str) {
    let _ = memckpt(["watch", &victim.pid().to_string(), "--stop"]).run();
    let deadline = Instant::now() + Duration::from_secs(5);
    while !marked(mark).is_empty() && Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(2));
    }
    kill_all(&marked(mark));
}

/// All of `crowds`, sharing the number of kills.
fn test(name: &str, crowds: &[&str]) -> Result<()> {
    if !is_root() {
        skip(name, "not root");
        return Ok(());
    }
    let asked = std::env::var("MEMCKPT_KILLS").ok().and_then(|count| count.parse::<usize>().ok());
    let count = asked.unwrap_or(if quick() { 7 } else { 28 }).div_ceil(crowds.len());
    let seed = SystemTime::now().duration_since(UNIX_EPOCH)?.subsec_nanos();
    eprintln!("{count} kills of each of {crowds:?}, seed {seed}");
    let mut random = Random(u64::from(seed));
    for crowd in crowds {
        kills(crowd, count, &mut random)?;
    }
    Ok(())
}

#[test]
fn a_target_survives_our_deaths() -> Result<()> {
    test("a_target_survives_our_deaths", &CROWDS)
}

#[test]
fn a_filtered_target_survives_our_deaths() -> Result<()> {
    test("a_filtered_target_survives_our_deaths", &FILTERED)
}
