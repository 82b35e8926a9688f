//! kill -9 at random moments of `pre-dump` and `dump`, of one memckpt process or of all of them: the target runs on, finds nothing
//! wrong with itself, and has what it had before.
//!
//! `MEMCKPT_KILLS` says how often (default 28); the seed is printed.

#![allow(clippy::print_stderr, reason = "the seed, to repeat a failure")]

#[path = "target/victim.rs"]
#[allow(dead_code, reason = "shared with target.rs, which uses all of it")]
mod victim;

use std::fs;
use std::os::unix::process::CommandExt as _;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, ensure};
use memckpt::kernel::status;
use memckpt_tests::memory::Random;
use memckpt_tests::outward::Outward;
use memckpt_tests::peer::Peer;
use memckpt_tests::program::Program;
use memckpt_tests::strike::at_each_moment;
use memckpt_tests::{Scratch, command, is_root, memckpt, quick, skip};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use victim::{Belongings, Victim};

/// Workers of `crowd`: a busy loop always, since it wakes the others; sleeps; waits; a small alternate stack under
/// signals; restartable sequences; a stack of 2 KiB; seccomp filters that allow all, and that deny shmat.
const CROWDS: [&str; 7] = ["f", "fs", "fw", "fm", "frr", "ft", "fmswrrt"];
/// Where a crowd takes half a minute to start: a tiny stack, and all kinds of workers at once.
const FEW_CROWDS: [&str; 2] = ["ft", "fmswrrt"];
const FILTERED: [&str; 2] = ["!fsw", "-fsw"];

/// Marks the processes of a test in their environment.
const MARK: &str = "MEMCKPT_TEST_KILLS";

/// Who dies.
#[derive(Debug, Clone, Copy)]
enum Whom {
    Command,
    Session,
    All,
}

/// The memckpt processes that carry our mark: the command itself and any session in the background.
fn marked(mark: &str) -> Vec<i32> {
    let wanted = format!("{MARK}={mark}");
    let Ok(entries) = fs::read_dir("/proc") else { return Vec::new() };
    entries
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse::<i32>().ok())
        .filter(|pid| {
            environment(*pid).is_some_and(|environment| {
                environment.split(|&byte| byte == 0).any(|word| word == wanted.as_bytes())
            })
        })
        .collect()
}

/// The environment of a process that lives. A session that its command has just started has none to be seen for a moment, as execve(2) has
/// changed its address space (which lets the command go on, and be killed) and not yet said where the environment is (environ_read,
/// fs/proc/base.c); it would be overlooked, and watch the target when nobody does.
fn environment(pid: i32) -> Option<Vec<u8>> {
    loop {
        let environment = fs::read(format!("/proc/{pid}/environ")).ok()?;
        let is_memckpt =
            || fs::read_link(format!("/proc/{pid}/exe")).is_ok_and(|exe| exe == command::binary());
        if !environment.is_empty() || !is_memckpt() {
            return Some(environment);
        }
    }
}

/// Kills them all at once, and waits until they have ended. Their environment goes first (exit_mm before exit_files, kernel/exit.c):
/// by that alone they would seem gone while their userfaultfd is still registered, which the next memckpt takes for the target's own.
fn kill_all(pids: &[i32]) {
    for &pid in pids {
        // ESRCH: it ended by itself.
        let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
    }
    let ended = |pid: i32| status::stat(pid).map_or(true, |stat| matches!(stat.state, 'Z' | 'X'));
    let deadline = Instant::now() + Duration::from_secs(20);
    while !pids.iter().all(|&pid| ended(pid)) && Instant::now() < deadline {
        std::thread::sleep(Duration::from_micros(100));
    }
}

fn start(kind: &str, pid: i32, images: &std::path::Path, mark: &str) -> Result<Child> {
    let mut run = Command::new(command::binary());
    run.args([kind, "-t", &pid.to_string(), "-D"]).arg(images);
    if kind == "dump" {
        run.args(["--leave-running", "--track-mem", "--tcp-established"]);
    }
    run.env(MARK, mark).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).process_group(0);
    run.spawn().context("start memckpt")
}

/// What is killed at, and must not notice.
trait Target {
    fn pid(&self) -> i32;
    /// Everything in it gets on, and nothing is wrong.
    fn progresses(&mut self) -> Result<()>;
    /// It has what it had before, and nothing of ours.
    fn is_untouched(&self) -> Result<()>;
}

/// One process with threads in all kinds of states.
struct Crowd {
    victim: Victim,
    before: Belongings,
}

impl Crowd {
    fn start(workers: &str) -> Result<Self> {
        let victim = Victim::start(workers, 2)?;
        let before = victim.belongings()?;
        Ok(Self { victim, before })
    }
}

impl Target for Crowd {
    fn pid(&self) -> i32 {
        self.victim.pid()
    }

    fn progresses(&mut self) -> Result<()> {
        self.victim.progresses()
    }

    fn is_untouched(&self) -> Result<()> {
        self.victim.has(&self.before)
    }
}

/// A tree of processes with unix sockets between them and TCP connections to us.
struct Connected {
    program: Program,
    peers: Vec<Peer>,
    before: Vec<(i32, Outward)>,
    _scratch: Scratch,
}

impl Connected {
    fn start() -> Result<Self> {
        let scratch = Scratch::new()?;
        let output = scratch.path().join("output");
        fs::write(&output, "")?;
        let mut command = Command::new(memckpt_tests::victim::program("connected"));
        command.arg(&output);
        let program = Program::start(command, output)?;
        let peers = (0..6).map(|n| Peer::connect(&program.output, n % 2 == 0)).collect::<Result<_>>()?;
        let mut before = Vec::new();
        for pid in memckpt::target::descendants(program.pid)? {
            before.push((pid, Outward::of(pid)?));
        }
        ensure!(before.len() == 3, "{} processes", before.len());
        Ok(Self { program, peers, before, _scratch: scratch })
    }
}

impl Target for Connected {
    fn pid(&self) -> i32 {
        self.program.pid
    }

    fn progresses(&mut self) -> Result<()> {
        self.program.wait_for(self.program.lines()? + 2)?;
        for (n, peer) in self.peers.iter_mut().enumerate() {
            peer.exchange(2000).with_context(|| format!("connection {n}"))?;
        }
        // On their way while the next one dies.
        self.peers.iter_mut().take(2).try_for_each(|peer| peer.send(200_000))
    }

    fn is_untouched(&self) -> Result<()> {
        for (pid, before) in &self.before {
            let deadline = Instant::now() + Duration::from_secs(20);
            loop {
                // Output files grow and processes sleep and run; all that is compared stays.
                let now = Outward::of(*pid)?;
                if now == *before {
                    break;
                }
                ensure!(Instant::now() < deadline, "process {pid} was {before:#?}\nand is {now:#?}");
                std::thread::sleep(Duration::from_millis(1));
            }
        }
        Ok(())
    }
}

/// Kills at `target`, `count` of them.
fn kills(target: &mut impl Target, name: &str, count: usize, random: &mut Random) -> Result<()> {
    let scratch = Scratch::new()?;
    let mark = format!("{}-{name}", std::process::id());

    // How long they take, undisturbed.
    let mut took = [Duration::ZERO; 2];
    for (index, kind) in ["pre-dump", "dump"].into_iter().enumerate() {
        let images = scratch.directory(&format!("whole-{kind}"))?;
        let begin = Instant::now();
        let status = start(kind, target.pid(), &images, &mark)?.wait()?;
        took[index] = begin.elapsed();
        ensure!(status.success(), "{kind} of {name} fails undisturbed ({status})");
    }
    stop_sessions(target.pid(), &mark);
    target.is_untouched().context("after undisturbed checkpoints")?;

    for round in 0..count {
        let (index, kind) = if round % 2 == 0 { (0, "pre-dump") } else { (1, "dump") };
        let whom = [Whom::Command, Whom::Session, Whom::All][random.below(3)];
        let limit = usize::try_from(took[index].as_micros())? * 6 / 5;
        let delay = Duration::from_micros(random.below(limit.max(1)) as u64);
        let images = scratch.directory(&format!("{round}"))?;

        let begin = Instant::now();
        let mut child = start(kind, target.pid(), &images, &mark)?;
        // A moment is what is wanted here: sleep most of the way, spin the rest.
        std::thread::sleep(delay.saturating_sub(Duration::from_micros(200)));
        while begin.elapsed() < delay {
            std::hint::spin_loop();
        }
        let command = i32::try_from(child.id())?;
        match whom {
            Whom::Command => kill_all(&[command]),
            Whom::Session => {
                kill_all(&marked(&mark).into_iter().filter(|&pid| pid != command).collect::<Vec<_>>());
            }
            Whom::All => kill_all(&marked(&mark)),
        }
        child.wait()?;
        let what = || format!("{name}, round {round}: {kind}, {whom:?} killed after {delay:?}");
        target.progresses().with_context(what)?;
        // A session that still lives keeps what it needs in the target; with it gone, nothing may remain.
        stop_sessions(target.pid(), &mark);
        target.is_untouched().with_context(what)?;
        // A checkpoint is whole or visibly not.
        if images.join("inventory.img").exists() {
            memckpt(["show"]).arg(&images).ok().with_context(what)?;
        }
        fs::remove_dir_all(&images)?;
    }
    // And the next one, after all those deaths, works.
    let images = scratch.directory("after")?;
    let mut after = memckpt(["pre-dump", "-t", &target.pid().to_string(), "-D"]).arg(&images);
    after.command().env(MARK, &mark);
    after.ok().with_context(|| format!("{name}, after {count} kills"))?;
    stop_sessions(target.pid(), &mark);
    target.is_untouched()
}

/// Ends the sessions that live: by their command, and where that cannot be, by force.
fn stop_sessions(root: i32, mark: &str) {
    for pid in memckpt::target::descendants(root).unwrap_or_default() {
        let _ = memckpt(["watch", &pid.to_string(), "--stop"]).run();
    }
    let sessions = marked(mark);
    let deadline = Instant::now() + Duration::from_secs(5);
    while !marked(mark).is_empty() && Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(2));
    }
    // Those that have stopped by themselves are waited for, too.
    kill_all(&sessions);
}

/// How many kills there are to be of each of `kinds` things, and where.
fn asked(kinds: usize, what: &str) -> Result<(usize, Random)> {
    let asked = std::env::var("MEMCKPT_KILLS").ok().and_then(|count| count.parse::<usize>().ok());
    let count = asked.unwrap_or(if quick() { 7 } else { 28 }).div_ceil(kinds);
    let seed = SystemTime::now().duration_since(UNIX_EPOCH)?.subsec_nanos();
    eprintln!("{count} kills of each of {what}, seed {seed}");
    Ok((count, Random(u64::from(seed))))
}

/// All of `crowds`, sharing the number of kills.
fn test(name: &str, crowds: &[&str]) -> Result<()> {
    if !is_root() {
        skip(name, "not root");
        return Ok(());
    }
    let (count, mut random) = asked(crowds.len(), &format!("{crowds:?}"))?;
    for workers in crowds {
        let mut crowd = Crowd::start(workers)?;
        kills(&mut crowd, &format!("crowd {workers}"), count, &mut random)?;
        crowd.victim.finish()?;
    }
    Ok(())
}

#[test]
fn a_target_survives_our_deaths() -> Result<()> {
    let crowds = if quick() { &FEW_CROWDS[..] } else { &CROWDS };
    test("a_target_survives_our_deaths", crowds)
}

#[test]
fn a_filtered_target_survives_our_deaths() -> Result<()> {
    test("a_filtered_target_survives_our_deaths", &FILTERED)
}

#[test]
fn a_tree_with_connections_survives_our_deaths() -> Result<()> {
    const NAME: &str = "a_tree_with_connections_survives_our_deaths";
    if !is_root() {
        skip(NAME, "not root");
        return Ok(());
    }
    let (count, mut random) = asked(1, "a tree")?;
    kills(&mut Connected::start()?, "a tree with connections", count, &mut random)
}

/// Looking at messages sets SO_PEEK_OFF: killed at any such moment, we leave it as it was.
#[test]
fn killed_while_messages_are_looked_at() -> Result<()> {
    /// include/uapi/asm-generic/socket.h
    const SO_PEEK_OFF: u64 = 42;
    let scratch = Scratch::new()?;
    let output = scratch.path().join("output");
    let mut command = Command::new(memckpt_tests::victim::program("descriptors"));
    command.arg(&output).arg(scratch.path());
    let program = Program::start(command, output)?;
    let pid = program.pid.to_string();
    // At rest, since it takes the messages out and puts them in again: then there would be nothing to look at.
    let dump = |moment: u64| {
        program.come_to_rest(scratch.path())?;
        let images = scratch.directory(&moment.to_string())?;
        Ok(memckpt(["dump", "--leave-running", "--file-locks", "-t", &pid, "-D"]).arg(images))
    };
    let sets_it = |regs: &libc::user_regs_struct| {
        regs.orig_rax == libc::SYS_setsockopt as u64
            && (regs.rsi, regs.rdx) == (libc::SOL_SOCKET as u64, SO_PEEK_OFF)
    };
    // The victim looks whether it is set, and that all messages are there.
    let moments = at_each_moment(dump, sets_it, || {
        std::fs::remove_file(scratch.path().join("hold"))?;
        program.wait_for(program.lines()? + 3)
    })?;
    // Three sockets, each time before and after.
    ensure!(moments >= 4, "only {moments} moments");
    Ok(())
}
