//! `watch --audit`: the session proves itself under a process that changes its memory in every way.

use anyhow::{Context, Result, ensure};
use memckpt_tests::features::Tracker;
use memckpt_tests::{Scratch, Victim, memckpt, quick, say, skip};

fn a_session_proves_itself(test: &str, tracker: Tracker) -> Result<()> {
    if let Some(reason) = tracker.missing() {
        skip(test, reason);
        return Ok(());
    }
    let scratch = Scratch::new()?;
    let mut victim = Victim::start("chaos", ["1".as_ref(), scratch.path().as_os_str()])?;
    // It would write while the process stands still.
    ensure!(victim.ask("pause")? == "ok", "the sibling does not pause");
    let pid = victim.pid().to_string();
    let seconds = if quick() { "30" } else { "5" };
    let watch = ["watch", &pid, "--audit", "--json", "--interval", "0.2", "--duration", seconds];
    let ran = memckpt(watch).args(&["--tracker", tracker.name()]).ok()?;
    let last = ran.stdout.lines().last().context("no line")?;
    let line: serde_json::Value = serde_json::from_str(last)?;
    let tally = &line["audit"];
    let count = |name: &str| tally[name].as_u64().with_context(|| format!("no {name} in {last}"));
    ensure!(count("audits")? >= 3 && count("vmas")? > 0 && count("disagreements")? == 0, "{last}");
    // With complete hints the pages are compared too.
    let complete = ran.stdout.lines().any(|line| line.contains(r#""hint_mode":"complete""#));
    ensure!(!complete || count("pages")? > 0, "{last}");
    say(&format!("{}: {tally}", tracker.name()));
    Ok(())
}

#[test]
fn soft_dirty() -> Result<()> {
    a_session_proves_itself("soft_dirty", Tracker::SoftDirty)
}

#[test]
fn uffd_wp() -> Result<()> {
    a_session_proves_itself("uffd_wp", Tracker::UffdWp)
}
