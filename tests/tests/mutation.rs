//! The audit is not blind: each hook in turn is left out while its facts are believed, a victim does what that hook tells,
//! and `dump --audit` must refuse the checkpoint with exit code 6. With all hooks the same deeds pass.
//!
//! Where two hooks tell the same, one alone is not missed: then both are left out at once, and that is caught.

use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use memckpt::tracker::control::SessionClient;
use memckpt::tracker::epoch::Epoch;
use memckpt_tests::features::Tracker;
use memckpt_tests::gate::Gate;
use memckpt_tests::session;
use memckpt_tests::{Scratch, Victim, is_root, memckpt, oracle, say, skip};

const WITHOUT: &str = "MEMCKPT_UNSOUND_WITHOUT_HOOK";
/// `--audit` found something wrong.
const AUDIT: i32 = 6;
/// The parent does not belong to the epoch being tracked.
const EPOCH: i32 = 4;

/// What a victim can do in one epoch, each told by few hooks.
const DEEDS: [&str; 7] = ["touch", "truncate", "drop", "write", "move", "replace", "stack"];

/// What came of a checkpoint after a deed.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Outcome {
    /// The checkpoint equals the process; some of it is inherited.
    Exact,
    /// The checkpoint equals the process, all of which it holds.
    Whole,
    /// The audit refused it.
    Caught,
    /// Nothing may be inherited, the epoch being over.
    Ended,
    /// The kernel does not let the deed be done.
    Cannot(String),
}

/// What must come of it when a hook is missed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Expect {
    /// The audit catches it: wherever hints narrow the look (`Narrowed`), where soft-dirty is the truth, or always.
    Caught(Where),
    /// The epoch is over all the same.
    Ended,
    /// Right all the same, since the other hook tells; that both together are needed, another line shows.
    OtherHook(&'static str),
    /// Pages are inherited that must not be, though their bytes happen to be right: with the hook, none are.
    Inherits,
    /// The kernel does not do it to pages that nobody has written to; those that somebody has are read anyway.
    Impossible,
    /// No decision rests on it.
    NotNeeded,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Where {
    Narrowed,
    SoftDirty,
    /// Soft-dirty pages that are pinned at a clear stay dirty: what lands in them later is seen (docs/soundness.md, rows 4, 34).
    WriteProtected,
    /// Where each lock has a number. Elsewhere calls that should have moved the generation have not, the accounts do not
    /// balance, and the layout is read anew.
    Numbered,
    Always,
}

/// [`session::followed`], unless nothing tells the session of an exec.
fn followed(pid: i32, epoch: Epoch, without: Option<&str>) -> Result<()> {
    if without == Some("end of the mm+exec") {
        // Nothing tells it.
        return Ok(());
    }
    session::followed(pid, epoch)
}

/// A session under `hooks` without one hook, a checkpoint, the deed, and another one on top of it.
fn checkpoint_after(deeds: &[&str], hooks: &str, tracker: Tracker, without: Option<&str>) -> Result<Outcome> {
    let scratch = Scratch::new()?;
    let (first, second) = (scratch.directory("1")?, scratch.directory("2")?);
    let mut victim = Victim::start("deeds", [scratch.path()])?;
    let pid = victim.pid().to_string();
    let watch = ["watch", &pid, "--background", "--hooks", hooks, "--tracker", tracker.name()];
    let mut watch = memckpt(watch);
    if let Some(without) = without {
        watch.command().env(WITHOUT, without);
    }
    let watched = watch.ok()?;
    ensure!(watched.stderr.contains("UNSOUND") == without.is_some(), "not said aloud:\n{}", watched.stderr);
    let taken = memckpt(["pre-dump", "-t", &pid, "-D"]).arg(&first).ok()?;
    ensure!(
        taken.stdout.contains("UNSOUND") == without.is_some(),
        "the checkpoint does not say:\n{}",
        taken.stdout
    );
    let epoch = SessionClient::connect(victim.pid())?.context("no session")?.hello()?.epoch;
    let (mut flight, mut island) = (None, None);
    for deed in deeds {
        if *deed == "flight" {
            let Some(gate) = Gate::new() else {
                return Ok(Outcome::Cannot("no userfaultfd for faults of the kernel".into()));
            };
            let writer = gate.write_to(victim.pid(), victim.ask("island")?.parse()?);
            // Well inside the call. Were it not, nothing would be caught, and the test would fail.
            std::thread::sleep(Duration::from_millis(300));
            flight = Some((gate, writer));
            continue;
        }
        if *deed == "hammer" {
            island = Some(victim.ask("island")?.parse::<u64>()?);
            continue;
        }
        let answer = victim.ask(deed)?;
        match answer.strip_prefix("cannot ") {
            Some(reason) => return Ok(Outcome::Cannot(reason.to_owned())),
            None => ensure!(answer == "done" || answer == "ready", "{deed}: {answer}"),
        }
        if *deed == "exec" {
            followed(victim.pid(), epoch, without)?;
        }
    }
    let mut parent = "../1".to_owned();
    if let Some(island) = island {
        // While checkpoints are taken: what lands between a scan and the clear after it is in no bit, and is not written again.
        let mut time = Duration::ZERO;
        for n in 0..4 {
            let name = format!("hammered-{n}");
            let images = scratch.directory(&name)?;
            let writer = (n > 0).then(|| hammer(victim.pid(), island + (n - 1) * PASS * 4096, time));
            let began = Instant::now();
            memckpt(["pre-dump", "-t", &pid, "--prev-images-dir", &parent, "-D"]).arg(&images).ok()?;
            time = began.elapsed();
            if let Some(writer) = writer {
                ensure!(writer.join().ok() == Some(PASS), "not all was written");
            }
            parent = format!("../{name}");
        }
    }
    if let Some((gate, writer)) = flight {
        // A checkpoint while it is under way; then it lands.
        let between = scratch.directory("between")?;
        memckpt(["pre-dump", "-t", &pid, "--prev-images-dir", &parent, "-D"]).arg(&between).ok()?;
        gate.open(0x77)?;
        ensure!(writer.join().ok() == Some(4096), "the write failed");
        parent = "../between".to_owned();
    }
    let dump = ["dump", "-t", &pid, "--audit", "--leave-stopped", "--prev-images-dir", &parent, "-D"];
    let ran = memckpt(dump).arg(&second).run()?;
    match ran.code {
        Some(0) => {}
        Some(AUDIT) => return Ok(Outcome::Caught),
        Some(EPOCH) => return Ok(Outcome::Ended),
        // Without a word of its end the session reads an address space that is gone.
        Some(1) if ran.stderr.contains("no longer exists") => return Ok(Outcome::Ended),
        code => bail!("dump ends with {code:?}:\n{}{}", ran.stdout, ran.stderr),
    }
    // What the audit let pass must be right.
    victim.wait_stopped()?;
    let compared = oracle::compare(&second, victim.pid());
    let compared = compared.with_context(|| format!("the audit is blind to {deeds:?}"))?;
    Ok(if compared.inherited > 0 { Outcome::Exact } else { Outcome::Whole })
}

/// How many pages a pass of the hammer hits.
const PASS: u64 = 150;

/// Another process, this one, writes a word to each of [`PASS`] pages from `address` on in process `pid`, once, within `time`. How
/// many it hit.
fn hammer(pid: i32, address: u64, time: Duration) -> JoinHandle<u64> {
    std::thread::spawn(move || {
        let mut word = 0x7777_u64;
        for page in 0..PASS {
            let local = libc::iovec { iov_base: (&raw mut word).cast(), iov_len: 8 };
            let remote = libc::iovec { iov_base: (address + page * 4096) as *mut _, iov_len: 8 };
            // SAFETY: reads eight bytes of ours; writes into another process.
            if unsafe { libc::process_vm_writev(pid, &raw const local, 1, &raw const remote, 1, 0) } != 8 {
                return page;
            }
            std::thread::sleep(time / PASS as u32);
        }
        PASS
    })
}

/// The purposes and facts to go without, the deed that shows it, and what must come of it.
const MUTATIONS: [(&str, &str, Expect); 19] = [
    ("faults", "touch", Expect::Caught(Where::Narrowed)),
    ("faults", "write", Expect::Caught(Where::Narrowed)),
    ("unmapped pages", "truncate", Expect::OtherHook("dropped pages")),
    ("zapped pages", "truncate", Expect::OtherHook("dropped pages")),
    ("zapped pages, batched", "truncate", Expect::OtherHook("dropped pages")),
    ("dropped pages", "truncate", Expect::Caught(Where::Narrowed)),
    ("huge-page collapses", "collapse", Expect::Impossible),
    ("madvise by any route", "drop", Expect::NotNeeded),
    ("VMA generation", "stack", Expect::Caught(Where::Numbered)),
    ("VMA generation", "move", Expect::OtherHook("VMA generation+layout calls")),
    ("layout calls", "move", Expect::OtherHook("VMA generation+layout calls")),
    ("VMA generation+layout calls", "move", Expect::Caught(Where::SoftDirty)),
    ("the mmap lock's release", "flight", Expect::Caught(Where::WriteProtected)),
    ("the mmap lock's release", "hammer", Expect::Caught(Where::Always)),
    ("accesses by others", "hammer", Expect::Caught(Where::Always)),
    ("io_uring rings made", "ring", Expect::Inherits),
    ("end of the mm", "exec", Expect::OtherHook("end of the mm+exec")),
    ("exec", "exec", Expect::OtherHook("end of the mm+exec")),
    ("end of the mm+exec", "exec", Expect::Ended),
];

/// What `memckpt check` says of `hooks`: whether hints are complete, and the purposes that are hooked.
fn hooked(hooks: &str) -> Result<Option<(bool, Vec<String>)>> {
    let checked: serde_json::Value = serde_json::from_str(&memckpt(["check", "--json"]).ok()?.stdout)?;
    let families = checked["hooks"]["families"].as_array().context("no families")?;
    let family = families.iter().find(|f| f["name"] == hooks).context("no such family")?;
    let Some(all) = family["report"]["hooks"].as_array() else { return Ok(None) };
    let attached = all.iter().filter(|h| h["attached"].as_array().is_some_and(|a| !a.is_empty()));
    let names = attached.filter_map(|h| Some(h["purpose"].as_str()?.to_owned())).collect();
    let missing: Vec<&str> =
        ["own-faults", "remote-faults", "zaps", "collapses", "layout-calls", "generation"]
            .into_iter()
            .filter(|fact| {
                !family["report"]["facts"].as_array().is_some_and(|f| f.iter().any(|known| known == fact))
            })
            .collect();
    Ok(Some((missing.is_empty(), names)))
}

fn each_hook_is_missed(test: &str, hooks: &str) -> Result<()> {
    if !is_root() {
        skip(test, "not root");
        return Ok(());
    }
    let Some(tracker) = [Tracker::SoftDirty, Tracker::UffdWp].into_iter().find(|t| t.missing().is_none())
    else {
        skip(test, "no tracker works here");
        return Ok(());
    };
    let Some((complete, attached)) = hooked(hooks)? else {
        skip(test, "this kernel has no such hooks");
        return Ok(());
    };
    let outcome = checkpoint_after(&DEEDS, hooks, tracker, None).context("with every hook")?;
    if outcome == Outcome::Ended {
        // On 6.1 others' writes are seen by fentry only.
        let checked = memckpt(["check"]).ok()?.stdout;
        ensure!(
            !attached.iter().any(|p| p == "accesses by others" || p == "the mmap lock's release"),
            "{checked}"
        );
        say(&format!(
            "{hooks}, {}: nothing is ever inherited, as others' writes are not seen",
            tracker.name()
        ));
        return Ok(());
    }
    let hammered = checkpoint_after(&["hammer"], hooks, tracker, None).context("with every hook, hammer")?;
    ensure!(matches!(hammered, Outcome::Exact | Outcome::Whole), "with every hook, hammer: {hammered:?}");
    ensure!(outcome == Outcome::Exact, "with every hook: {outcome:?}");
    let mut blind = Vec::new();
    for (names, deed, expect) in MUTATIONS {
        let has = |name: &str| attached.iter().any(|purpose| purpose == name);
        let is_there = |name| has(name) || (name == "dropped pages" && has("unmapped pages"));
        if !names.split('+').all(is_there) {
            continue;
        }
        let outcome = checkpoint_after(&[deed], hooks, tracker, Some(names))
            .with_context(|| format!("{hooks}, without {names}, {deed}"))?;
        let narrowed = match expect {
            Expect::Caught(Where::Narrowed) => complete,
            Expect::Caught(Where::SoftDirty) => tracker == Tracker::SoftDirty,
            Expect::Caught(Where::WriteProtected) => tracker == Tracker::UffdWp,
            Expect::Caught(Where::Numbered) => has("the mmap lock's release"),
            _ => true,
        };
        let right = matches!(outcome, Outcome::Exact | Outcome::Whole);
        let verdict = match (&outcome, expect) {
            (Outcome::Caught, Expect::Caught(_) | Expect::OtherHook(_)) => "caught by the audit",
            (_, Expect::Caught(_)) if right && !narrowed => "right: all is read here, and that shows it",
            (Outcome::Cannot(_), Expect::Impossible) => "the kernel refuses to",
            (Outcome::Cannot(_), _) if deed == "ring" || deed == "flight" => "cannot be tried here",
            (Outcome::Ended, Expect::Ended | Expect::OtherHook(_)) => {
                "refused: the epoch is over all the same"
            }
            (_, Expect::OtherHook(other)) if right => other,
            (Outcome::Exact, Expect::Inherits) => {
                let with = checkpoint_after(&[deed], hooks, tracker, None)?;
                ensure!(with == Outcome::Whole, "with {names}, {deed}: {with:?}");
                "it inherits, and must not: with the hook it does not"
            }
            (_, Expect::NotNeeded) if right => "right: no decision rests on it",
            _ => {
                blind.push(format!("{names}, {deed}: {outcome:?}"));
                "NOT AS EXPECTED"
            }
        };
        let verdict = match expect {
            Expect::OtherHook(other) if verdict == other => format!("right: another hook tells; see {other}"),
            _ => verdict.to_owned(),
        };
        let why = if let Outcome::Cannot(why) = &outcome { format!(" ({why})") } else { String::new() };
        say(&format!("{hooks}, {}: without {names}, {deed}: {verdict}{why}", tracker.name()));
    }
    ensure!(blind.is_empty(), "not as expected: {blind:#?}");
    Ok(())
}

#[test]
fn fentry() -> Result<()> {
    each_hook_is_missed("fentry", "fentry")
}

#[test]
fn kprobe() -> Result<()> {
    each_hook_is_missed("kprobe", "kprobe")
}

#[test]
fn tracepoint() -> Result<()> {
    each_hook_is_missed("tracepoint", "tracepoint")
}
