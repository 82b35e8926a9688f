//! Asynchronous I/O lands when it likes: with an AIO context or an io_uring nothing is inherited.

use anyhow::{Result, ensure};
use memckpt_tests::features::Tracker;
use memckpt_tests::{Scratch, Victim, memckpt, oracle, skip};

fn nothing_is_inherited(test: &str, what: &str) -> Result<()> {
    let Some(tracker) = [Tracker::SoftDirty, Tracker::UffdWp].into_iter().find(|t| t.missing().is_none())
    else {
        skip(test, "no tracker works here");
        return Ok(());
    };
    let mut command = std::process::Command::new(memckpt_tests::victim::program("odd"));
    command.arg(what);
    let victim = Victim::spawn(command)?;
    let first = victim.line()?;
    if let Some(reason) = first.strip_prefix("cannot ") {
        skip(test, reason);
        return Ok(());
    }
    ensure!(first == "ready", "the victim says {first}");
    let pid = victim.pid().to_string();
    let scratch = Scratch::new()?;
    let (one, two) = (scratch.directory("1")?, scratch.directory("2")?);
    memckpt(["watch", &pid, "--background", "--tracker", tracker.name()]).ok()?;
    memckpt(["pre-dump", "-t", &pid, "-D"]).arg(&one).ok()?;
    let dump = ["dump", "-t", &pid, "--audit", "--leave-stopped", "--prev-images-dir", "../1", "-D"];
    let ran = memckpt(dump).arg(&two).ok()?;
    victim.wait_stopped()?;
    let compared = oracle::compare(&two, victim.pid())?;
    ensure!(compared.inherited == 0 && compared.own > 10, "{compared:?}");
    ensure!(ran.stdout.contains("nothing is inherited"), "not said:\n{}", ran.stdout);
    Ok(())
}

/// A ring that is closed may have I/O under way: over the checkpoint at which it was there, and over the next, as closing
/// does not wait. What lands then is trusted by nobody.
#[test]
fn an_io_uring_that_was_closed() -> Result<()> {
    const NAME: &str = "an_io_uring_that_was_closed";
    let Some(tracker) = [Tracker::SoftDirty, Tracker::UffdWp].into_iter().find(|t| t.missing().is_none())
    else {
        skip(NAME, "no tracker works here");
        return Ok(());
    };
    let mut command = std::process::Command::new(memckpt_tests::victim::program("odd"));
    command.arg("io-uring");
    let mut victim = Victim::spawn(command)?;
    let first = victim.line()?;
    if let Some(reason) = first.strip_prefix("cannot ") {
        skip(NAME, reason);
        return Ok(());
    }
    let pid = victim.pid().to_string();
    let scratch = Scratch::new()?;
    memckpt(["watch", &pid, "--background", "--tracker", tracker.name()]).ok()?;
    memckpt(["pre-dump", "-t", &pid, "-D"]).arg(scratch.directory("1")?).ok()?;
    ensure!(victim.ask("close")? == "closed");
    for number in 2..=4 {
        let images = scratch.directory(&number.to_string())?;
        let pre_dump =
            ["pre-dump", "-t", &pid, "--json", "--prev-images-dir", &format!("../{}", number - 1), "-D"];
        let ran = memckpt(pre_dump).arg(&images).ok()?;
        let meta: serde_json::Value = serde_json::from_str(&ran.stdout)?;
        let inherited = meta["counters"]["pages_inherited"].as_u64().unwrap_or(0);
        ensure!((inherited > 0) == (number == 4), "checkpoint {number} inherits {inherited} pages");
    }
    Ok(())
}

#[test]
fn an_aio_context() -> Result<()> {
    nothing_is_inherited("an_aio_context", "aio")
}

#[test]
fn an_io_uring() -> Result<()> {
    nothing_is_inherited("an_io_uring", "io-uring")
}
