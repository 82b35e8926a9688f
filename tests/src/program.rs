//! Programs that go on after a restore: each shows in a file how far it is, by lines of `N ok`.

use std::ffi::OsStr;
use std::fs;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;

use crate::{Scratch, victim};

/// How long a program may take for its next lines.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// A program in a session of its own, which shows in a file how far it is. Whatever becomes of it, its session is ended when this
/// is dropped.
#[derive(Debug)]
pub struct Program {
    child: Child,
    /// Its process ID, also after a restore.
    pub pid: i32,
    /// Its file.
    pub output: PathBuf,
}

impl Program {
    /// Starts it, and waits for a few lines.
    ///
    /// # Errors
    ///
    /// When it does not come up.
    pub fn start(command: Command, output: PathBuf) -> Result<Self> {
        let program = Self::spawn(command, output)?;
        program.wait_for(5)?;
        Ok(program)
    }

    /// Starts what need not have an `output`.
    ///
    /// # Errors
    ///
    /// When it cannot be started.
    pub fn spawn(mut command: Command, output: PathBuf) -> Result<Self> {
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        // SAFETY: setsid is safe between fork and exec.
        unsafe { command.pre_exec(|| nix::unistd::setsid().map(drop).map_err(Into::into)) };
        let child = command.spawn().with_context(|| format!("start {command:?}"))?;
        let pid = i32::try_from(child.id())?;
        Ok(Self { child, pid, output })
    }

    /// Victim `going_on`, of this kind.
    ///
    /// # Errors
    ///
    /// As [`Program::start`].
    pub fn victim(kind: &str, scratch: &Scratch) -> Result<Self> {
        let output = scratch.path().join("output");
        let mut command = Command::new(victim::program("going_on"));
        command.arg(kind).arg(&output);
        Self::start(command, output)
    }

    /// A shell that runs a command for each line.
    ///
    /// # Errors
    ///
    /// As [`Program::start`].
    pub fn shell_loop(scratch: &Scratch) -> Result<Self> {
        let output = scratch.path().join("output");
        let text =
            format!("i=0; while :; do i=$((i+1)); echo $i ok >> {}; sleep 0.05; done", output.display());
        let mut command = Command::new("/bin/sh");
        command.args(["-c", &text]);
        Program::start(command, output)
    }

    /// Victim `name` in Python, with these arguments behind its output.
    ///
    /// # Errors
    ///
    /// As [`Program::start`].
    pub fn script(name: &str, scratch: &Scratch, arguments: &[&OsStr]) -> Result<Self> {
        let output = scratch.path().join("output");
        let mut command = Command::new("/usr/bin/python3");
        // What they share is compiled each time: nothing is left beside it.
        command.arg("-B").arg(victim::source(name)).arg(&output).args(arguments);
        Self::start(command, output)
    }

    /// Victim `going_on.py`: threads, a pipe, a timer, a deleted file.
    ///
    /// # Errors
    ///
    /// As [`Program::start`].
    pub fn python(scratch: &Scratch) -> Result<Self> {
        Self::script("going_on.py", scratch, &[scratch.path().join("deleted").as_os_str()])
    }

    /// Its lines so far.
    ///
    /// # Errors
    ///
    /// When one is not right.
    pub fn lines(&self) -> Result<usize> {
        let text = fs::read_to_string(&self.output).unwrap_or_default();
        for (number, line) in (1..).zip(text.lines()) {
            ensure!(line == format!("{number} ok"), "line {number} of its output is {line:?}");
        }
        Ok(text.lines().count())
    }

    /// Waits until there are so many lines.
    ///
    /// # Errors
    ///
    /// When one is not right, or they do not come.
    pub fn wait_for(&self, count: usize) -> Result<()> {
        let deadline = Instant::now() + PATIENCE;
        while self.lines()? < count {
            ensure!(Instant::now() < deadline, "{} lines and no more", self.lines()?);
            std::thread::sleep(Duration::from_millis(10));
        }
        Ok(())
    }

    /// Has it rest, and waits until it does: it does while there is a file `hold` in `directory`, and says so by a file `resting`.
    ///
    /// # Errors
    ///
    /// When it does not come to rest, or a line is not right.
    pub fn come_to_rest(&self, directory: &Path) -> Result<()> {
        fs::write(directory.join("hold"), "")?;
        let deadline = Instant::now() + PATIENCE;
        while !directory.join("resting").exists() {
            self.lines()?;
            ensure!(Instant::now() < deadline, "it does not come to rest");
            std::thread::sleep(Duration::from_millis(10));
        }
        Ok(())
    }

    /// Waits for its end, by a dump; its lines.
    ///
    /// # Errors
    ///
    /// As [`Program::lines`].
    pub fn ended(&mut self) -> Result<usize> {
        self.child.wait()?;
        self.lines()
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        let _ = killpg(Pid::from_raw(self.pid), Signal::SIGKILL);
        let _ = self.child.wait();
    }
}
