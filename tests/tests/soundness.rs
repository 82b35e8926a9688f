//! Every row of docs/soundness.md, in each mode: a victim does what the row says between two checkpoints, and the second must equal
//! its memory byte for byte. How it got there is compared with what the table promises, and told as a cell of the table.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsStr;
use std::fmt;
use std::ops::Range;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use memckpt::tracker::control::SessionClient;
use memckpt_tests::command::{self, Ran};
use memckpt_tests::features::{Tracker, kernel_at_least};
use memckpt_tests::gate::Gate;
use memckpt_tests::session::followed;
use memckpt_tests::{Scratch, Victim, cell, is_root, memckpt, oracle, skip, victim};

const PATIENCE: Duration = Duration::from_secs(60);
/// Where hooks cannot see this (before 6.4, but for fentry), nothing is ever inherited.
const UNSEEN: &str = "not seen: writes by others";

/// What tells which pages changed, and what narrows the look.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Mode {
    tracker: Tracker,
    /// As `--hooks` takes it.
    hooks: &'static str,
}

impl fmt::Display for Mode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.tracker {
            Tracker::SoftDirty => write!(f, "soft-dirty {}", self.hooks),
            Tracker::UffdWp => f.write_str("uffd-wp"),
        }
    }
}

/// What became of the pages of a row.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Outcome {
    /// The changed pages are written, all others inherited.
    Tracked,
    /// All of the row's pages are written, those beside them inherited.
    Whole,
    /// It is not in the process's own pages: shared memory is stored as an object of its own, a file keeps what is shared.
    Object,
    /// Nothing of the process is inherited.
    AllWhole,
    /// There is no checkpoint, for a reason that it gives.
    Refused,
    /// The kernel cannot do it.
    Cannot(String),
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tracked => f.write_str("tracked"),
            Self::Whole => f.write_str("whole"),
            Self::Object => f.write_str("object"),
            Self::AllWhole => f.write_str("whole process"),
            Self::Refused => f.write_str("refused"),
            Self::Cannot(reason) => write!(f, "cannot: {reason}"),
        }
    }
}

/// What a victim tells of a row.
#[derive(Debug, Default)]
struct Told {
    range: Vec<Range<u64>>,
    changed: Vec<Range<u64>>,
    control: Vec<Range<u64>>,
    cannot: Option<String>,
}

/// A victim of `rows.c`, and what it told.
struct Rows {
    victim: Victim,
    told: BTreeMap<u32, Told>,
}

impl Rows {
    fn start(rows: &[u32], scratch: &Path) -> Result<Self> {
        let mut command = Command::new(victim::program("rows"));
        command.arg(scratch).args(rows.iter().map(u32::to_string));
        let mut this = Self {
            victim: Victim::spawn(command)?,
            told: rows.iter().map(|row| (*row, Told::default())).collect(),
        };
        let first = this.victim.line()?;
        this.listen(first, "ready")?;
        Ok(this)
    }

    fn deed(&mut self) -> Result<()> {
        let first = self.victim.ask("deed")?;
        self.listen(first, "done")
    }

    /// What came of it when none of its rows can be done.
    fn none_can(&self) -> Option<Came> {
        let reasons =
            self.told.iter().map(|(row, told)| Some((*row, Ok(Outcome::Cannot(told.cannot.clone()?)))));
        Some(Came::Checkpoint(reasons.collect::<Option<_>>()?))
    }

    /// Row 34: a write of ours into the process is under way while a checkpoint is taken on top of the first, and lands after it. `false`
    /// where it cannot be had.
    fn write_in_flight(&self, pid: &str, scratch: &Scratch) -> Result<bool> {
        let Some(gate) = Gate::new() else { return Ok(false) };
        let changed = self.told[&34].changed.first().context("nowhere to write to")?.start;
        let writer = gate.write_to(self.victim.pid(), changed);
        let deadline = Instant::now() + PATIENCE;
        while !waits_in_process_vm_writev()? {
            ensure!(Instant::now() < deadline, "the write does not wait");
            std::thread::sleep(Duration::from_millis(1));
        }
        let between = scratch.directory("between")?;
        memckpt(["pre-dump", "-t", pid, "--or-full", "--prev-images-dir", "../1", "-D"])
            .arg(&between)
            .ok()?;
        gate.open(0x77)?;
        ensure!(writer.join().ok() == Some(4096), "the write failed");
        Ok(true)
    }

    /// What became of each row in the checkpoint `second`, which must equal the stopped process.
    fn judge(&self, first: &Path, second: &Path) -> Result<BTreeMap<u32, Result<Outcome>>> {
        let pid = self.victim.pid();
        let compared = oracle::compare(second, pid)?;
        ensure!(compared.compared > 20, "hardly anything was compared: {compared:?}");
        let (before, after) = (oracle::treatment(first, pid)?, oracle::treatment(second, pid)?);
        let outcome = |row: u32, told: &Told| match &told.cannot {
            Some(reason) => Ok(Outcome::Cannot(reason.clone())),
            None => {
                match row {
                    7 => ensure!(compared.shared >= 8, "the object was not compared: {compared:?}"),
                    27 => in_one_round(&after, told)?,
                    28 => in_one_round(&before, told)?,
                    _ => {}
                }
                judge(told, &after)
            }
        };
        let mut outcomes: BTreeMap<_, _> =
            self.told.iter().map(|(row, told)| (*row, outcome(*row, told))).collect();
        if let Some(outcome) = outcomes.get_mut(&19) {
            // The child, which is part of the checkpoint.
            let child = std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children"))?;
            let compared = oracle::compare(second, child.trim().parse().context("no child")?)?;
            if compared.inherited > 0 || compared.own == 0 {
                *outcome = Err(anyhow::anyhow!("the child is not whole: {compared:?}"));
            }
        }
        Ok(outcomes)
    }

    /// Takes down what it tells, from `line` to the line `end`.
    fn listen(&mut self, mut line: String, end: &str) -> Result<()> {
        while line != end {
            let told = line.strip_prefix("row ").and_then(|rest| rest.split_once(' '));
            let (row, rest) = told.with_context(|| format!("the victim says: {line}"))?;
            let told = self.told.get_mut(&row.parse()?).context("a row that it was not asked for")?;
            let (word, rest) = rest.split_once(' ').context(line.clone())?;
            if word == "cannot" {
                told.cannot = Some(rest.to_owned());
            } else {
                let (start, end) = rest.split_once(' ').context(line.clone())?;
                let pages = u64::from_str_radix(start, 16)?..u64::from_str_radix(end, 16)?;
                match word {
                    "range" => told.range.push(pages),
                    "changed" => told.changed.push(pages),
                    "control" => told.control.push(pages),
                    _ => bail!("the victim says: {line}"),
                }
            }
            line = self.victim.line()?;
        }
        Ok(())
    }
}

fn pages(ranges: &[Range<u64>]) -> BTreeSet<u64> {
    ranges.iter().flat_map(|range| range.clone().step_by(4096)).collect()
}

/// Judges, from the images alone, what was done with the pages of a row.
fn judge(told: &Told, treatment: &oracle::Treatment) -> Result<Outcome> {
    let inherited = |ranges: &[Range<u64>]| -> BTreeSet<u64> {
        ranges.iter().flat_map(|range| treatment.inherited(range)).collect()
    };
    let (changed, control) = (pages(&told.changed), pages(&told.control));
    let wrong = inherited(&told.changed);
    ensure!(wrong.is_empty(), "changed, and inherited: {wrong:x?}");
    ensure!(!control.is_empty(), "nothing to compare with");
    let kept = inherited(&told.control);
    let untouched: BTreeSet<u64> = pages(&told.range).difference(&changed).copied().collect();
    let mut from_parent = inherited(&told.range);
    from_parent.retain(|page| untouched.contains(page));
    if kept == control && from_parent == untouched {
        return Ok(Outcome::Tracked);
    }
    ensure!(
        from_parent.is_empty(),
        "partly inherited: {} of {} untouched pages, {} of {} beside them",
        from_parent.len(),
        untouched.len(),
        kept.len(),
        control.len()
    );
    let own: usize = told.range.iter().map(|range| treatment.own(range).len()).sum();
    match kept.len() {
        n if n == control.len() && own == 0 => Ok(Outcome::Object),
        0 => Ok(Outcome::AllWhole),
        n if n == control.len() => Ok(Outcome::Whole),
        n => bail!("{n} of {} pages beside it are inherited", control.len()),
    }
}

/// Whether a thread of ours sleeps in process_vm_writev (system call 311 on x86-64).
fn waits_in_process_vm_writev() -> Result<bool> {
    let tasks = std::fs::read_dir("/proc/self/task")?.flatten();
    let calls = tasks.filter_map(|task| std::fs::read_to_string(task.path().join("syscall")).ok());
    Ok(calls.into_iter().any(|call| call.starts_with("311 ")))
}

/// A thread writes the number of its round into the pages of `told`, one after the other: at any moment none is ahead of the one
/// before it, and the first at most one ahead of the last.
fn in_one_round(images: &oracle::Treatment, told: &Told) -> Result<()> {
    let words = pages(&told.changed).into_iter().map(|page| images.word(page)).collect::<Result<Vec<_>>>()?;
    let ordered = words.windows(2).all(|pair| pair[0] >= pair[1]);
    let (first, last) = (words.first().context("no page")?, words.last().context("no page")?);
    ensure!(ordered && first - last <= 1, "pages of different moments: {words:?}");
    Ok(())
}

/// The rows that can share a process and a session.
const TOGETHER: [u32; 20] = [1, 2, 3, 7, 8, 9, 10, 11, 12, 13, 14, 15, 17, 23, 24, 27, 28, 30, 32, 36];

/// Those that cannot: most of them concern the whole process.
const ALONE: [u32; 16] = [4, 5, 6, 16, 18, 19, 20, 21, 22, 25, 26, 29, 31, 33, 34, 35];

/// What must come of a row.
fn expected(row: u32, mode: Mode) -> (Outcome, &'static [&'static str]) {
    let soft_dirty = mode.tracker == Tracker::SoftDirty;
    match row {
        4 => (Outcome::Refused, &["io_uring"]),
        5 | 33 => (Outcome::AllWhole, &[]),
        // To set a uprobe the kernel locks the address space, and no call explains why. Before 6.4 no hook sees locks (docs/design.md).
        22 => (if soft_dirty && !kernel_at_least(6, 4) { Outcome::Tracked } else { Outcome::AllWhole }, &[]),
        // A huge page has one bit.
        17 | 35 if soft_dirty => (Outcome::Whole, &[]),
        6 | 16 | 23 | 24 => (Outcome::Whole, &[]),
        7 | 8 => (Outcome::Object, &[]),
        20 => (Outcome::Refused, &["exec"]),
        21 => (Outcome::Refused, &["userfaultfd"]),
        25 => (Outcome::Refused, &["device", "/dev/mem"]),
        26 => (Outcome::Refused, &["non-linear", "--allow-emulated-nonlinear"]),
        29 => (Outcome::Refused, &["shares"]),
        31 if soft_dirty => (Outcome::Refused, &["cleared"]),
        _ => (Outcome::Tracked, &[]),
    }
}

/// What the kernel may lack for a row, as the victim's reason says it. Anything else that a victim cannot do is a failure.
fn may_lack(row: u32, mode: Mode) -> &'static [&'static str] {
    match row {
        4 | 33 => &["io_uring_setup:"],
        16 => &["this kernel has no KSM"],
        18 => &["this kernel has no swap", "there is no swap space"],
        21 => &["userfaultfd:"],
        24 => &["MAP_DROPPABLE:"],
        25 => &["open /dev/mem:"],
        34 => &["no userfaultfd for faults of the kernel"],
        35 if mode.tracker == Tracker::UffdWp => &["MADV_COLLAPSE: Invalid argument"],
        36 if !kernel_at_least(6, 12) => &["this kernel keeps the pages of zeroes"],
        _ => &[],
    }
}

/// Settings of the machine that a row changes; put back when dropped, after its victim.
struct Machine {
    settings: Vec<(&'static str, String)>,
    /// The loop device that is swapped to.
    swap: Option<String>,
}

impl Machine {
    fn prepare(rows: &[u32], scratch: &Path) -> Result<Self> {
        let paths: &[&str] = match rows {
            [6] => &["/proc/sys/vm/nr_hugepages"],
            [16] => &["/sys/kernel/mm/ksm/pages_to_scan", "/sys/kernel/mm/ksm/run"],
            _ => &[],
        };
        let read = |path: &&'static str| Some((*path, std::fs::read_to_string(path).ok()?));
        let settings = paths.iter().filter_map(read).collect();
        // A guest is the tests' own; the host's owner decides where it swaps to.
        let guest = memckpt_tests::in_guest();
        let swap = (rows == [18] && guest).then(|| swap_space(scratch)).transpose()?;
        Ok(Self { settings, swap })
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        for (path, was) in &self.settings {
            let _ = std::fs::write(path, was);
        }
        if let Some(swap) = &self.swap {
            let _ = Command::new("swapoff").arg(swap).output();
            let _ = Command::new("losetup").args(["-d", swap]).output();
        }
    }
}

/// Makes a swap space, which the victim finds as `scratch/swap`. The guests' file systems take none, but a loop device does.
fn swap_space(scratch: &Path) -> Result<String> {
    let file = scratch.join("swap.bytes");
    std::fs::write(&file, vec![0; 8 << 20])?;
    let run = |program: &str, arguments: &[&OsStr]| -> Result<String> {
        let ran = Command::new(program).args(arguments).output().context(program.to_owned())?;
        ensure!(ran.status.success(), "{program}: {ran:?}");
        Ok(String::from_utf8(ran.stdout)?.trim().to_owned())
    };
    let device = run("losetup", &["-f".as_ref(), "--show".as_ref(), file.as_os_str()])?;
    run("mkswap", &[device.as_ref()])?;
    std::os::unix::fs::symlink(&device, scratch.join("swap"))?;
    Ok(device)
}

/// A way to run memckpt of which a refusal is a result.
enum Step {
    Done(Ran),
    Refused(String),
}

fn step(run: command::Memckpt) -> Result<Step> {
    let ran = run.run()?;
    match ran.code {
        Some(0) => Ok(Step::Done(ran)),
        // 6: the audit has found something wrong.
        Some(1..=5) if !ran.stderr.contains("panicked at") => Ok(Step::Refused(ran.stderr)),
        code => bail!("memckpt ends with {code:?}:\n{}{}", ran.stdout, ran.stderr),
    }
}

/// What came of some rows.
enum Came {
    /// Of each.
    Checkpoint(BTreeMap<u32, Result<Outcome>>),
    /// Of each, where these hooks allow no incremental checkpoint.
    Full(BTreeMap<u32, Result<Outcome>>),
    /// A refusal for all.
    Refused(String),
}

/// Rows `numbers` in one process: watch, pre-dump, deeds, dump, and a look at what it holds.
fn come(mode: Mode, numbers: &[u32]) -> Result<Came> {
    let scratch = Scratch::new()?;
    let _machine = Machine::prepare(numbers, scratch.path())?;
    let (first, second) = (scratch.directory("1")?, scratch.directory("2")?);
    let mut rows = Rows::start(numbers, scratch.path())?;
    if let Some(came) = rows.none_can() {
        return Ok(came);
    }
    let pid = rows.victim.pid().to_string();
    let watch = ["watch", &pid, "--background", "--tracker", mode.tracker.name(), "--hooks", mode.hooks];
    match step(memckpt(watch))? {
        Step::Refused(why) => return Ok(Came::Refused(why)),
        Step::Done(ran) => {
            let claim = format!("dirty pages from {}", mode.tracker.name());
            ensure!(ran.stdout.contains(&claim), "not by what was asked for: {}", ran.stdout);
        }
    }
    if let Step::Refused(why) = step(memckpt(["pre-dump", "-t", &pid, "-D"]).arg(&first))? {
        return Ok(Came::Refused(why));
    }
    let mut parent = "../1";
    if numbers == [34] {
        if !rows.write_in_flight(&pid, &scratch)? {
            return Ok(cannot_all(numbers, "no userfaultfd for faults of the kernel"));
        }
        parent = "../between";
    }
    let epoch = SessionClient::connect(rows.victim.pid())?.context("no session")?.hello()?.epoch;
    rows.deed()?;
    if let Some(came) = rows.none_can() {
        return Ok(came);
    }
    if numbers == [20] {
        followed(rows.victim.pid(), epoch)?;
    }
    let dump = ["dump", "-t", &pid, "--audit", "--leave-stopped", "--prev-images-dir", parent, "-D"];
    let mut full = false;
    if let Step::Refused(why) = step(memckpt(dump).arg(&second))? {
        full = why.contains(UNSEEN);
        if !full {
            return Ok(Came::Refused(why));
        }
        if let Step::Refused(why) = step(memckpt(dump).arg(&second).arg("--or-full"))? {
            return Ok(Came::Refused(why));
        }
    }
    rows.victim.wait_stopped()?;
    let outcomes = rows.judge(&first, &second)?;
    rows.victim.go_on()?;
    let check = rows.victim.ask("check")?;
    ensure!(check == "right", "{check}");
    Ok(if full { Came::Full(outcomes) } else { Came::Checkpoint(outcomes) })
}

fn cannot_all(rows: &[u32], reason: &str) -> Came {
    Came::Checkpoint(rows.iter().map(|row| (*row, Ok(Outcome::Cannot(reason.to_owned())))).collect())
}

/// Compares the outcomes of rows that ran together with what must come of them, and tells those that are right.
fn tell(mode: Mode, rows: &[u32], came: Result<Came>, wrong: &mut Vec<String>) {
    let full = matches!(came, Ok(Came::Full(_)));
    let outcomes: BTreeMap<u32, Result<Outcome>> = match came {
        Err(error) => return wrong.push(format!("rows {rows:?}: {error:#}")),
        Ok(Came::Checkpoint(outcomes) | Came::Full(outcomes)) => outcomes,
        Ok(Came::Refused(why)) => {
            let refused = |row: u32| {
                let (_, words) = expected(row, mode);
                let named = !words.is_empty() && words.iter().all(|word| why.to_lowercase().contains(word));
                ensure!(named, "refused, but not for {words:?}: {why}");
                Ok(Outcome::Refused)
            };
            rows.iter().map(|row| (*row, refused(*row))).collect()
        }
    };
    for (row, outcome) in outcomes {
        let expected = if full { Outcome::AllWhole } else { expected(row, mode).0 };
        match outcome {
            Ok(Outcome::Cannot(reason))
                if !may_lack(row, mode).iter().any(|lack| reason.starts_with(lack)) =>
            {
                wrong.push(format!("row {row} should run here: {reason}"));
            }
            Ok(outcome) if outcome == expected || matches!(outcome, Outcome::Cannot(_)) => {
                cell(row, &mode.to_string(), &outcome.to_string());
            }
            Ok(outcome) => wrong.push(format!("row {row}: {outcome} and not {expected}")),
            Err(error) => wrong.push(format!("row {row}: {error:#}")),
        }
    }
}

fn every_row(test: &str, mode: Mode) -> Result<()> {
    if !is_root() {
        skip(test, "not root");
        return Ok(());
    }
    if let Some(reason) = mode.tracker.missing() {
        skip(test, reason);
        return Ok(());
    }
    let mut wrong = Vec::new();
    tell(mode, &TOGETHER, come(mode, &TOGETHER), &mut wrong);
    for row in ALONE {
        tell(mode, &[row], come(mode, &[row]), &mut wrong);
    }
    ensure!(wrong.is_empty(), "{mode}: {wrong:#?}");
    Ok(())
}

#[test]
fn soft_dirty_fentry() -> Result<()> {
    every_row("soft_dirty_fentry", Mode { tracker: Tracker::SoftDirty, hooks: "fentry" })
}

#[test]
fn soft_dirty_kprobe() -> Result<()> {
    every_row("soft_dirty_kprobe", Mode { tracker: Tracker::SoftDirty, hooks: "kprobe" })
}

#[test]
fn soft_dirty_tracepoint() -> Result<()> {
    every_row("soft_dirty_tracepoint", Mode { tracker: Tracker::SoftDirty, hooks: "tracepoint" })
}

#[test]
fn uffd_wp() -> Result<()> {
    every_row("uffd_wp", Mode { tracker: Tracker::UffdWp, hooks: "auto" })
}
