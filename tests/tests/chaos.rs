//! Everything at once: threads that change their memory in every way, a sibling that writes into it, and checkpoint after
//! checkpoint. At each dump the process stands still, and the chain must equal it, byte for byte.
//!
//! `MEMCKPT_CHAOS_SECONDS` says how long each mode takes, `MEMCKPT_SEED` from where, `MEMCKPT_CHAOS_PAGES` how many pages have a
//! shadow copy.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, ensure};
use memckpt_tests::command::Memckpt;
use memckpt_tests::features::Tracker;
use memckpt_tests::{Scratch, Victim, memckpt, oracle, quick, say, skip};

/// memckpt's exit code where the parent does not belong to the epoch being tracked.
const NO_PARENT: i32 = 4;
const UNSEEN: &str = "not seen: writes by others";

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok()?.parse().ok()
}

/// A source of truth and the hooks that narrow the look at it.
#[derive(Debug, Clone, Copy)]
struct Mode {
    tracker: Tracker,
    hooks: &'static str,
}

/// What was done in one mode.
#[derive(Debug, Default)]
struct Totals {
    dumps: u64,
    pre_dumps: u64,
    refused: u64,
    /// Pages compared by the oracle and by the audit.
    compared: u64,
    /// Compared by the oracle, and not what they were at the checkpoint before: written since, or moved.
    changed: u64,
    inherited: u64,
    written: u64,
    /// Scans that hints narrowed.
    narrowed: u64,
    steps: u64,
    /// Ways of I/O that this kernel does not have.
    missing: BTreeSet<String>,
    /// Why nothing may be inherited with these hooks on this kernel, if so.
    never_incremental: Option<String>,
}

/// Same-page merging at work, as it was before when dropped. Without KSM, or without rights: nothing.
struct Ksm(Vec<(PathBuf, String)>);

impl Ksm {
    fn hasten() -> Self {
        let mut before = Vec::new();
        for (name, value) in [("pages_to_scan", "1000"), ("sleep_millisecs", "10"), ("run", "1")] {
            let path = Path::new("/sys/kernel/mm/ksm").join(name);
            if let Ok(old) = std::fs::read_to_string(&path)
                && std::fs::write(&path, value).is_ok()
            {
                before.push((path, old));
            }
        }
        Self(before)
    }
}

impl Drop for Ksm {
    fn drop(&mut self) {
        for (path, old) in &self.0 {
            let _ = std::fs::write(path, old);
        }
    }
}

/// One victim and its chain of checkpoints.
struct Run<'a> {
    scratch: Scratch,
    victim: Victim,
    pid: String,
    parent: Option<String>,
    totals: &'a mut Totals,
}

/// One process from `seed` on, until `end`.
fn run(seed: u64, mode: Mode, end: Instant, totals: &mut Totals) -> Result<()> {
    let scratch = Scratch::new()?;
    let pages = number("MEMCKPT_CHAOS_PAGES").unwrap_or(16384).to_string();
    let name = seed.to_string();
    let args = [name.as_ref(), scratch.path().as_os_str(), pages.as_ref()];
    let victim = Victim::start("chaos", args)?;
    let pid = victim.pid().to_string();
    let mut run = Run { scratch, victim, pid, parent: None, totals };
    let result = run.links(mode, end);
    result.with_context(|| {
        format!("the victim says {:?}, lives: {:?}", run.victim.pending_lines(), run.victim.is_alive())
    })
}

impl Run<'_> {
    fn links(&mut self, mode: Mode, end: Instant) -> Result<()> {
        let watch =
            ["watch", &self.pid, "--background", "--tracker", mode.tracker.name(), "--hooks", mode.hooks];
        memckpt(watch).ok()?;
        // A chain of two dozen: its length costs time.
        let ways = [None, None, Some("aio"), None, Some("uring"), None, Some("ring"), None];
        for (link, asynchronous) in ways.into_iter().enumerate() {
            // Under way over the first pre-dump of the link, and gone by the second.
            let under_way = asynchronous.is_some_and(|how| self.begins(how));
            if under_way && asynchronous == Some("uring") {
                self.is_refused("io_uring")?;
            } else {
                self.pre_dump(&format!("{link}-0"))?;
            }
            self.tell("calm")?;
            self.pre_dump(&format!("{link}-1"))?;
            self.tell("poke")?;
            self.dump(&format!("{link}-2")).with_context(|| format!("link {link}"))?;
            if Instant::now() > end {
                break;
            }
        }
        self.totals.steps += self.victim.ask("count")?.parse::<u64>()?;
        for (how, named) in [("registered", "io_uring"), ("userfaultfd", "userfaultfd")] {
            if self.begins(how) {
                self.is_refused(named)?;
                self.tell("calm")?;
            }
        }
        memckpt(["watch", &self.pid, "--stop"]).run()?;
        ensure!(self.victim.is_alive()?, "the victim has ended");
        Ok(())
    }

    fn tell(&mut self, command: &str) -> Result<()> {
        let answer = self.victim.ask(command)?;
        ensure!(answer == "ok", "{command}: {answer}");
        Ok(())
    }

    /// Whether the victim could begin I/O of this kind.
    fn begins(&mut self, how: &str) -> bool {
        match self.victim.ask(how).as_deref() {
            Ok("ok") => true,
            answer => {
                self.totals.missing.insert(format!("{how}: {answer:?}"));
                false
            }
        }
    }

    /// A command that makes checkpoint `name` on top of the last one.
    fn checkpoint(&mut self, args: &[&str], name: &str) -> Result<(Memckpt, PathBuf)> {
        let images = self.scratch.directory(name)?;
        let mut command = memckpt(args).args(&["-t", &self.pid, "-D"]).arg(&images);
        if let Some(parent) = &self.parent {
            command = command.arg("--prev-images-dir").arg(format!("../{parent}"));
            if self.totals.never_incremental.is_some() {
                command = command.arg("--or-full");
            }
        }
        Ok((command, images))
    }

    fn pre_dump(&mut self, name: &str) -> Result<()> {
        let (command, images) = self.checkpoint(&["pre-dump"], name)?;
        let ran = command.run()?;
        if ran.code == Some(NO_PARENT) && ran.stderr.contains(UNSEEN) && self.totals.dumps == 0 {
            // Without the hook that sees others write (6.4 and later, or fentry) nothing is ever inherited: full ones then.
            self.totals.never_incremental = Some(UNSEEN.to_owned());
            std::fs::remove_dir(images).context("the refused checkpoint left something")?;
            let (command, _) = self.checkpoint(&["pre-dump"], name)?;
            command.ok()?;
        } else {
            ensure!(ran.code == Some(0), "pre-dump {name} fails: {}", ran.stderr);
        }
        self.totals.pre_dumps += 1;
        self.made(name)
    }

    /// The next one is made on top of it. Where all are full ones, none needs the one before: two dozen are more than a guest has room for.
    fn made(&mut self, name: &str) -> Result<()> {
        if let Some(before) = self.parent.replace(name.to_owned())
            && self.totals.never_incremental.is_some()
        {
            std::fs::remove_dir_all(self.scratch.path().join(before))?;
        }
        Ok(())
    }

    fn is_refused(&mut self, named: &str) -> Result<()> {
        let (command, images) = self.checkpoint(&["pre-dump"], "refused")?;
        command.refused(&[named])?;
        std::fs::remove_dir(images).context("the refused checkpoint left something")?;
        self.totals.refused += 1;
        Ok(())
    }

    /// A dump, compared with the process, which stands still.
    fn dump(&mut self, name: &str) -> Result<()> {
        self.tell("pause")?;
        let flags = ["dump", "--audit", "--leave-stopped", "--track-mem", "--allow-emulated-nonlinear"];
        let (command, images) = self.checkpoint(&flags, name)?;
        command.ok()?;
        self.victim.wait_stopped()?;
        let compared = oracle::compare(&images, self.victim.pid())?;
        let meta: serde_json::Value = serde_json::from_slice(&std::fs::read(images.join("memckpt.json"))?)?;
        let totals = &mut *self.totals;
        totals.dumps += 1;
        totals.compared += compared.compared + compared.shared;
        totals.compared += meta["audit"]["pages_compared"].as_u64().unwrap_or(0);
        totals.changed += compared.changed;
        totals.inherited += compared.inherited;
        totals.written += compared.own;
        totals.narrowed += u64::from(meta["hint_mode"] == "complete");
        self.made(name)?;
        self.victim.go_on()?;
        self.tell("go")
    }
}

fn chaos(test: &str, mode: Mode) -> Result<()> {
    if let Some(reason) = mode.tracker.missing() {
        skip(test, reason);
        return Ok(());
    }
    let seconds = number("MEMCKPT_CHAOS_SECONDS").unwrap_or(if quick() { 20 } else { 60 });
    let now = SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs();
    let mut seed = number("MEMCKPT_SEED").unwrap_or(now);
    let end = Instant::now() + Duration::from_secs(seconds);
    let mut totals = Totals::default();
    let ksm = Ksm::hasten();
    let first = seed;
    while Instant::now() < end {
        run(seed, mode, end, &mut totals).with_context(|| format!("MEMCKPT_SEED={seed}"))?;
        seed += 1;
    }
    drop(ksm);
    let incremental = totals.never_incremental.is_none();
    ensure!(totals.compared > 0 && totals.steps > 0, "{totals:?}");
    ensure!((totals.inherited > 0) == incremental && (totals.changed > 0) == incremental, "{totals:?}");
    let complete = incremental && matches!(mode.hooks, "fentry" | "kprobe");
    ensure!(!complete || totals.narrowed > 0, "hints never narrowed a scan: {totals:?}");
    say(&format!(
        "{} with {} hooks: seeds {first} to {}, 0 lost, {totals:?}",
        mode.tracker.name(),
        mode.hooks,
        seed - 1
    ));
    Ok(())
}

#[test]
fn soft_dirty_fentry() -> Result<()> {
    chaos("soft_dirty_fentry", Mode { tracker: Tracker::SoftDirty, hooks: "fentry" })
}

#[test]
fn soft_dirty_kprobe() -> Result<()> {
    chaos("soft_dirty_kprobe", Mode { tracker: Tracker::SoftDirty, hooks: "kprobe" })
}

#[test]
fn soft_dirty_tracepoint() -> Result<()> {
    chaos("soft_dirty_tracepoint", Mode { tracker: Tracker::SoftDirty, hooks: "tracepoint" })
}

#[test]
fn uffd_wp() -> Result<()> {
    chaos("uffd_wp", Mode { tracker: Tracker::UffdWp, hooks: "auto" })
}
