//! Process trees: every process of a tree is in the checkpoint, exact, each in its place.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use memckpt_tests::features::Tracker;
use memckpt_tests::{Scratch, Victim, is_root, memckpt, oracle, outward::Outward, quick, skip};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

fn pids(victim: &mut Victim) -> Result<Vec<i32>> {
    let answer = victim.ask("pids")?;
    let numbers = answer.strip_prefix("pids").with_context(|| answer.clone())?;
    numbers.split_ascii_whitespace().map(|pid| Ok(pid.parse()?)).collect()
}

fn show(images: &std::path::Path) -> Result<Value> {
    Ok(serde_json::from_str(&memckpt(["show", "--json"]).arg(images).ok()?.stdout)?)
}

/// pre-dump, changes in each process, dump: each process's chain equals its memory, and the tree is the one that there is.
#[test]
fn every_process_is_exact_and_in_its_place() -> Result<()> {
    const NAME: &str = "every_process_is_exact_and_in_its_place";
    let tracker = [Tracker::SoftDirty, Tracker::UffdWp].into_iter().find(|t| t.missing().is_none());
    let Some(tracker) = tracker.filter(|_| is_root()) else {
        skip(NAME, "not root, or no tracker works here");
        return Ok(());
    };
    let scratch = Scratch::new()?;
    let mut victim = Victim::start("tree", ["2", "2"])?;
    let root = victim.pid();
    // Descendants are tracked once they are a second old.
    std::thread::sleep(Duration::from_millis(1100));
    let first = scratch.directory("1")?;
    let flags = ["pre-dump", "--tracker", tracker.name(), "-t", &root.to_string(), "-D"];
    memckpt(flags).arg(&first).ok()?;
    ensure!(victim.ask("dirty 1")? == "ok");
    let young: i32 = victim.ask("born")?.parse()?;
    let all = pids(&mut victim)?;
    ensure!(all.len() == 8 && all.contains(&young), "the victim has {all:?}");

    let second = scratch.directory("2")?;
    let flags = ["dump", "--audit", "--leave-stopped", "--track-mem", "--prev-images-dir", "../1", "-t"];
    memckpt(flags).args(&[&root.to_string(), "-D"]).arg(&second).ok()?;
    victim.wait_stopped()?;
    for &pid in &all {
        let compared = oracle::compare(&second, pid).with_context(|| format!("process {pid} of {all:?}"))?;
        ensure!(compared.compared > 100, "process {pid}: hardly anything was compared: {compared:?}");
        ensure!((compared.inherited > 0) == (pid != young), "process {pid}, young {young}: {compared:?}");
        memckpt(["show", "--compare", &pid.to_string()]).arg(&second).ok()?;
    }

    let tree = show(&second)?;
    let tree = tree["processes"].as_array().context("no processes")?;
    let zombie = victim_zombie(tree)?;
    ensure!(tree.len() == all.len() + 1, "{} processes in the image", tree.len());
    for process in tree.iter().skip(1) {
        let (pid, ppid) = (process["pid"].to_string(), process["ppid"].to_string());
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"))?;
        let really = stat.rsplit_once(')').and_then(|(_, rest)| rest.split_ascii_whitespace().nth(1));
        ensure!(really == Some(&ppid), "process {pid} has parent {really:?}, in the image {ppid}");
        let before = tree.iter().take_while(|other| other["pid"] != process["pid"]);
        ensure!(
            before.into_iter().any(|other| other["pid"] == process["ppid"]),
            "{pid} comes before its parent"
        );
    }

    for &pid in &all {
        kill(Pid::from_raw(pid), Signal::SIGCONT)?;
    }
    let said = victim.ask("zombie")?;
    ensure!(said == format!("{zombie} {}", 7 << 8), "the victim's zombie is {said}, in the image {zombie}");
    ensure!(victim.ask("dirty 2")? == "ok", "a process of the tree does not go on");
    memckpt(["watch", &root.to_string(), "--stop"]).ok()?;
    Ok(())
}

/// The process of the image that has no memory.
fn victim_zombie(tree: &[Value]) -> Result<String> {
    let zombie =
        tree.iter().find(|process| process["exit_code"] == 7 << 8).context("no zombie in the image")?;
    Ok(zombie["pid"].to_string())
}

/// A child may be born at any moment of a checkpoint: whatever is in it stands still, and goes on.
#[test]
fn births_and_deaths_while_it_is_taken() -> Result<()> {
    if !is_root() {
        skip("births_and_deaths_while_it_is_taken", "not root");
        return Ok(());
    }
    let scratch = Scratch::new()?;
    let mut victim = Victim::start("tree", ["2", "1"])?;
    let root = victim.pid();
    let storm: i32 = victim.ask("storm")?.parse()?;
    for round in 0..if quick() { 6 } else { 25 } {
        let images = scratch.directory(&round.to_string())?;
        memckpt(["dump", "--leave-running", "-t", &root.to_string(), "-D"]).arg(&images).ok()?;
        let tree = show(&images)?;
        let tree = tree["processes"].as_array().context("no processes")?;
        for pid in pids(&mut victim)?.into_iter().chain([storm]) {
            ensure!(tree.iter().any(|process| process["pid"] == pid), "{pid} is not in the image");
        }
    }
    for pid in pids(&mut victim)?.into_iter().chain([storm]) {
        let now = Outward::of(pid)?;
        ensure!(now.threads.values().all(|thread| thread.tracer == 0 && thread.stopped == 'R'), "{now:?}");
    }
    ensure!(victim.ask("dirty 3")? == "ok", "a process of the tree does not go on");
    Ok(())
}

/// A cgroup of ours, in a file system mounted for it.
struct Cgroup {
    mount: std::path::PathBuf,
    directory: std::path::PathBuf,
}

impl Cgroup {
    /// What options mount(8) takes for it: `cgroup2`, or `cgroup` with the freezer.
    fn new(scratch: &Scratch, kind: &str, options: &str) -> Result<Self> {
        let mount = scratch.directory(kind)?;
        let mounted = std::process::Command::new("mount")
            .args(["-t", kind, "-o", options, "memckpt-test"])
            .arg(&mount)
            .output()?;
        ensure!(mounted.status.success(), "mount: {}", String::from_utf8_lossy(&mounted.stderr));
        let directory = mount.join(format!("memckpt-test-{}", std::process::id()));
        let cgroup = Self { mount, directory };
        std::fs::create_dir(&cgroup.directory)?;
        Ok(cgroup)
    }

    fn add(&self, pid: i32) -> Result<()> {
        Ok(std::fs::write(self.directory.join("cgroup.procs"), pid.to_string())?)
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        // Its members go to where they were before.
        for pid in std::fs::read_to_string(self.directory.join("cgroup.procs")).unwrap_or_default().lines() {
            let _ = std::fs::write(self.mount.join("cgroup.procs"), pid);
        }
        let _ = std::fs::remove_dir(&self.directory);
        let _ = std::process::Command::new("umount").arg("-l").arg(&self.mount).status();
    }
}

/// `--freeze-cgroup`: the cgroup is the tree, or the dump is refused; and nothing is frozen.
#[test]
fn a_cgroup_holds_the_tree_and_nobody_else() -> Result<()> {
    const NAME: &str = "a_cgroup_holds_the_tree_and_nobody_else";
    if !is_root() {
        skip(NAME, "not root");
        return Ok(());
    }
    for (kind, options, freeze) in [
        ("cgroup2", "rw", ("cgroup.freeze", ["1", "0"])),
        ("cgroup", "freezer", ("freezer.state", ["FROZEN", "THAWED"])),
    ] {
        let scratch = Scratch::new()?;
        let cgroup = Cgroup::new(&scratch, kind, options)?;
        let mut victim = Victim::start("tree", ["2", "1"])?;
        for pid in pids(&mut victim)? {
            cgroup.add(pid)?;
        }
        let root = victim.pid().to_string();
        let dump = |name: &str| -> Result<memckpt_tests::command::Memckpt> {
            let images = scratch.directory(name)?;
            let flags = ["dump", "--leave-running", "--freeze-cgroup"];
            Ok(memckpt(flags).arg(&cgroup.directory).args(&["-t", &root, "-D"]).arg(images))
        };
        dump("1")?.ok()?;
        let mut stranger = Victim::start("layout", [scratch.path()])?;
        cgroup.add(stranger.pid())?;
        dump("2")?.refused(&["is in the cgroup", &stranger.pid().to_string(), "Move it out"])?;
        ensure!(stranger.is_alive()?);
        drop(stranger);
        let set = |state: usize| std::fs::write(cgroup.directory.join(freeze.0), freeze.1[state]);
        set(0)?;
        let refused = dump("3").and_then(|dump| dump.refused(&["is frozen", "thaw it"]));
        set(1)?;
        refused.with_context(|| kind.to_owned())?;
        ensure!(victim.ask("dirty 1")? == "ok");
        let no = [scratch.path().to_str().context("a path")?, "-t", &root, "-D", "/nowhere"];
        memckpt(["dump", "--freeze-cgroup"]).args(&no).refused(&["no cgroup"])?;
    }
    Ok(())
}

/// `--status-fd` and `--pidfile`.
#[test]
fn those_who_wait_are_told() -> Result<()> {
    use std::io::Read as _;
    let scratch = Scratch::new()?;
    let victim = Victim::start("layout", [scratch.path()])?;
    let images = scratch.directory("images")?;
    let (mut reader, writer) = std::io::pipe()?;
    let pid = victim.pid().to_string();
    // The only descriptor that memckpt has beside the standard ones.
    let fd = 9;
    let command = format!(
        "exec {} dump --leave-running --status-fd {fd} --pidfile pid -t {pid} -D {} {fd}>&0 0</dev/null",
        memckpt_tests::command::binary().display(),
        images.display()
    );
    let status = std::process::Command::new("/bin/sh").args(["-c", &command]).stdin(writer).status()?;
    ensure!(status.success(), "{status}");
    let mut said = Vec::new();
    reader.read_to_end(&mut said)?;
    ensure!(said == [0], "said {said:?}");
    ensure!(std::fs::read_to_string(images.join("pid"))? == pid);
    let other = scratch.directory("other")?;
    memckpt(["dump", "--status-fd", "77", "-t", &pid, "-D"]).arg(&other).refused(&["descriptor 77"])?;
    Ok(())
}

/// A shell vforks each command that it runs: the two share their memory until the command has called exec, and the shell does
/// not stand still sooner.
#[test]
fn a_shell_that_runs_one_command_after_the_other() -> Result<()> {
    if !is_root() {
        skip("a_shell_that_runs_one_command_after_the_other", "not root");
        return Ok(());
    }
    let scratch = Scratch::new()?;
    let mut command = std::process::Command::new("/bin/sh");
    command.args(["-c", "while :; do /bin/true; done"]);
    let shell = Victim::spawn(command)?;
    for round in 0..40 {
        let images = scratch.directory(&round.to_string())?;
        let flags = ["dump", "--leave-running", "-t", &shell.pid().to_string(), "-D"];
        memckpt(flags).arg(&images).ok().with_context(|| format!("round {round} of {}", shell.pid()))?;
    }
    Ok(())
}
