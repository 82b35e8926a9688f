//! Programs that are dumped and ended, restored, and go on: each says itself whether all is right.

use std::fs;
use std::io::{BufRead as _, BufReader};
use std::net::TcpListener;
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::os::unix::net::UnixDatagram;
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use nix::fcntl::{FcntlArg, FdFlag, OFlag, fcntl};

use crate::pair::{Pair, Tool, Wants};
use crate::peer::Peer;
use crate::program::{PATIENCE, Program};
use crate::redis::Redis;
use crate::{Scratch, memckpt, say, victim};

/// Tests that are one of the programs below each, of a pair: `fn NAME() PROGRAM(ARGUMENTS);`.
#[macro_export]
macro_rules! goes_on {
    ($pair:expr; $($(#[$comment:meta])* fn $name:ident() $program:ident($($argument:expr),*);)*) => {$(
        $(#[$comment])*
        #[test]
        fn $name() -> anyhow::Result<()> {
            $crate::going_on::$program($pair, stringify!($name) $(, $argument)*)
        }
    )*};
}

/// Dumps, restores and lets go on, round after round. `at_rest`: it is dumped while it rests, for what it does has moments that cannot be
/// kept.
fn rounds(
    pair: Pair,
    test: &str,
    at_rest: bool,
    wants: &Wants,
    start: impl Fn(&Scratch) -> Result<Program>,
) -> Result<()> {
    let Some(scratch) = pair.place(test)? else { return Ok(()) };
    let mut program = start(&scratch)?;
    for round in 0..pair.rounds() {
        if at_rest {
            program.come_to_rest(scratch.path())?;
        }
        let before = once(pair, &mut program, &scratch, round, wants, || Ok(()))?;
        if at_rest {
            fs::remove_file(scratch.path().join("hold"))?;
        }
        program.wait_for(before + 10).with_context(|| format!("round {round}, after {before} lines"))?;
    }
    let (times, lines) = (pair.rounds(), program.lines()?);
    say(&format!("{test}: restored {times} times, {lines} lines, all right"));
    Ok(())
}

/// Dumps, which ends it, and restores; `meanwhile` is done in between. How many lines there were then.
fn once(
    pair: Pair,
    program: &mut Program,
    scratch: &Scratch,
    round: usize,
    wants: &Wants,
    meanwhile: impl FnOnce() -> Result<()>,
) -> Result<usize> {
    let images = scratch.directory(&round.to_string())?;
    pair.dump(program.pid, &images, wants).with_context(|| format!("round {round}"))?;
    let before = if round == 0 { program.ended()? } else { program.lines()? };
    meanwhile()?;
    pair.restore(&images, wants).with_context(|| format!("round {round}"))?;
    Ok(before)
}

/// Program `start`.
///
/// # Errors
///
/// When it does not go on rightly.
pub fn program(
    pair: Pair,
    test: &str,
    wants: &Wants,
    start: impl Fn(&Scratch) -> Result<Program>,
) -> Result<()> {
    rounds(pair, test, false, wants, start)
}

/// Victim `going_on` of this kind.
///
/// # Errors
///
/// When it does not go on rightly.
pub fn victim(pair: Pair, test: &str, kind: &str) -> Result<()> {
    program(pair, test, &Wants::default(), |scratch| Program::victim(kind, scratch))
}

/// Each kind of descriptor, with what waits in it, its flags, its owner and its lock.
///
/// # Errors
///
/// When it does not go on rightly.
pub fn descriptors(pair: Pair, test: &str) -> Result<()> {
    let wants = Wants { locks: true, ..Wants::default() };
    rounds(pair, test, true, &wants, |scratch| {
        let output = scratch.path().join("output");
        let mut command = Command::new(victim::program("descriptors"));
        command.arg(&output).arg(scratch.path());
        if pair.dumper == Tool::Criu {
            command.arg("plain");
        }
        Program::start(command, output)
    })
}

/// Pseudoterminals both of whose ends are in the tree, one of them in control of its session.
///
/// # Errors
///
/// When it does not go on rightly.
pub fn terminals(pair: Pair, test: &str) -> Result<()> {
    rounds(pair, test, true, &Wants::default(), |scratch| {
        Program::script("terminals.py", scratch, &[scratch.path().as_os_str()])
    })
}

/// `--shell-job`: what was started on one terminal goes on on another.
///
/// # Errors
///
/// When it does not go on rightly.
pub fn shell_job(pair: Pair, test: &str) -> Result<()> {
    let Some(scratch) = pair.place(test)? else { return Ok(()) };
    let images = scratch.directory("images")?;
    let mut command = Command::new("/usr/bin/python3");
    command.arg("-c").arg(include_str!("../victims/shell_job.py")).arg(scratch.path());
    let output = command.args(pair.shell_job(&images)?).output()?;
    let said = String::from_utf8_lossy(&output.stdout);
    let log = fs::read_to_string(images.join("restore.log")).unwrap_or_default();
    let errors: Vec<&str> = log.lines().filter(|line| line.contains("Error")).collect();
    ensure!(
        output.status.success() && said.ends_with("ok\n"),
        "{said}{}{errors:#?}",
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(())
}

/// A tree with connections, idle and full: its peers notice no more than a delay.
///
/// # Errors
///
/// When it, or a peer, does not go on rightly.
pub fn connections(pair: Pair, test: &str) -> Result<()> {
    let wants = Wants { connections: true, ..Wants::default() };
    for user in [&[][..], &["nobody"]] {
        let Some(scratch) = pair.place(test)? else { return Ok(()) };
        let output = scratch.path().join("output");
        fs::write(&output, "")?;
        fs::set_permissions(scratch.path(), fs::Permissions::from_mode(0o755))?;
        let mut command = Command::new(victim::program("connected"));
        command.arg(&output).args(user);
        let mut program = Program::start(command, output)?;
        let mut peers =
            (0..4).map(|n| Peer::connect(&program.output, n % 2 == 0)).collect::<Result<Vec<_>>>()?;
        for round in 0..pair.rounds() {
            ensure!(peers[0].fill()? > 100_000, "hardly anything is on its way");
            // One that sends meanwhile, unheard.
            let before = once(pair, &mut program, &scratch, round, &wants, || peers[1].send(1000))?;
            program.wait_for(before + 10).with_context(|| format!("round {round}, after {before} lines"))?;
            for (n, peer) in peers.iter_mut().enumerate() {
                peer.receive().with_context(|| format!("round {round}, connection {n}"))?;
                peer.exchange(1000).with_context(|| format!("round {round}, connection {n}"))?;
            }
        }
        say(&format!("{test}: restored {} times, {} lines, all right", pair.rounds(), program.lines()?));
    }
    Ok(())
}

/// A program whose datagrams go to somebody outside of the tree, as to a log daemon.
///
/// # Errors
///
/// When one is lost.
pub fn outer_datagrams(pair: Pair, test: &str) -> Result<()> {
    const TEXT: &str = r"
import itertools, os, socket, sys, time
out = os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
log = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
log.connect(sys.argv[2])
for number in itertools.count(1):
    log.send(b'%d' % number)
    os.write(out, b'%d ok\n' % number)
    time.sleep(0.02)
";
    let Some(scratch) = pair.place(test)? else { return Ok(()) };
    let (output, log) = (scratch.path().join("output"), scratch.path().join("log"));
    let daemon = UnixDatagram::bind(&log)?;
    daemon.set_read_timeout(Some(PATIENCE))?;
    let mut command = Command::new("/usr/bin/python3");
    command.arg("-c").arg(TEXT).arg(&output).arg(&log);
    let mut program = Program::start(command, output)?;
    let inode = fs::metadata(format!("/proc/self/fd/{}", daemon.as_raw_fd()))?.ino();
    let wants = Wants { outer_socket: Some(inode), ..Wants::default() };
    if pair.dumper == Tool::Memckpt {
        refused_without_external(&program, &scratch.directory("refused")?, inode)?;
    }
    // Few datagrams have room in the queue.
    let (sender, received) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        let mut buffer = [0; 32];
        while let Ok(len) = daemon.recv(&mut buffer) {
            if sender.send(String::from_utf8_lossy(&buffer[..len]).into_owned()).is_err() {
                return;
            }
        }
    });
    all_arrives(pair, &mut program, &scratch, &wants, || Ok(received.recv_timeout(PATIENCE)?))?;
    Ok(())
}

/// Dumps, restores and lets go on a program that tells somebody outside the number of each line before it writes it; `next` is what came
/// there next. How many came.
fn all_arrives(
    pair: Pair,
    program: &mut Program,
    scratch: &Scratch,
    wants: &Wants,
    mut next: impl FnMut() -> Result<String>,
) -> Result<usize> {
    let mut arrived = 0;
    for round in 0..pair.rounds() {
        let before = once(pair, program, scratch, round, wants, || Ok(()))?;
        program.wait_for(before + 10).with_context(|| format!("round {round}, after {before} lines"))?;
        while arrived < before + 10 {
            arrived += 1;
            let got = next()?;
            ensure!(got == arrived.to_string(), "{got} came where {arrived} was due");
        }
    }
    Ok(arrived)
}

/// A program that writes to a pipe that somebody outside of the tree reads.
///
/// # Errors
///
/// When what it writes is lost.
pub fn outer_pipe(pair: Pair, test: &str) -> Result<()> {
    const TEXT: &str = r"
import itertools, os, sys, time
out = os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
for number in itertools.count(1):
    os.write(int(sys.argv[2]), b'%d\n' % number)
    os.write(out, b'%d ok\n' % number)
    time.sleep(0.02)
";
    let Some(scratch) = pair.place(test)? else { return Ok(()) };
    let (ours, theirs) = nix::unistd::pipe2(OFlag::O_CLOEXEC)?;
    fcntl(&theirs, FcntlArg::F_SETFD(FdFlag::empty()))?;
    let inode = fs::metadata(format!("/proc/self/fd/{}", ours.as_raw_fd()))?.ino();
    let wants = Wants { outer_pipe: Some((inode, theirs.as_raw_fd())), ..Wants::default() };
    let output = scratch.path().join("output");
    let mut command = Command::new("/usr/bin/python3");
    command.arg("-c").arg(TEXT).arg(&output).arg(theirs.as_raw_fd().to_string());
    let mut program = Program::start(command, output)?;
    let mut lines = BufReader::new(fs::File::from(ours)).lines();
    let next = || Ok(lines.next().context("the pipe is closed")??);
    let count = all_arrives(pair, &mut program, &scratch, &wants, next)?;
    say(&format!("{test}: restored {} times, {count} lines, none lost", pair.rounds()));
    Ok(())
}

fn refused_without_external(program: &Program, images: &Path, inode: u64) -> Result<()> {
    let dump = memckpt(["dump", "-t", &program.pid.to_string(), "-D"]).arg(images);
    dump.refused(&["--external", &format!("unix[{inode}]")])?;
    Ok(())
}

/// A redis-server with a client of its own.
struct Served {
    server: Program,
    client: Redis,
    port: u16,
}

impl Served {
    /// With so many keys of `size` bytes.
    fn start(scratch: &Scratch, keys: u32, size: u32) -> Result<Self> {
        // Free a moment ago.
        let port = TcpListener::bind("127.0.0.1:0")?.local_addr()?.port();
        let mut command = Command::new("redis-server");
        command.args(["--save", "", "--appendonly", "no", "--enable-debug-command", "yes", "--port"]);
        command.arg(port.to_string()).current_dir(scratch.path());
        let server = Program::spawn(command, scratch.path().join("none"))?;
        let mut client = Redis::connect(port)?;
        client.ask(&format!("DEBUG POPULATE {keys} key {size}"))?;
        Ok(Self { server, client, port })
    }

    /// As [`once`]; the images are removed.
    fn once(
        &mut self,
        pair: Pair,
        scratch: &Scratch,
        round: usize,
        meanwhile: impl FnOnce(&mut Redis) -> Result<()>,
    ) -> Result<()> {
        let wants = Wants { connections: true, ..Wants::default() };
        once(pair, &mut self.server, scratch, round, &wants, || meanwhile(&mut self.client))?;
        fs::remove_dir_all(scratch.path().join(round.to_string()))?;
        Ok(())
    }
}

/// redis-server with so many keys of 1 KiB; the same client goes on asking it.
///
/// # Errors
///
/// When a key is lost, or the client notices more than a delay.
pub fn redis(pair: Pair, test: &str, keys: u32) -> Result<()> {
    let Some(scratch) = pair.place(test)? else { return Ok(()) };
    let mut served = Served::start(&scratch, keys, 1024)?;
    for round in 0..pair.rounds() {
        let digest = served.client.ask("DEBUG DIGEST")?;
        let count: u64 = served.client.ask("INCR counter")?.parse()?;
        let after = served.client.ask("DEBUG DIGEST")?;
        ensure!(digest != after, "the digest says nothing");
        // Asked while there is no server, answered by the one that comes back.
        served.once(pair, &scratch, round, |client| client.send("DEBUG DIGEST"))?;
        ensure!(served.client.answer()? == after, "the data is not what it was");
        ensure!(served.client.ask("INCR counter")?.parse::<u64>()? == count + 1, "a write was lost");
        let there = Redis::connect(served.port)?.ask("DBSIZE")?;
        ensure!(there == (keys + 1).to_string(), "{there} keys of {}", keys + 1);
    }
    say(&format!("{test}: restored {} times, {} keys, the same connection", pair.rounds(), keys + 1));
    Ok(())
}

/// redis-server with so many keys, which redis-benchmark goes on asking over its connections, while it is dumped and restored `rounds` times.
///
/// # Errors
///
/// When a key is lost, or a client notices more than a delay.
pub fn redis_under_load(pair: Pair, test: &str, keys: u32, rounds: usize) -> Result<()> {
    let Some(scratch) = pair.place(test)? else { return Ok(()) };
    let mut served = Served::start(&scratch, keys, 16)?;
    let digest = served.client.ask("DEBUG DIGEST")?;
    let output = scratch.path().join("benchmark");
    // In a database of its own, until it is told to end.
    let mut benchmark = Command::new("redis-benchmark")
        .args(["-p", &served.port.to_string(), "--dbnum", "1", "-c", "8", "-r", "1000", "-n", "1000000000"])
        .args(["-t", "incr"])
        .stdin(Stdio::null())
        .stdout(fs::File::create(&output)?)
        .stderr(fs::File::options().append(true).open(&output)?)
        .spawn()
        .context("start redis-benchmark")?;
    let mut go_on = || {
        let mut served_so_far = 0;
        for round in 0..rounds {
            // It is being asked all the time.
            let deadline = std::time::Instant::now() + PATIENCE;
            loop {
                let now = commands_served(&mut served.client)?;
                if now > served_so_far + 1000 {
                    served_so_far = now;
                    break;
                }
                ensure!(std::time::Instant::now() < deadline, "round {round}: the benchmark asks no more");
                std::thread::sleep(std::time::Duration::from_millis(10));
            }
            served.once(pair, &scratch, round, |_| Ok(()))?;
            ensure!(served.client.ask("DBSIZE")? == keys.to_string(), "round {round}: keys were lost");
        }
        Ok::<_, anyhow::Error>(())
    };
    let went_on = go_on();
    let still_runs = benchmark.try_wait()?.is_none();
    let _ = benchmark.kill();
    let _ = benchmark.wait();
    let said = fs::read_to_string(&output)?;
    went_on.with_context(|| format!("redis-benchmark says {:?}", said.lines().last()))?;
    ensure!(still_runs && !said.contains("rror"), "redis-benchmark has ended, or met an error: {said}");
    // Without what the benchmark has counted.
    for command in ["SELECT 1", "FLUSHDB", "SELECT 0"] {
        served.client.ask(command)?;
    }
    ensure!(served.client.ask("DEBUG DIGEST")? == digest, "the data is not what it was");
    say(&format!("{test}: restored {rounds} times under load, {keys} keys, the same connections"));
    Ok(())
}

/// How many commands redis-server has processed.
fn commands_served(client: &mut Redis) -> Result<u64> {
    let info = client.bulk("INFO stats")?;
    let line = info.lines().find_map(|line| line.strip_prefix("total_commands_processed:"));
    line.and_then(|count| count.trim().parse().ok())
        .context("redis-server does not say how many commands it has processed")
}
