//! 4 MiB moved over old content between two checkpoints, both ends 2 MiB-aligned: soft-dirty does not see it, as the
//! kernel moves whole page tables (move_page_tables, mm/mremap.c). memckpt does; what Debian's criu makes of it is printed.

use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use memckpt_tests::features::Tracker;
use memckpt_tests::{Scratch, Victim, memckpt, oracle, say, skip};

/// Pages of 4 MiB.
const MOVED: u64 = 1024;

fn by_memckpt(test: &str, tracker: Tracker) -> Result<()> {
    if let Some(reason) = tracker.missing() {
        skip(test, reason);
        return Ok(());
    }
    let scratch = Scratch::new()?;
    let (first, second) = (scratch.directory("1")?, scratch.directory("2")?);
    let mut victim = Victim::start("moved", [""; 0])?;
    let pid = victim.pid().to_string();
    memckpt(["watch", &pid, "--background", "--tracker", tracker.name()]).ok()?;
    memckpt(["pre-dump", "-t", &pid, "-D"]).arg(&first).ok()?;
    ensure!(victim.ask("move")? == "moved", "the victim did not move");
    let dump = ["dump", "-t", &pid, "--audit", "--leave-stopped", "--prev-images-dir", "../1", "-D"];
    memckpt(dump).arg(&second).ok()?;
    victim.wait_stopped()?;
    let compared = oracle::compare(&second, victim.pid())?;
    ensure!(compared.own >= MOVED, "the moved pages were inherited: {compared:?}");
    say(&format!("memckpt, {}: {MOVED} pages moved, 0 stale, {} written", tracker.name(), compared.own));
    Ok(())
}

#[test]
fn soft_dirty() -> Result<()> {
    by_memckpt("soft_dirty", Tracker::SoftDirty)
}

#[test]
fn uffd_wp() -> Result<()> {
    by_memckpt("uffd_wp", Tracker::UffdWp)
}

/// How many pages of a chain that criu made differ from the stopped process.
fn stale(images: &Path, pid: i32) -> Result<u64> {
    let shown = memckpt(["show", "--json", "--compare", &pid.to_string()]).arg(images).run()?;
    let shown: serde_json::Value = serde_json::from_str(&shown.stdout)
        .with_context(|| format!("show says {}{}", shown.stdout, shown.stderr))?;
    shown["comparison"]["pages_different"].as_u64().context("no comparison")
}

/// No judgement of a peer: only that both were really run on the same case.
#[test]
fn criu_for_comparison() -> Result<()> {
    if let Some(reason) = Tracker::SoftDirty.missing() {
        skip("criu_for_comparison", reason);
        return Ok(());
    }
    let scratch = Scratch::new()?;
    let (first, second) = (scratch.directory("1")?, scratch.directory("2")?);
    let mut victim = Victim::start("moved", [""; 0])?;
    let pid = victim.pid().to_string();
    let criu = |action: &str, images: &Path, more: &[&str]| -> Result<()> {
        let mut command = Command::new("criu");
        command.args([action, "-t", &pid, "--track-mem", "-v4", "-o", "log", "-D"]).arg(images).args(more);
        let output = command.output().context("start criu")?;
        let log = std::fs::read_to_string(images.join("log")).unwrap_or_default();
        let end: Vec<&str> = log.lines().rev().take(15).collect();
        ensure!(output.status.success(), "criu {action} fails: {output:?}\n{end:#?}");
        Ok(())
    };
    criu("pre-dump", &first, &[])?;
    ensure!(victim.ask("move")? == "moved", "the victim did not move");
    criu("dump", &second, &["--prev-images-dir", "../1", "--leave-stopped"])?;
    victim.wait_stopped()?;
    say(&format!("criu: {MOVED} pages moved, {} stale", stale(&second, victim.pid())?));
    Ok(())
}
