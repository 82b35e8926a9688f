//! What ends an epoch. Nothing is inherited over it: an incremental checkpoint is refused by that name, and with `--or-full`
//! it is a full one that says so.

use std::path::Path;

use anyhow::{Context, Result, ensure};
use memckpt::tracker::control::SessionClient;
use memckpt_tests::features::Tracker;
use memckpt_tests::session::followed;
use memckpt_tests::{Scratch, Victim, is_root, memckpt, oracle, say, skip};

/// The parent does not belong to the epoch being tracked.
const EPOCH: i32 = 4;

/// A tracker that works here; else the test is said to be skipped.
fn tracker(test: &str) -> Option<Tracker> {
    if !is_root() {
        skip(test, "not root");
        return None;
    }
    let found = [Tracker::SoftDirty, Tracker::UffdWp].into_iter().find(|t| t.missing().is_none());
    if found.is_none() {
        skip(test, "no tracker works here");
    }
    found
}

fn watch(pid: i32, tracker: Tracker) -> Result<()> {
    memckpt(["watch", &pid.to_string(), "--background", "--tracker", tracker.name()]).ok()?;
    Ok(())
}

fn stop(pid: i32) -> Result<()> {
    memckpt(["watch", &pid.to_string(), "--stop"]).ok()?;
    Ok(())
}

/// A victim, watched, with a first checkpoint in `1`.
fn begun(scratch: &Scratch, tracker: Tracker) -> Result<Victim> {
    let victim = Victim::start("deeds", [scratch.path()])?;
    watch(victim.pid(), tracker)?;
    memckpt(["pre-dump", "-t", &victim.pid().to_string(), "-D"]).arg(scratch.directory("1")?).ok()?;
    Ok(victim)
}

/// A dump on top of `parent` is refused for `reason`, and with `--or-full` holds everything and says why.
fn ended(scratch: &Scratch, victim: &Victim, parent: &str, reason: &str) -> Result<()> {
    let pid = victim.pid().to_string();
    let (refused, full) = (scratch.directory("refused")?, scratch.directory("full")?);
    let dump = |images: &Path, more: &[&str]| {
        memckpt(["dump", "-t", &pid, "--leave-stopped", "--prev-images-dir", parent, "-D"])
            .arg(images)
            .args(more)
    };
    let ran = dump(&refused, &[]).refused(&[reason])?;
    ensure!(ran.code == Some(EPOCH), "ends with {:?}:\n{}", ran.code, ran.stderr);
    ensure!(!refused.join("inventory.img").exists(), "refused, and yet there is a checkpoint");
    let ran = dump(&full, &["--or-full"]).ok()?;
    ensure!(ran.stdout.contains("full, not on top of") && ran.stdout.contains(reason), "{}", ran.stdout);
    victim.wait_stopped()?;
    let compared = oracle::compare(&full, victim.pid())?;
    ensure!(compared.inherited == 0 && compared.own > 1000, "{compared:?}");
    Ok(())
}

#[test]
fn no_session() -> Result<()> {
    let Some(tracker) = tracker("no_session") else { return Ok(()) };
    let scratch = Scratch::new()?;
    let victim = begun(&scratch, tracker)?;
    stop(victim.pid())?;
    ended(&scratch, &victim, "../1", "no session has tracked the process")
}

#[test]
fn a_parent_from_another_session() -> Result<()> {
    let Some(tracker) = tracker("a_parent_from_another_session") else { return Ok(()) };
    let scratch = Scratch::new()?;
    let victim = begun(&scratch, tracker)?;
    stop(victim.pid())?;
    watch(victim.pid(), tracker)?;
    ended(&scratch, &victim, "../1", "another session")
}

#[test]
fn a_parent_that_is_not_the_last_one() -> Result<()> {
    let Some(tracker) = tracker("a_parent_that_is_not_the_last_one") else { return Ok(()) };
    let scratch = Scratch::new()?;
    let victim = begun(&scratch, tracker)?;
    let pid = victim.pid().to_string();
    memckpt(["pre-dump", "-t", &pid, "--prev-images-dir", "../1", "-D"]).arg(scratch.directory("2")?).ok()?;
    ended(&scratch, &victim, "../1", "began with another checkpoint")
}

#[test]
fn a_tracker_that_was_killed() -> Result<()> {
    let Some(tracker) = tracker("a_tracker_that_was_killed") else { return Ok(()) };
    let scratch = Scratch::new()?;
    let mut victim = begun(&scratch, tracker)?;
    let session = SessionClient::connect(victim.pid())?.context("no session")?.hello()?.pid;
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(session), nix::sys::signal::Signal::SIGKILL)?;
    while Path::new(&format!("/proc/{session}/fd/0")).exists() {
        std::thread::yield_now();
    }
    // Nobody sees this.
    ensure!(victim.ask("move")? == "done");
    ended(&scratch, &victim, "../1", "no session has tracked the process")
}

#[test]
fn a_foreign_clear() -> Result<()> {
    if let Some(reason) = Tracker::SoftDirty.missing() {
        skip("a_foreign_clear", reason);
        return Ok(());
    }
    let scratch = Scratch::new()?;
    let mut victim = begun(&scratch, Tracker::SoftDirty)?;
    ensure!(victim.ask("touch")? == "done");
    std::fs::write(format!("/proc/{}/clear_refs", victim.pid()), "4")?;
    ended(&scratch, &victim, "../1", "somebody else cleared the dirty bits")
}

#[test]
fn an_exec() -> Result<()> {
    let Some(tracker) = tracker("an_exec") else { return Ok(()) };
    let scratch = Scratch::new()?;
    let mut victim = begun(&scratch, tracker)?;
    let epoch = SessionClient::connect(victim.pid())?.context("no session")?.hello()?.epoch;
    ensure!(victim.ask("exec")? == "ready");
    followed(victim.pid(), epoch)?;
    ended(&scratch, &victim, "../1", "the process has called exec")
}

/// A checkpoint that meets an exec may fail; it is never wrong, and the session goes on with the new program.
#[test]
fn a_checkpoint_that_meets_an_exec() -> Result<()> {
    let Some(tracker) = tracker("a_checkpoint_that_meets_an_exec") else { return Ok(()) };
    let scratch = Scratch::new()?;
    let mut victim = begun(&scratch, tracker)?;
    let pid = victim.pid().to_string();
    let session = SessionClient::connect(victim.pid())?.context("no session")?.hello()?.session;
    for round in 0..10 {
        let epoch = SessionClient::connect(victim.pid())?.context("no session")?.hello()?.epoch;
        let images = scratch.directory(&format!("met-{round}"))?;
        ensure!(victim.ask("exec")? == "ready");
        let ran = memckpt(["dump", "-t", &pid, "--leave-stopped", "--track-mem", "-D"])
            .arg(&images)
            .args(&["--or-full", "--prev-images-dir", "../1"])
            .run()?;
        if ran.code == Some(0) {
            victim.wait_stopped()?;
            let compared = oracle::compare(&images, victim.pid())?;
            ensure!(compared.inherited == 0 && compared.own > 1000, "round {round}: {compared:?}");
            victim.go_on()?;
        } else {
            ensure!(
                ran.code == Some(1) && !ran.stderr.contains("panicked at"),
                "round {round}: {}",
                ran.stderr
            );
            ensure!(!images.join("inventory.img").exists(), "it fails, and yet there is a checkpoint");
        }
        followed(victim.pid(), epoch).with_context(|| format!("round {round}: {}", ran.stderr))?;
        let now = SessionClient::connect(victim.pid())?.context("no session")?.hello()?.session;
        ensure!(now == session, "round {round}: the session has ended: {}", ran.stderr);
    }
    Ok(())
}

/// Another process under the number of the checkpoint's.
#[test]
fn a_pid_that_is_used_again() -> Result<()> {
    const NAME: &str = "a_pid_that_is_used_again";
    let Some(tracker) = tracker(NAME) else { return Ok(()) };
    let scratch = Scratch::new()?;
    let victim = begun(&scratch, tracker)?;
    let pid = victim.pid();
    stop(pid)?;
    drop(victim);
    let mut again = None;
    // Somebody else's fork may come in between.
    for _ in 0..200 {
        std::fs::write("/proc/sys/kernel/ns_last_pid", (pid - 1).to_string()).context("ns_last_pid")?;
        let victim = Victim::start("deeds", [scratch.path()])?;
        if victim.pid() == pid {
            again = Some(victim);
            break;
        }
    }
    let victim = again.context("the PID could not be had again")?;
    watch(pid, tracker)?;
    ended(&scratch, &victim, "../1", "as it was before, or of another one")
}

/// A ring too small for what happens: counted, everything is read, and nothing is lost.
#[test]
fn a_ring_that_overflows_loses_nothing() -> Result<()> {
    let Some(tracker) = tracker("a_ring_that_overflows_loses_nothing") else { return Ok(()) };
    let scratch = Scratch::new()?;
    let mut victim = Victim::start("deeds", [scratch.path()])?;
    let pid = victim.pid().to_string();
    let mut watch = memckpt(["watch", &pid, "--background", "--tracker", tracker.name()]);
    watch.command().env("MEMCKPT_TEST_RING_BYTES", "4096");
    watch.ok()?;
    memckpt(["pre-dump", "-t", &pid, "-D"]).arg(scratch.directory("1")?).ok()?;
    let session = SessionClient::connect(victim.pid())?.context("no session")?.hello()?;
    let mut stopped = Stopped::new(session.pid)?;
    // The session that would empty the ring stands still.
    ensure!(victim.ask("storm 2000")? == "done");
    stopped.go_on()?;
    let images = scratch.directory("2")?;
    let dump = ["dump", "-t", &pid, "--audit", "--leave-stopped", "--prev-images-dir", "../1", "-D"];
    memckpt(dump).arg(&images).ok()?;
    let meta: serde_json::Value = serde_json::from_slice(&std::fs::read(images.join("memckpt.json"))?)?;
    let losses = meta["counters"]["losses"].as_u64().context("no losses")?;
    ensure!(losses > session.losses.total(), "2000 calls fitted into a page");
    // Where hints are incomplete every page is read for that reason anyway.
    let hints = meta["hint_mode"].as_str().context("no hints")?;
    ensure!(hints.contains("lost") || hints.contains("incomplete"), "{meta}");
    victim.wait_stopped()?;
    let compared = oracle::compare(&images, victim.pid())?;
    say(&format!("{losses} events lost, hints {hints}, {compared:?}"));
    Ok(())
}

/// A process that is stopped, until it goes on or this is dropped.
struct Stopped(nix::unistd::Pid);

impl Stopped {
    fn new(pid: i32) -> Result<Self> {
        let pid = nix::unistd::Pid::from_raw(pid);
        nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGSTOP)?;
        Ok(Self(pid))
    }

    fn go_on(&mut self) -> Result<()> {
        nix::sys::signal::kill(self.0, nix::sys::signal::Signal::SIGCONT)?;
        Ok(())
    }
}

impl Drop for Stopped {
    fn drop(&mut self) {
        let _ = self.go_on();
    }
}
