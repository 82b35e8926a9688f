//! `cargo xtask bench redis`: throughput of redis-server while it is watched, no checkpoint being taken, is within 10 %
//! of what it is unwatched: the median of the ratios of interleaved pairs.

use std::path::Path;
use std::process::{Child, Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use super::place::Place;
use super::{by_turns, median, word};
use crate::process::Memckpt;
use crate::table;

/// Pairs of measurements, one unwatched, one watched; odd.
const PAIRS: usize = 5;
/// How long one measurement shall take, about, by the clock of where it is made.
const SECONDS: u64 = 5;

/// `cargo xtask bench redis`.
pub(crate) fn run(place: &Place) -> Result<ExitCode> {
    place.run("redis", "4G", &[], measure)
}

/// A redis-server of our own; killed when dropped.
struct Server {
    child: Child,
    scratch: tempfile::TempDir,
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Server {
    fn start() -> Result<Self> {
        let scratch = tempfile::Builder::new().prefix("memckpt-bench-").tempdir()?;
        let socket = scratch.path().join("redis.sock");
        let child = Command::new("redis-server")
            .args(["--port", "0", "--save", "", "--appendonly", "no", "--enable-debug-command", "yes"])
            .arg("--unixsocket")
            .arg(&socket)
            .stdout(Stdio::null())
            .spawn()
            .context("start redis-server")?;
        let server = Self { child, scratch };
        let deadline = Instant::now() + Duration::from_secs(60);
        while !server.cli(&["ping"])?.contains("PONG") {
            ensure!(Instant::now() < deadline, "redis-server does not come up");
            std::thread::sleep(Duration::from_millis(20));
        }
        server.cli(&["debug", "populate", "100000", "key", "1024"])?;
        Ok(server)
    }

    fn command(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        command.arg("-s").arg(self.scratch.path().join("redis.sock"));
        command
    }

    fn cli(&self, args: &[&str]) -> Result<String> {
        let output = self.command("redis-cli").args(args).output().context("start redis-cli")?;
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    /// Requests per second over so many of them.
    fn throughput(&self, requests: u64) -> Result<u64> {
        let output = self
            .command("redis-benchmark")
            .args(["-q", "-t", "set", "-r", "100000", "-d", "64", "-n", &requests.to_string()])
            .stdin(Stdio::null())
            .output()
            .context("start redis-benchmark")?;
        let text = String::from_utf8_lossy(&output.stdout);
        ensure!(output.status.success(), "redis-benchmark failed: {text}");
        requests_per_second(&text).with_context(|| format!("redis-benchmark says {text:?}"))
    }
}

/// The number in `SET: 123.45 requests per second, p50=...`; progress comes before it, behind carriage returns.
fn requests_per_second(text: &str) -> Option<u64> {
    let (before, _) = text.rsplit_once(" requests per second")?;
    let (_, number) = before.rsplit_once(' ')?;
    number.split('.').next()?.parse().ok()
}

fn measure(programs: &Path) -> Result<bool> {
    let memckpt = Memckpt::new(programs.join("memckpt"));
    let server = Server::start()?;
    let pid = server.child.id().to_string();
    // Also warms up.
    let requests = server.throughput(20_000)?.max(1) * SECONDS;
    let mut rows = vec![["pair", "unwatched", "watched", "watched/unwatched"].map(str::to_owned).to_vec()];
    let mut ratios = Vec::new();
    for pair in 1..=PAIRS {
        let watched = || {
            memckpt.run(&["watch", &pid, "--background"])?;
            let watched = server.throughput(requests)?;
            memckpt.run(&["watch", &pid, "--stop"])?;
            Ok(watched)
        };
        let (alone, watched) = by_turns(pair, || server.throughput(requests), watched)?;
        let ratio = watched * 1000 / alone.max(1);
        rows.push(vec![pair.to_string(), alone.to_string(), watched.to_string(), per_mille(ratio)]);
        ratios.push(ratio);
    }
    println!("{}", table::format(&rows));
    let ratio = median(ratios);
    let passed = ratio >= 900;
    println!(
        "{}: watched, redis-server handles {} of the requests per second of unwatched (at least 90 %)",
        word(passed),
        per_mille(ratio)
    );
    Ok(passed)
}

fn per_mille(value: u64) -> String {
    format!("{}.{} %", value / 10, value % 10)
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_last_number_counts() {
        let text = "SET: rps=0.0 (overall: nan)\rSET: 1234.50 requests per second, p50=0.1 msec\n";
        assert_eq!(super::requests_per_second(text), Some(1234));
        assert_eq!(super::requests_per_second("Could not connect"), None);
    }
}
