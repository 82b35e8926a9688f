//! Everything at once: threads that change their memory in every way, a sibling that writes into it, and checkpoint after
//! checkpoint. At each dump the process stands still, and the chain must equal it, byte for byte.
//!
//! `MEMCKPT_CHAOS_SECONDS` says how long each mode takes, `MEMCKPT_SEED` from where.

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, ensure};
use memckpt_tests::features::Tracker;
use memckpt_tests::{Scratch, Victim, memckpt, oracle, quick, say, skip};
use nix::sys::signal::Signal;

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok()?.parse().ok()
}

/// What was compared in one mode.
#[derive(Debug, Default)]
struct Totals {
    dumps: u64,
    pre_dumps: u64,
    /// Compared by the oracle and by the audit.
    compared: u64,
    inherited: u64,
    written: u64,
    steps: u64,
}

/// One process from `seed` on, until `end`.
fn run(seed: u64, tracker: Tracker, end: Instant, totals: &mut Totals) -> Result<()> {
    let scratch = Scratch::new()?;
    let mut victim = Victim::start("chaos", [seed.to_string().as_ref(), scratch.path().as_os_str()])?;
    let result = chain(&scratch, &mut victim, tracker, end, totals);
    result.with_context(|| {
        format!("the victim says {:?}, lives: {:?}", victim.pending_lines(), victim.is_alive())
    })
}

fn chain(
    scratch: &Scratch,
    victim: &mut Victim,
    tracker: Tracker,
    end: Instant,
    totals: &mut Totals,
) -> Result<()> {
    let pid = victim.pid().to_string();
    memckpt(["watch", &pid, "--background", "--tracker", tracker.name()]).ok()?;
    // A chain of a dozen: its length costs time.
    let mut parent: Option<String> = None;
    for link in 0..4_u32 {
        for part in 0..3_u32 {
            let name = format!("{link}-{part}");
            let images = scratch.directory(&name)?;
            let last = part == 2;
            let mut command = if last {
                ensure!(victim.ask("pause")? == "ok", "the sibling does not pause");
                let flags =
                    ["dump", "--audit", "--leave-stopped", "--track-mem", "--allow-emulated-nonlinear"];
                memckpt(flags)
            } else {
                memckpt(["pre-dump"])
            };
            command = command.args(&["-t", &pid, "-D"]).arg(&images);
            if let Some(parent) = &parent {
                command = command.arg("--prev-images-dir").arg(format!("../{parent}"));
            }
            command.ok().with_context(|| format!("link {link}, part {part}"))?;
            if last {
                victim.wait_stopped()?;
                let compared = oracle::compare(&images, victim.pid())
                    .with_context(|| format!("link {link}, part {part}"))?;
                let meta: serde_json::Value =
                    serde_json::from_slice(&std::fs::read(images.join("memckpt.json"))?)?;
                let audited = meta["audit"]["pages_compared"].as_u64().unwrap_or(0);
                totals.dumps += 1;
                totals.compared += compared.compared + compared.shared + audited;
                totals.inherited += compared.inherited;
                totals.written += compared.own;
                victim.signal(Signal::SIGCONT)?;
                ensure!(victim.ask("go")? == "ok", "the sibling does not go on");
            } else {
                totals.pre_dumps += 1;
            }
            parent = Some(name);
        }
        if Instant::now() > end {
            break;
        }
    }
    totals.steps += victim.ask("count")?.parse::<u64>()?;
    memckpt(["watch", &pid, "--stop"]).ok()?;
    Ok(())
}

fn chaos(test: &str, tracker: Tracker) -> Result<()> {
    if let Some(reason) = tracker.missing() {
        skip(test, reason);
        return Ok(());
    }
    let seconds = number("MEMCKPT_CHAOS_SECONDS").unwrap_or(if quick() { 30 } else { 60 });
    let now = SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs();
    let mut seed = number("MEMCKPT_SEED").unwrap_or(now);
    let end = Instant::now() + Duration::from_secs(seconds);
    let mut totals = Totals::default();
    while Instant::now() < end {
        run(seed, tracker, end, &mut totals).with_context(|| format!("MEMCKPT_SEED={seed}"))?;
        seed += 1;
    }
    ensure!(totals.inherited > 0 && totals.steps > 0, "{totals:?}");
    say(&format!("{}: seeds up to {}, 0 lost, {totals:?}", tracker.name(), seed - 1));
    Ok(())
}

#[test]
fn soft_dirty() -> Result<()> {
    chaos("soft_dirty", Tracker::SoftDirty)
}

#[test]
fn uffd_wp() -> Result<()> {
    chaos("uffd_wp", Tracker::UffdWp)
}
