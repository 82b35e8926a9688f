//! `memckpt watch`: the live model against /proc/PID/maps, one session a target, and no trace of it afterwards.

use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use memckpt::kernel::maps::{self, Vma};
use memckpt::target::Frozen;
use memckpt::tracker::control::SessionClient;
use memckpt::tracker::epoch::{CheckpointId, Epoch};
use memckpt::tracker::session::Touched;
use memckpt_tests::features::Tracker;
use memckpt_tests::{Scratch, Victim, command, is_root, memckpt, outward, skip};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// In an order in which each finds what it needs.
const OPERATIONS: [&str; 34] = [
    "mmap",
    "touch",
    "mmap-fixed-over",
    "mmap-file",
    "mmap-shared",
    "munmap-middle",
    "munmap-fill",
    "mprotect-split",
    "mprotect-join",
    "mprotect-none",
    "mremap-shrink",
    "mremap-grow",
    "mremap-move",
    "mremap-dontunmap",
    "mremap-table",
    "brk-grow",
    "brk-more",
    "brk-shrink",
    "madvise-dontneed",
    "madvise-free",
    "madvise-dontfork",
    "madvise-dofork",
    "mlock",
    "munlock",
    "name",
    "stack",
    "shmat",
    "shmdt",
    "remap-file-pages",
    "fork",
    "many",
    "aio",
    "mmap",
    "touch",
];

const PATIENCE: Duration = Duration::from_secs(60);

/// Runs `test` with each tracker that works here; the others are said to be skipped.
fn with_each_tracker(name: &str, test: impl Fn(Tracker) -> Result<()>) -> Result<()> {
    if !is_root() {
        skip(name, "not root");
        return Ok(());
    }
    for tracker in [Tracker::SoftDirty, Tracker::UffdWp] {
        match tracker.missing() {
            Some(reason) => skip(&format!("{name} ({})", tracker.name()), reason),
            None => test(tracker).with_context(|| format!("tracker {}", tracker.name()))?,
        }
    }
    Ok(())
}

fn victim(scratch: &Scratch) -> Result<Victim> {
    Victim::start("layout", [scratch.path()])
}

/// A background session, stopped when dropped.
struct Background {
    pid: i32,
    client: Option<SessionClient>,
}

impl Background {
    fn start(victim: &Victim, tracker: Tracker) -> Result<Self> {
        let pid = victim.pid();
        memckpt(["watch", &pid.to_string(), "--background", "--tracker", tracker.name()]).ok()?;
        let mut client = SessionClient::connect(pid)?.context("no session after watch --background")?;
        // To attach anew after an exec takes seconds in an emulated guest.
        client.set_timeout(PATIENCE);
        Ok(Self { pid, client: Some(client) })
    }

    fn client(&mut self) -> Result<&mut SessionClient> {
        self.client.as_mut().context("stopped")
    }

    fn reconnect(&mut self) -> Result<()> {
        self.client = None;
        self.client = SessionClient::connect(self.pid)?;
        ensure!(self.client.is_some(), "the session is gone");
        Ok(())
    }
}

impl Drop for Background {
    fn drop(&mut self) {
        if let Some(client) = self.client.take() {
            let _ = client.stop();
        }
    }
}

fn eventually(what: &str, mut condition: impl FnMut() -> Result<bool>) -> Result<()> {
    let deadline = Instant::now() + PATIENCE;
    while !condition()? {
        ensure!(Instant::now() < deadline, "not within {PATIENCE:?}: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
    Ok(())
}

fn same_layout(client: &mut SessionClient, pid: i32, after: &str) -> Result<()> {
    let (_, model) = client.layout().with_context(|| format!("layout after {after}"))?;
    let kernel = maps::read(pid)?;
    if model != kernel {
        let only = |a: &[Vma], b: &[Vma]| {
            a.iter().filter(|v| !b.contains(v)).map(|v| format!("{v:?}")).collect::<Vec<_>>().join("\n  ")
        };
        bail!(
            "after {after}\nmodel only:\n  {}\nkernel only:\n  {}",
            only(&model, &kernel),
            only(&kernel, &model)
        );
    }
    Ok(())
}

#[test]
fn the_model_equals_maps_after_every_operation() -> Result<()> {
    with_each_tracker("the_model_equals_maps_after_every_operation", |tracker| {
        let scratch = Scratch::new()?;
        let mut victim = victim(&scratch)?;
        let mut session = Background::start(&victim, tracker)?;
        same_layout(session.client()?, victim.pid(), "the start")?;
        for operation in OPERATIONS {
            victim.ask(operation)?;
            same_layout(session.client()?, victim.pid(), operation)?;
        }
        // Once more without looking in between.
        for operation in OPERATIONS.iter().filter(|o| !o.starts_with("brk") && **o != "mlock") {
            victim.ask(operation)?;
        }
        same_layout(session.client()?, victim.pid(), "all of them again")
    })
}

/// What the target maps as one stays one, whatever is looked up and registered meanwhile: mremap(2) refuses a range of two VMAs.
#[test]
fn a_mapping_is_never_cut() -> Result<()> {
    with_each_tracker("a_mapping_is_never_cut", |tracker| {
        let scratch = Scratch::new()?;
        let mut victim = victim(&scratch)?;
        ensure!(victim.ask("remap")? == "ok");
        let mut session = Background::start(&victim, tracker)?;
        ensure!(victim.ask("remap")? == "ok");
        same_layout(session.client()?, victim.pid(), "remap")
    })
}

#[test]
fn an_exec_begins_another_epoch_on_the_new_address_space() -> Result<()> {
    with_each_tracker("an_exec_begins_another_epoch_on_the_new_address_space", |tracker| {
        let scratch = Scratch::new()?;
        let mut victim = victim(&scratch)?;
        let pid = victim.pid();
        let mut session = Background::start(&victim, tracker)?;
        let before = session.client()?.hello()?.epoch;
        ensure!(victim.ask("exec")? == "again");
        eventually("the session follows the exec", || Ok(session.client()?.hello()?.epoch > before))?;
        let info = session.client()?.hello()?;
        ensure!(info.broken.is_none() && info.epoch_checkpoint.is_none(), "{info:?}");
        same_layout(session.client()?, pid, "exec")?;
        for operation in ["mmap", "touch", "brk-grow", "stack"] {
            victim.ask(operation)?;
            same_layout(session.client()?, pid, operation)?;
        }
        Ok(())
    })
}

#[test]
fn collect_commit_and_abort_keep_the_record() -> Result<()> {
    with_each_tracker("collect_commit_and_abort_keep_the_record", |tracker| {
        let scratch = Scratch::new()?;
        let mut victim = victim(&scratch)?;
        let pid = victim.pid();
        let mut session = Background::start(&victim, tracker)?;
        victim.ask("mmap")?;
        victim.ask("touch")?;
        let (generation, vmas) = session.client()?.layout()?;

        let frozen = Frozen::freeze(pid, PATIENCE)?;
        let first = session.client()?.collect(generation)?;
        ensure!(first.broken.is_none(), "{first:?}");
        ensure!(first.relayout.is_none(), "the layout has not moved since it was read");
        ensure!(!first.changed.is_empty(), "mmap since the session began");
        ensure!(session.client()?.collect(generation).is_err(), "a second transaction");
        let id = CheckpointId::random()?;
        let epoch = session.client()?.commit(id.clone(), &[])?;
        frozen.thaw();
        let info = session.client()?.hello()?;
        ensure!((info.epoch, info.epoch_checkpoint) == (epoch, Some(id)) && epoch > Epoch::FIRST);

        // Nothing happens: nothing is changed. Then a mapping: it is, and only it.
        victim.ask("munmap-middle")?;
        let frozen = Frozen::freeze(pid, PATIENCE)?;
        let second = session.client()?.collect(generation)?;
        let now = maps::read(pid)?;
        // Beside the 4 pages at most the one that the session itself wrote to, as witness against foreign clears.
        ensure!(matches!(second.changed.pages().get(), 4 | 5), "{:?}", second.changed);
        ensure!(second.relayout.clone().is_some_and(|relayout| relayout.apply(&vmas) == now));
        session.client()?.abort(false)?;
        frozen.thaw();

        // What was touched before the abort is touched still.
        let frozen = Frozen::freeze(pid, PATIENCE)?;
        let third = session.client()?.collect(second.generation)?;
        ensure!(third.changed == second.changed && third.broken.is_none() && third.relayout.is_none());
        if let (Touched::Chunks(before), Touched::Chunks(after)) = (&second.touched, &third.touched) {
            ensure!(before.iter().all(|b| after.iter().any(|a| a.start <= b.start && b.end <= a.end)));
        }
        // A client that dies here may have cleared. Soft-dirty has a witness that it did not.
        session.client = None;
        frozen.thaw();
        session.reconnect()?;
        eventually("the transaction ends", || Ok(session.client()?.layout().is_ok()))?;
        let broken = session.client()?.hello()?.broken;
        ensure!(broken.is_some() == (tracker == Tracker::UffdWp), "{broken:?}");
        same_layout(session.client()?, pid, "a client's death")
    })
}

#[test]
fn a_foreign_clear_breaks_the_epoch() -> Result<()> {
    const NAME: &str = "a_foreign_clear_breaks_the_epoch";
    if let Some(reason) = Tracker::SoftDirty.missing() {
        skip(NAME, reason);
        return Ok(());
    }
    let scratch = Scratch::new()?;
    let victim = victim(&scratch)?;
    let mut session = Background::start(&victim, Tracker::SoftDirty)?;
    let (generation, _) = session.client()?.layout()?;
    std::fs::write(format!("/proc/{}/clear_refs", victim.pid()), "4")?;
    let frozen = Frozen::freeze(victim.pid(), PATIENCE)?;
    let collected = session.client()?.collect(generation)?;
    frozen.thaw();
    ensure!(collected.broken.as_deref().is_some_and(|why| why.contains("cleared")), "{:?}", collected.broken);
    Ok(())
}

/// A session in the foreground with JSON on a pipe.
fn foreground(victim: &Victim, tracker: Tracker, arguments: &[&str]) -> Result<Child> {
    Command::new(command::binary())
        .args(["watch", &victim.pid().to_string(), "--json", "--interval", "0.05"])
        .args(["--tracker", tracker.name()])
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::inherit())
        .spawn()
        .context("memckpt watch")
}

fn lines(child: &mut Child) -> Result<impl Iterator<Item = Result<serde_json::Value>> + use<>> {
    use std::io::BufRead as _;
    let stdout = std::io::BufReader::new(child.stdout.take().context("no pipe")?);
    Ok(stdout.lines().map(|line| Ok(serde_json::from_str(&line?)?)))
}

fn files_of(pid: i32) -> Vec<String> {
    let names = std::fs::read_dir("/run/memckpt").into_iter().flatten().flatten();
    names
        .map(|e| e.file_name().to_string_lossy().into_owned())
        .filter(|n| n.starts_with(&format!("{pid}.")))
        .collect()
}

fn flags_of(pid: i32) -> Result<Vec<String>> {
    let smaps = std::fs::read_to_string(format!("/proc/{pid}/smaps"))?;
    // sd: soft-dirty itself, which a clear takes away.
    let flags = smaps.lines().filter_map(|l| l.strip_prefix("VmFlags:"));
    Ok(flags.map(|l| l.split_whitespace().filter(|f| *f != "sd").collect::<Vec<_>>().join(" ")).collect())
}

/// What a session must leave as it was, a fact a line.
fn traces(victim: &Victim) -> Result<Vec<String>> {
    let pid = victim.pid();
    let status = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
    let kept = ["TracerPid", "Threads", "SigPnd", "ShdPnd", "SigBlk", "SigIgn", "SigCgt", "FDSize"];
    let mut facts: Vec<String> =
        status.lines().filter(|l| kept.iter().any(|k| l.starts_with(k))).map(str::to_owned).collect();
    // Running or about to sleep is all the same; stopped would not be.
    let states = outward::thread_states(pid)?.into_iter();
    facts.extend(states.map(|(tid, s)| format!("{tid} {}", if s == 'R' { 'S' } else { s })));
    facts.extend(maps::read(pid)?.iter().zip(flags_of(pid)?).map(|(vma, flags)| format!("{vma:?} {flags}")));
    Ok(facts)
}

#[test]
fn an_interrupt_ends_it_with_a_summary_and_no_trace() -> Result<()> {
    with_each_tracker("an_interrupt_ends_it_with_a_summary_and_no_trace", |tracker| {
        for signal in [Signal::SIGINT, Signal::SIGTERM] {
            let scratch = Scratch::new()?;
            let mut victim = victim(&scratch)?;
            victim.ask("mmap")?;
            let before = traces(&victim)?;
            let mut watch = foreground(&victim, tracker, &[])?;
            let mut lines = lines(&mut watch)?;
            let first = lines.next().context("no sample")??;
            victim.ask("touch")?;
            let grown = |v: &serde_json::Value| {
                v["dirty"].as_u64() >= Some(first["dirty"].as_u64().unwrap_or(0) + 64)
            };
            let mut seen = false;
            for line in lines.by_ref() {
                seen = grown(&line?);
                if seen {
                    break;
                }
            }
            ensure!(seen, "64 written pages do not show");
            ensure!(files_of(victim.pid()).len() == 2, "{:?}", files_of(victim.pid()));
            kill(Pid::from_raw(watch.id().cast_signed()), signal)?;
            let summary = lines.last().context("no summary")??;
            ensure!(summary["summary"]["end"]["signal"] == signal as i32, "{summary}");
            ensure!(watch.wait()?.success());
            ensure!(files_of(victim.pid()).is_empty(), "{:?}", files_of(victim.pid()));
            let after = traces(&victim)?;
            let gone: Vec<_> = before.iter().filter(|f| !after.contains(f)).collect();
            let new: Vec<_> = after.iter().filter(|f| !before.contains(f)).collect();
            ensure!(before == after, "gone {gone:#?}\nnew {new:#?}");
            victim.ask("munmap-middle")?;
        }
        Ok(())
    })
}

#[test]
fn it_ends_with_its_target() -> Result<()> {
    with_each_tracker("it_ends_with_its_target", |tracker| {
        let scratch = Scratch::new()?;
        let victim = victim(&scratch)?;
        let pid = victim.pid();
        let mut watch = foreground(&victim, tracker, &[])?;
        let mut lines = lines(&mut watch)?;
        lines.next().context("no sample")??;
        victim.signal(Signal::SIGKILL)?;
        let summary = lines.last().context("no summary")??;
        ensure!(summary["summary"]["end"] == "target-ended", "{summary}");
        ensure!(watch.wait()?.success());
        ensure!(files_of(pid).is_empty());
        Ok(())
    })
}

#[test]
fn a_second_session_is_refused_and_a_dead_one_is_no_obstacle() -> Result<()> {
    with_each_tracker("a_second_session_is_refused_and_a_dead_one_is_no_obstacle", |tracker| {
        let scratch = Scratch::new()?;
        let victim = victim(&scratch)?;
        let pid = victim.pid().to_string();
        let mut session = Background::start(&victim, tracker)?;
        let first = session.client()?.hello()?;
        let words = ["already watched", &first.pid.to_string()];
        memckpt(["watch", &pid, "--duration", "1"]).refused(&words)?;
        memckpt(["watch", &pid, "--background"]).refused(&words)?;
        session.client = None;
        kill(Pid::from_raw(first.pid), Signal::SIGKILL)?;
        eventually("the session is dead", || Ok(SessionClient::connect(victim.pid())?.is_none()))?;
        let mut session = Background::start(&victim, tracker)?;
        let second = session.client()?.hello()?;
        ensure!(second.session != first.session);
        same_layout(session.client()?, victim.pid(), "another session's death")?;
        session.client = None;
        memckpt(["watch", &pid, "--stop"]).ok()?;
        ensure!(files_of(victim.pid()).is_empty());
        ensure!(SessionClient::connect(victim.pid())?.is_none());
        memckpt(["watch", &pid, "--stop"]).refused(&["not watched"])?;
        Ok(())
    })
}

#[test]
fn duration_ends_it_and_lines_are_plain_without_a_terminal() -> Result<()> {
    with_each_tracker("duration_ends_it_and_lines_are_plain_without_a_terminal", |tracker| {
        let scratch = Scratch::new()?;
        let victim = victim(&scratch)?;
        let pid = victim.pid().to_string();
        let arguments = ["watch", &pid, "--interval", "0.2", "--duration", "1", "--tracker", tracker.name()];
        let ran = memckpt(arguments).ok()?;
        ensure!(ran.stdout.lines().count() >= 2 && !ran.stdout.contains('\x1b'), "{}", ran.stdout);
        ensure!(ran.stderr.contains("the time was up"), "{}", ran.stderr);
        Ok(())
    })
}

#[test]
fn what_cannot_be_watched_is_refused_by_name() -> Result<()> {
    memckpt(["watch", "2147483647", "--duration", "1"]).refused(&["no such process"])?;
    memckpt(["watch", "2", "--duration", "1"]).refused(&["kernel thread"])?;
    memckpt(["watch", &std::process::id().to_string(), "--duration", "1"]).refused(&["ancestor"])?;
    Ok(())
}
