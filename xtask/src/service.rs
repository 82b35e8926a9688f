//! A demo process that nothing ties to xtask, so that it can be dumped, end, and come back.

use std::fs::{File, OpenOptions};
use std::os::unix::process::ExitStatusExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use nix::sys::signal::{Signal, kill};
use nix::sys::stat::Mode;
use nix::unistd::{Pid, mkfifo};

const PATIENCE: Duration = Duration::from_secs(120);

/// A process in a session of its own, whose output goes to a file; killed when dropped.
#[derive(Debug)]
pub(crate) struct Service {
    child: Child,
    log: PathBuf,
    /// Its PID may be somebody else's.
    is_gone: bool,
}

impl Service {
    /// Starts `program`, its files in `directory`.
    pub(crate) fn start(program: &Path, directory: &Path) -> Result<Self> {
        let (fifo, log) = (directory.join("fifo"), directory.join("log"));
        mkfifo(&fifo, Mode::S_IRUSR | Mode::S_IWUSR).context("mkfifo")?;
        // Open for both, it has no end.
        let input = OpenOptions::new().read(true).write(true).open(fifo).context("open the FIFO")?;
        let output = File::create(&log).context("create the log")?;
        let errors = output.try_clone()?;
        let mut command = Command::new("setsid");
        let child = command.arg(program).stdin(input).stdout(output).stderr(errors).spawn();
        Ok(Self { child: child.context("cannot start setsid")?, log, is_gone: false })
    }

    /// Its PID: setsid(1) becomes the program.
    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Waits until all its threads have checked all their memory after now.
    pub(crate) fn goes_on(&self) -> Result<String> {
        let before = self.lines()?.len();
        let deadline = Instant::now() + PATIENCE;
        loop {
            let lines = self.lines()?;
            let is_well = |line: &String| line == "ready" || line.starts_with("verified");
            if let Some(line) = lines.iter().find(|line| !is_well(line)) {
                anyhow::bail!("the demo says: {line}");
            }
            // The round that was under way began before now.
            if let Some(line) = lines.get(before + 1).filter(|line| line.starts_with("verified")) {
                return Ok(line.clone());
            }
            ensure!(Instant::now() < deadline, "the process is silent, or has ended");
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Waits for its end, which a dump has brought about.
    pub(crate) fn has_ended(&mut self) -> Result<()> {
        let status = self.child.wait().context("wait for the process")?;
        self.is_gone = true;
        ensure!(status.signal() == Some(Signal::SIGKILL as i32), "the process ended by itself: {status}");
        Ok(())
    }

    /// It has been restored.
    pub(crate) fn is_back(&mut self) {
        self.is_gone = false;
    }

    /// What it has said, in whole lines.
    fn lines(&self) -> Result<Vec<String>> {
        let text = std::fs::read_to_string(&self.log).context("read the log")?;
        Ok(text.split_inclusive('\n').filter_map(|line| line.strip_suffix('\n')).map(str::to_owned).collect())
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        if self.is_gone {
            return;
        }
        let _ = kill(Pid::from_raw(self.pid().cast_signed()), Signal::SIGKILL);
        // Restored it is no child.
        let _ = self.child.wait();
    }
}
