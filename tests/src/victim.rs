//! Processes to checkpoint.

use std::ffi::OsStr;
use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// How long a victim may take for an answer: guests are slow, a frozen victim never answers.
const PATIENCE: Duration = Duration::from_secs(60);

/// A running victim, killed when dropped.
#[derive(Debug)]
pub struct Victim {
    child: Child,
    stdin: Option<ChildStdin>,
    lines: Receiver<String>,
}

/// Where `build.rs` left the victim `tests/victims/NAME.c`.
#[must_use]
pub fn program(name: &str) -> PathBuf {
    PathBuf::from(env!("MEMCKPT_VICTIMS")).join(name)
}

/// Where victim `name` is that needs no compiler.
#[must_use]
pub fn source(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("victims").join(name)
}

impl Victim {
    /// Starts victim `name` and waits for its line `ready`.
    ///
    /// # Errors
    ///
    /// When it does not come up.
    pub fn start<S: AsRef<OsStr>>(name: &str, args: impl IntoIterator<Item = S>) -> Result<Self> {
        let mut command = Command::new(program(name));
        command.args(args);
        let victim = Self::spawn(command)?;
        let first = victim.line()?;
        ensure!(first == "ready", "victim {name} says: {first}");
        Ok(victim)
    }

    /// Starts any command, without waiting for a line.
    ///
    /// # Errors
    ///
    /// When it cannot be started.
    pub fn spawn(mut command: Command) -> Result<Self> {
        // A session of its own, so that it can be brought back without ours.
        // SAFETY: setsid is safe between fork and exec.
        unsafe { command.pre_exec(|| nix::unistd::setsid().map(drop).map_err(Into::into)) };
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .with_context(|| format!("cannot start {command:?}"))?;
        let stdout = child.stdout.take().context("no standard output")?;
        let (sender, lines) = channel();
        std::thread::spawn(move || {
            for line in BufReader::new(stdout).lines().map_while(Result::ok) {
                if sender.send(line).is_err() {
                    break;
                }
            }
        });
        let stdin = child.stdin.take();
        Ok(Self { child, stdin, lines })
    }

    /// Its PID.
    ///
    /// # Panics
    ///
    /// Never: PIDs fit.
    #[must_use]
    pub fn pid(&self) -> i32 {
        i32::try_from(self.child.id()).expect("a PID")
    }

    /// Its next line.
    ///
    /// # Errors
    ///
    /// When none comes.
    pub fn line(&self) -> Result<String> {
        match self.lines.recv_timeout(PATIENCE) {
            Ok(line) => Ok(line),
            Err(RecvTimeoutError::Timeout) => bail!("victim {} is silent", self.pid()),
            Err(RecvTimeoutError::Disconnected) => bail!("victim {} has ended", self.pid()),
        }
    }

    /// Lines that are there already.
    pub fn pending_lines(&self) -> Vec<String> {
        self.lines.try_iter().collect()
    }

    /// Gives it a command and returns its answer.
    ///
    /// # Errors
    ///
    /// When it does not answer, or answers `error`.
    pub fn ask(&mut self, command: &str) -> Result<String> {
        let stdin = self.stdin.as_mut().context("its standard input is closed")?;
        stdin.write_all(format!("{command}\n").as_bytes()).with_context(|| format!("victim: {command}"))?;
        let answer = self.line().with_context(|| format!("victim: {command}"))?;
        ensure!(!answer.starts_with("error"), "victim: {command}: {answer}");
        Ok(answer)
    }

    /// Sends it a signal.
    ///
    /// # Errors
    ///
    /// When it is gone.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        kill(Pid::from_raw(self.pid()), signal)
            .with_context(|| format!("send {signal} to victim {}", self.pid()))
    }

    /// Lets it and all its descendants go on that a dump with `--leave-stopped` has stopped.
    ///
    /// # Errors
    ///
    /// When it is gone.
    pub fn go_on(&self) -> Result<()> {
        // They stand until here, so none is missed; one may have been killed.
        for pid in memckpt::target::descendants(self.pid())?.into_iter().skip(1) {
            let _ = kill(Pid::from_raw(pid), Signal::SIGCONT);
        }
        self.signal(Signal::SIGCONT)
    }

    /// Whether it still runs.
    ///
    /// # Errors
    ///
    /// When it cannot be asked.
    pub fn is_alive(&mut self) -> Result<bool> {
        Ok(self.child.try_wait()?.is_none())
    }

    /// Waits until all its threads are stopped (`T`).
    ///
    /// # Errors
    ///
    /// When they do not stop.
    pub fn wait_stopped(&self) -> Result<()> {
        let deadline = Instant::now() + PATIENCE / 4;
        loop {
            let states = crate::outward::thread_states(self.pid())?;
            if states.iter().all(|(_, state)| *state == 'T') {
                return Ok(());
            }
            ensure!(Instant::now() < deadline, "victim {} does not stop: {states:?}", self.pid());
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

impl Drop for Victim {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
