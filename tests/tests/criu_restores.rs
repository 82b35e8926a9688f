//! A peer's proof: what memckpt dumped, and ended, Debian's `criu restore` brings back, and the program goes on rightly.

use std::fs;
use std::io::{BufRead as _, BufReader, Write as _};
use std::net::{TcpListener, TcpStream};
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::net::UnixDatagram;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use memckpt_tests::features::Tracker;
use memckpt_tests::peer::Peer;
use memckpt_tests::program::{PATIENCE, Program};
use memckpt_tests::{Scratch, criu, memckpt, say, skip};

fn dump(program: &Program, images: &Path, more: &[&str]) -> Result<()> {
    memckpt(["dump", "-t", &program.pid.to_string(), "-D"]).arg(images).args(more).ok()?;
    Ok(())
}

/// Dumped, ended, restored, going on; three times.
fn goes_on(test: &str, start: impl Fn(&Scratch) -> Result<Program>) -> Result<()> {
    three_rounds(test, None, start)
}

#[test]
fn a_ring_of_twenty_processes() -> Result<()> {
    goes_on("a_ring_of_twenty_processes", |scratch| Program::victim("ring", scratch))
}

#[test]
fn fifty_threads_blocked_in_different_calls() -> Result<()> {
    goes_on("fifty_threads_blocked_in_different_calls", |scratch| Program::victim("threads", scratch))
}

/// Restoring runs other code on the thread, which ends its sequence: it must begin anew.
#[test]
fn a_thread_in_a_restartable_sequence() -> Result<()> {
    goes_on("a_thread_in_a_restartable_sequence", |scratch| Program::victim("sequence", scratch))
}

#[test]
fn memory_that_is_checked() -> Result<()> {
    goes_on("memory_that_is_checked", |scratch| Program::victim("memory", scratch))
}

/// As [`goes_on`], of a program that is dumped while it rests, for what it does has moments that cannot be kept: it rests while
/// there is a file `hold` in the scratch directory, and says so by a file `resting`.
fn goes_on_from_rest(
    test: &str,
    dump_flags: &[&str],
    restore_flags: &[&str],
    start: impl Fn(&Scratch) -> Result<Program>,
) -> Result<()> {
    three_rounds(test, Some((dump_flags, restore_flags)), start)
}

/// Dumps, restores and lets go on three times; at rest, with the flags of dump and of restore, if there are any.
fn three_rounds(
    test: &str,
    at_rest: Option<(&[&str], &[&str])>,
    start: impl Fn(&Scratch) -> Result<Program>,
) -> Result<()> {
    if let Some(reason) = criu::missing()? {
        skip(test, &reason);
        return Ok(());
    }
    let (dump_flags, restore_flags) = at_rest.unwrap_or((&[], &["-d"]));
    let scratch = Scratch::new()?;
    let mut program = start(&scratch)?;
    for round in 0..3 {
        if at_rest.is_some() {
            program.come_to_rest(scratch.path())?;
        }
        let images = scratch.directory(&round.to_string())?;
        dump(&program, &images, dump_flags)?;
        let before = if round == 0 { program.ended()? } else { program.lines()? };
        criu::run("restore", &images, restore_flags).with_context(|| format!("round {round}"))?;
        if at_rest.is_some() {
            fs::remove_file(scratch.path().join("hold"))?;
        }
        program.wait_for(before + 10).with_context(|| format!("round {round}, after {before} lines"))?;
    }
    say(&format!("{test}: restored three times, {} lines, all right", program.lines()?));
    Ok(())
}

/// Each kind of descriptor, with what waits in it, its flags, its owner and its lock.
#[test]
fn one_of_every_kind_of_descriptor() -> Result<()> {
    let (dump, restore) = (["--file-locks", "--criu-version", "3.17"], ["-d", "--file-locks"]);
    goes_on_from_rest("one_of_every_kind_of_descriptor", &dump, &restore, |scratch| {
        let output = scratch.path().join("output");
        let mut command = Command::new(memckpt_tests::victim::program("descriptors"));
        command.arg(&output).arg(scratch.path());
        Program::start(command, output)
    })
}

/// Pseudoterminals both of whose ends are in the tree, one of them in control of its session.
#[test]
fn terminals_of_its_own() -> Result<()> {
    goes_on_from_rest("terminals_of_its_own", &[], &["-d"], |scratch| {
        let output = scratch.path().join("output");
        let mut command = Command::new("/usr/bin/python3");
        command.arg("-c").arg(include_str!("../victims/terminals.py")).arg(&output).arg(scratch.path());
        Program::start(command, output)
    })
}

/// `--shell-job`: what was started on one terminal goes on on another.
#[test]
fn the_job_of_a_shell() -> Result<()> {
    const NAME: &str = "the_job_of_a_shell";
    if let Some(reason) = criu::missing()? {
        skip(NAME, &reason);
        return Ok(());
    }
    let scratch = Scratch::new()?;
    let images = scratch.directory("images")?;
    let mut command = Command::new("/usr/bin/python3");
    command.arg("-c").arg(include_str!("../victims/shell_job.py")).arg(scratch.path());
    command.arg(memckpt_tests::command::binary()).args(["dump", "--shell-job", "-t", "@", "-D"]).arg(&images);
    command.args(["--", "criu", "restore", "--shell-job", "-v4", "-o", "restore.log", "-D"]).arg(&images);
    let output = command.output()?;
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

#[test]
fn a_shell_loop_that_writes_a_file() -> Result<()> {
    goes_on("a_shell_loop_that_writes_a_file", Program::shell_loop)
}

#[test]
fn python_with_threads_a_pipe_a_timer_and_a_deleted_file() -> Result<()> {
    goes_on("python_with_threads_a_pipe_a_timer_and_a_deleted_file", Program::python)
}

/// A tree with connections, idle and full: its peers notice no more than a delay.
#[test]
fn connections_whose_peers_wait() -> Result<()> {
    const NAME: &str = "connections_whose_peers_wait";
    if let Some(reason) = criu::missing()? {
        skip(NAME, &reason);
        return Ok(());
    }
    for user in [&[][..], &["nobody"]] {
        let scratch = Scratch::new()?;
        let output = scratch.path().join("output");
        fs::write(&output, "")?;
        fs::set_permissions(scratch.path(), fs::Permissions::from_mode(0o755))?;
        let mut command = Command::new(memckpt_tests::victim::program("connected"));
        command.arg(&output).args(user);
        let mut program = Program::start(command, output)?;
        let mut peers =
            (0..4).map(|n| Peer::connect(&program.output, n % 2 == 0)).collect::<Result<Vec<_>>>()?;
        for round in 0..3 {
            ensure!(peers[0].fill()? > 100_000, "hardly anything is on its way");
            let images = scratch.directory(&round.to_string())?;
            dump(&program, &images, &["--tcp-established", "--criu-version", "3.17"])?;
            let before = if round == 0 { program.ended()? } else { program.lines()? };
            // One that sends meanwhile, unheard.
            peers[1].send(1000)?;
            criu::run("restore", &images, &["-d", "--tcp-established"])
                .with_context(|| format!("round {round}"))?;
            program.wait_for(before + 10).with_context(|| format!("round {round}, after {before} lines"))?;
            for (n, peer) in peers.iter_mut().enumerate() {
                peer.receive().with_context(|| format!("round {round}, connection {n}"))?;
                peer.exchange(1000).with_context(|| format!("round {round}, connection {n}"))?;
            }
        }
        say(&format!("{NAME}: restored three times, {} lines, all right", program.lines()?));
    }
    Ok(())
}

/// A program whose datagrams go to somebody outside of the tree, as to a log daemon.
#[test]
fn datagrams_that_go_outside() -> Result<()> {
    const NAME: &str = "datagrams_that_go_outside";
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
    if let Some(reason) = criu::missing()? {
        skip(NAME, &reason);
        return Ok(());
    }
    let scratch = Scratch::new()?;
    let (output, log) = (scratch.path().join("output"), scratch.path().join("log"));
    let daemon = UnixDatagram::bind(&log)?;
    daemon.set_read_timeout(Some(PATIENCE))?;
    let mut command = Command::new("/usr/bin/python3");
    command.arg("-c").arg(TEXT).arg(&output).arg(&log);
    let mut program = Program::start(command, output)?;
    let inode =
        std::os::unix::fs::MetadataExt::ino(&fs::metadata(format!("/proc/self/fd/{}", daemon.as_raw_fd()))?);
    let external = format!("unix[{inode}]");
    let refused = scratch.directory("refused")?;
    memckpt(["dump", "-t", &program.pid.to_string(), "-D"])
        .arg(&refused)
        .refused(&["--external", &external])?;
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
    let mut expected = 1;
    for round in 0..3 {
        let images = scratch.directory(&round.to_string())?;
        dump(&program, &images, &["--external", &external])?;
        let before = if round == 0 { program.ended()? } else { program.lines()? };
        criu::run("restore", &images, &["-d", "--ext-unix-sk"]).with_context(|| format!("round {round}"))?;
        program.wait_for(before + 10).with_context(|| format!("round {round}, after {before} lines"))?;
        while expected <= before + 10 {
            let got = received.recv_timeout(PATIENCE)?;
            ensure!(got == expected.to_string(), "datagram {got} where {expected} was due");
            expected += 1;
        }
    }
    Ok(())
}

/// A connection to redis-server.
struct Redis(BufReader<TcpStream>);

impl Redis {
    fn connect(port: u16) -> Result<Self> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            match TcpStream::connect(("127.0.0.1", port)) {
                Ok(stream) => {
                    stream.set_read_timeout(Some(PATIENCE))?;
                    return Ok(Self(BufReader::new(stream)));
                }
                Err(error) => ensure!(Instant::now() < deadline, "redis-server does not come up: {error}"),
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    fn send(&mut self, command: &str) -> Result<()> {
        Ok(self.0.get_mut().write_all(format!("{command}\r\n").as_bytes())?)
    }

    /// The next answer, which is one line.
    fn answer(&mut self) -> Result<String> {
        let mut line = String::new();
        self.0.read_line(&mut line).context("redis-server")?;
        ensure!(line.starts_with(['+', ':']), "redis-server says {line:?}");
        Ok(line[1..].trim_end().to_owned())
    }

    fn ask(&mut self, command: &str) -> Result<String> {
        self.send(command)?;
        self.answer()
    }
}

#[test]
fn redis_with_data_and_a_connected_client() -> Result<()> {
    const NAME: &str = "redis_with_data_and_a_connected_client";
    if let Some(reason) = criu::missing()? {
        skip(NAME, &reason);
        return Ok(());
    }
    let scratch = Scratch::new()?;
    // Free a moment ago.
    let port = TcpListener::bind("127.0.0.1:0")?.local_addr()?.port();
    let mut command = Command::new("redis-server");
    command.args(["--save", "", "--appendonly", "no", "--enable-debug-command", "yes", "--port"]);
    command.arg(port.to_string()).current_dir(scratch.path());
    let mut server = Program::spawn(command, scratch.path().join("none"))?;
    let mut client = Redis::connect(port)?;
    client.ask("DEBUG POPULATE 20000 key 1024")?;
    for round in 0..3_u32 {
        let digest = client.ask("DEBUG DIGEST")?;
        let count: u64 = client.ask("INCR counter")?.parse()?;
        let after = client.ask("DEBUG DIGEST")?;
        ensure!(digest != after, "the digest says nothing");
        let images = scratch.directory(&round.to_string())?;
        dump(&server, &images, &["--tcp-established", "--criu-version", "3.17"])?;
        if round == 0 {
            server.ended()?;
        }
        // Asked while there is no server, answered by the one that comes back.
        client.send("DEBUG DIGEST")?;
        criu::run("restore", &images, &["-d", "--tcp-established"])
            .with_context(|| format!("round {round}"))?;
        ensure!(client.answer()? == after, "the data is not what it was");
        ensure!(client.ask("INCR counter")?.parse::<u64>()? == count + 1, "a write was lost");
        ensure!(Redis::connect(port)?.ask("DBSIZE")? == "20001", "keys were lost");
    }
    say(&format!("{NAME}: restored three times, 20001 keys, the same connection"));
    Ok(())
}

/// pre-dump, pre-dump, dump by memckpt; restored by criu.
#[test]
fn a_chain_of_ours() -> Result<()> {
    const NAME: &str = "a_chain_of_ours";
    if let Some(reason) = criu::missing()? {
        skip(NAME, &reason);
        return Ok(());
    }
    let scratch = Scratch::new()?;
    let mut program = Program::victim("memory", &scratch)?;
    let pid = program.pid.to_string();
    for number in 1..=2 {
        let images = scratch.directory(&number.to_string())?;
        let mut command = memckpt(["pre-dump", "-t", &pid, "-D"]).arg(&images);
        if number > 1 {
            command = command.args(&["--prev-images-dir", "../1"]);
        }
        command.ok()?;
        program.wait_for(program.lines()? + 3)?;
    }
    let images = scratch.directory("3")?;
    dump(&program, &images, &["--prev-images-dir", "../2"])?;
    let before = program.ended()?;
    criu::run("restore", &images, &["-d"])?;
    program.wait_for(before + 10)
}

/// memckpt as a pre-dumper for criu: its pre-dump is the parent of criu's dump.
#[test]
fn criu_dumps_on_top_of_our_pre_dump() -> Result<()> {
    const NAME: &str = "criu_dumps_on_top_of_our_pre_dump";
    let reason = criu::missing()?.or_else(|| Tracker::SoftDirty.missing().map(str::to_owned));
    if let Some(reason) = reason {
        skip(NAME, &reason);
        return Ok(());
    }
    let scratch = Scratch::new()?;
    let mut program = Program::victim("memory", &scratch)?;
    let pid = program.pid.to_string();
    let (first, second) = (scratch.directory("1")?, scratch.directory("2")?);
    memckpt(["pre-dump", "--tracker", "soft-dirty", "-t", &pid, "-D"]).arg(&first).ok()?;
    program.wait_for(program.lines()? + 3)?;
    criu::run("dump", &second, &["-t", &pid, "--track-mem", "--prev-images-dir", "../1"])?;
    let before = program.ended()?;
    criu::run("restore", &second, &["-d"])?;
    program.wait_for(before + 10)
}
