//! A real program under load: Debian's redis-server, while redis-benchmark is at it.

use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use memckpt_tests::{Scratch, Victim, memckpt, oracle, skip};
use nix::sys::signal::Signal;

/// A child that does not outlive the test.
struct Guard(Child);

impl Drop for Guard {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn checkpoints_under_a_running_benchmark() -> Result<()> {
    for program in ["redis-server", "redis-benchmark", "redis-cli"] {
        if Command::new(program).arg("--version").output().is_err() {
            skip(
                "checkpoints_under_a_running_benchmark",
                "no redis: apt-get install redis-server redis-tools",
            );
            return Ok(());
        }
    }
    let scratch = Scratch::new()?;
    let socket = scratch.path().join("redis.sock");
    let mut server = Command::new("redis-server");
    server
        .args([
            "--port",
            "0",
            "--save",
            "",
            "--appendonly",
            "no",
            "--enable-debug-command",
            "yes",
            "--unixsocket",
        ])
        .arg(&socket);
    let server = Victim::spawn(server)?;
    let deadline = Instant::now() + Duration::from_secs(60);
    while !cli(&socket, &["ping"])?.contains("PONG") {
        ensure!(Instant::now() < deadline, "redis-server does not come up");
        std::thread::sleep(Duration::from_millis(20));
    }
    // Something to inherit.
    cli(&socket, &["debug", "populate", "20000", "key", "1024"])?;

    // More than it can do in time: it runs until it is killed.
    let benchmark = Command::new("redis-benchmark")
        .arg("-s")
        .arg(&socket)
        .args(["-q", "-t", "set", "-r", "2000", "-d", "64", "-c", "4", "-n", "2000000000"])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .context("start redis-benchmark")?;
    let mut benchmark = Guard(benchmark);

    let pid = server.pid().to_string();
    memckpt(["watch", &pid, "--background"]).ok()?;
    for step in 1..=3_u32 {
        let images = scratch.directory(&step.to_string())?;
        let mut pre_dump = memckpt(["pre-dump", "-t", &pid, "-D"]).arg(&images);
        if step > 1 {
            pre_dump = pre_dump.arg("--prev-images-dir").arg(format!("../{}", step - 1));
        }
        let handled = commands(&socket)?;
        pre_dump.ok()?;
        // Clients get on between the checkpoints.
        let deadline = Instant::now() + Duration::from_secs(30);
        while commands(&socket)? < handled + 500 {
            ensure!(Instant::now() < deadline, "no client gets anything done");
            std::thread::sleep(Duration::from_millis(10));
        }
    }
    let last = scratch.directory("dump")?;
    memckpt(["dump", "-t", &pid, "--leave-stopped", "--track-mem", "--prev-images-dir", "../3", "-D"])
        .arg(&last)
        .ok()?;
    server.wait_stopped()?;
    let compared = oracle::compare(&last, server.pid())?;
    ensure!(compared.inherited > compared.own, "hardly incremental: {compared:?}");
    memckpt(["show", "--compare", &pid]).arg(&last).ok()?;
    server.signal(Signal::SIGCONT)?;

    let handled = commands(&socket)?;
    while commands(&socket)? < handled + 500 {
        std::thread::sleep(Duration::from_millis(10));
    }
    ensure!(benchmark.0.try_wait()?.is_none(), "redis-benchmark has given up");
    // A client error would be in the server's statistics.
    let errors = cli(&socket, &["info", "errorstats"])?;
    ensure!(!errors.contains("errorstat_"), "clients saw errors:\n{errors}");
    memckpt(["watch", &pid, "--stop"]).ok()?;
    Ok(())
}

fn cli(socket: &std::path::Path, args: &[&str]) -> Result<String> {
    let output =
        Command::new("redis-cli").arg("-s").arg(socket).args(args).output().context("start redis-cli")?;
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// How many commands the server has handled.
fn commands(socket: &std::path::Path) -> Result<u64> {
    let stats = cli(socket, &["info", "stats"])?;
    let count = stats
        .lines()
        .find_map(|line| line.strip_prefix("total_commands_processed:"))
        .context("redis's stats")?;
    Ok(count.trim().parse()?)
}
