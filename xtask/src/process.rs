//! Processes that xtask starts to checkpoint them, and running `memckpt` on them.

use std::ffi::OsStr;
use std::io::{BufRead as _, BufReader, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde::Deserialize;

/// A started process that talks in lines; killed when dropped.
#[derive(Debug)]
pub(crate) struct Partner {
    child: Child,
    stdin: ChildStdin,
    lines: Receiver<String>,
}

impl Partner {
    /// Starts it and waits for its line `ready`. Its errors go to `stderr`.
    pub(crate) fn start(program: &Path, args: &[&str], stderr: Stdio) -> Result<Self> {
        let mut child = Command::new(program)
            .args(args)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(stderr)
            .spawn()
            .with_context(|| format!("cannot start {}", program.display()))?;
        let stdout = child.stdout.take().context("no standard output")?;
        let stdin = child.stdin.take().context("no standard input")?;
        let (sender, lines) = channel();
        std::thread::spawn(move || {
            for line in BufReader::new(stdout).lines().map_while(Result::ok) {
                if sender.send(line).is_err() {
                    break;
                }
            }
        });
        let partner = Self { child, stdin, lines };
        let line = partner.line()?;
        ensure!(line == "ready", "{} says: {line}", program.display());
        Ok(partner)
    }

    /// Its PID.
    pub(crate) fn pid(&self) -> String {
        self.child.id().to_string()
    }

    /// Its next line.
    pub(crate) fn line(&self) -> Result<String> {
        self.lines.recv_timeout(Duration::from_secs(120)).context("the process is silent, or has ended")
    }

    /// Lines that are there already.
    pub(crate) fn pending_lines(&self) -> Vec<String> {
        self.lines.try_iter().collect()
    }

    /// Says a line and returns the answer.
    pub(crate) fn ask(&mut self, line: &str) -> Result<String> {
        writeln!(self.stdin, "{line}").context("the process has ended")?;
        self.line()
    }

    /// Lets it run on after a stop.
    pub(crate) fn resume(&self) -> Result<()> {
        kill(Pid::from_raw(i32::try_from(self.child.id())?), Signal::SIGCONT).context("send SIGCONT")
    }
}

impl Drop for Partner {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The built `memckpt`, with sudo where we are not root.
#[derive(Debug, Clone)]
pub(crate) struct Memckpt {
    words: Vec<PathBuf>,
    /// Whether to print each command before it runs.
    pub(crate) verbose: bool,
}

impl Memckpt {
    /// For the binary at `path`.
    pub(crate) fn new(path: PathBuf) -> Self {
        let words = if nix::unistd::geteuid().is_root() { vec![path] } else { vec!["sudo".into(), path] };
        Self { words, verbose: false }
    }

    /// A command with these arguments.
    pub(crate) fn command<S: AsRef<OsStr>>(&self, args: &[S]) -> Command {
        let mut command = Command::new(&self.words[0]);
        command.args(&self.words[1..]).args(args);
        command
    }

    /// Runs it to success, its output going where ours goes if verbose.
    pub(crate) fn run(&self, args: &[&str]) -> Result<()> {
        let line = format!("memckpt {}", args.join(" "));
        let mut command = self.command(args);
        command.stdin(Stdio::null());
        if self.verbose {
            println!("\n$ {line}");
            let status = command.status().with_context(|| format!("cannot start {line}"))?;
            ensure!(status.success(), "{line} failed ({status})");
            return Ok(());
        }
        // To files: a background session inherits them and would keep a pipe open.
        let log = tempfile::NamedTempFile::new()?;
        let status = command
            .stdout(log.reopen()?)
            .stderr(log.as_file().try_clone()?)
            .status()
            .with_context(|| format!("cannot start {line}"))?;
        if !status.success() {
            bail!("{line} failed ({status}):\n{}", std::fs::read_to_string(log.path()).unwrap_or_default());
        }
        Ok(())
    }

    /// What `memckpt.json` says of the checkpoint in `images`.
    pub(crate) fn meta(&self, images: &Path) -> Result<Meta> {
        let path = images.join("memckpt.json");
        let bytes = if self.words.len() == 1 {
            std::fs::read(&path).with_context(|| format!("read {}", path.display()))?
        } else {
            Command::new("sudo").arg("cat").arg(&path).output().context("sudo cat")?.stdout
        };
        serde_json::from_slice(&bytes).with_context(|| format!("read {}", path.display()))
    }
}

/// The part of `memckpt.json` that we show.
#[derive(Debug, Clone, Deserialize)]
pub(crate) struct Meta {
    pub(crate) kind: String,
    pub(crate) tracker: Option<String>,
    pub(crate) hint_mode: Option<String>,
    pub(crate) page_mode: String,
    #[serde(default)]
    pub(crate) counters: Counters,
    #[serde(default)]
    pub(crate) timings: Timings,
    #[serde(default)]
    pub(crate) notes: Vec<String>,
}

#[derive(Debug, Clone, Copy, Default, Deserialize)]
#[serde(default)]
pub(crate) struct Counters {
    pub(crate) pages_scanned: u64,
    pub(crate) entries_read: u64,
    pub(crate) pages_written: u64,
    pub(crate) pages_inherited: u64,
    pub(crate) losses: u64,
}

#[derive(Debug, Clone, Copy, Default, Deserialize)]
#[serde(default)]
pub(crate) struct Timings {
    pub(crate) frozen_us: u64,
    pub(crate) clear_us: u64,
}

/// Microseconds as milliseconds.
pub(crate) fn milliseconds(us: u64) -> String {
    format!("{}.{:02}", us / 1000, us % 1000 / 10)
}
