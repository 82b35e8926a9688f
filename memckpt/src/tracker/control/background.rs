//! Starting a session that outlives its caller, and learning whether it stands.

use std::fs::OpenOptions;
use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use serde::{Deserialize, Serialize};

use super::{ControlError, SessionClient};
use crate::tracker::agent::HookChoice;
use crate::tracker::dirty::TrackerKind;

/// How a background session is started.
#[derive(Clone, Debug, Default)]
pub struct BackgroundOptions {
    /// The dirty source; the best that works where `None`.
    pub tracker: Option<TrackerKind>,
    /// Which hooks to use.
    pub hooks: HookChoice,
    /// Where the session's log goes; nowhere where `None`.
    pub log: Option<PathBuf>,
    /// The memckpt program; this one where `None`.
    pub program: Option<PathBuf>,
    /// How long it may take to stand; a minute where `None`.
    pub timeout: Option<Duration>,
}

/// The one line that a starting session writes to its standard output.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum Announcement {
    Ready,
    Failed { reason: String },
}

/// Starts a session of `target` in a process of its own, by `memckpt watch PID --detached`, and connects to it once it
/// tracks.
///
/// # Errors
/// The session could not be started, with its own reason; or not be talked to.
pub fn start_background(target: i32, options: &BackgroundOptions) -> Result<SessionClient, ControlError> {
    let failed = |reason: String| ControlError::Start { target, reason };
    let timeout = options.timeout.unwrap_or(Duration::from_mins(1));
    let mut child = spawn(target, options).map_err(|e| failed(e.to_string()))?;
    let announced = announcement(&mut child, Instant::now() + timeout);
    match announced {
        Ok(Announcement::Ready) => SessionClient::connect(target)?
            .ok_or_else(|| failed("it ended as soon as it had begun".to_owned())),
        Ok(Announcement::Failed { reason }) => {
            let _ = child.wait();
            Err(failed(reason))
        }
        Err(e) => {
            // No word from it: it must not come to life later.
            let _ = child.kill();
            let _ = child.wait();
            let reason = match e.kind() {
                io::ErrorKind::TimedOut => format!("not ready after {timeout:?}"),
                _ => format!("it ended without a word: {e}"),
            };
            Err(failed(reason))
        }
    }
}

fn spawn(target: i32, options: &BackgroundOptions) -> io::Result<Child> {
    let program = match &options.program {
        Some(program) => program.clone(),
        // Not current_exe(): its path may be another file by now, or none in this mount namespace.
        None => PathBuf::from("/proc/self/exe"),
    };
    let mut command = Command::new(program);
    command
        .arg("watch")
        .arg(target.to_string())
        .arg("--detached")
        .arg("--hooks")
        .arg(options.hooks.to_string());
    if let Some(tracker) = options.tracker {
        command.arg("--tracker").arg(tracker.to_string());
    }
    let log = match &options.log {
        Some(path) => {
            let flags = libc::O_NOFOLLOW | libc::O_CLOEXEC;
            Stdio::from(
                OpenOptions::new().append(true).create(true).mode(0o600).custom_flags(flags).open(path)?,
            )
        }
        None => Stdio::null(),
    };
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(log).spawn()
}

fn announcement(child: &mut Child, deadline: Instant) -> io::Result<Announcement> {
    let Some(mut stdout) = child.stdout.take() else { return Err(io::ErrorKind::BrokenPipe.into()) };
    let mut line = Vec::new();
    while line.last() != Some(&b'\n') {
        let left = deadline.saturating_duration_since(Instant::now());
        let left = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
        if left == PollTimeout::ZERO
            || poll(&mut [PollFd::new(stdout.as_fd(), PollFlags::POLLIN)], left)? == 0
        {
            return Err(io::ErrorKind::TimedOut.into());
        }
        let mut byte = [0; 512];
        match stdout.read(&mut byte)? {
            0 => return Err(io::ErrorKind::UnexpectedEof.into()),
            n => line.extend_from_slice(&byte[..n]),
        }
    }
    Ok(serde_json::from_slice(&line)?)
}

fn announce(what: &Announcement) -> io::Result<()> {
    let mut line = serde_json::to_vec(what)?;
    line.push(b'\n');
    let mut stdout = io::stdout().lock();
    stdout.write_all(&line)?;
    stdout.flush()?;
    // The caller reads no more, and a pipe held open would keep it or its caller waiting.
    let null = OpenOptions::new().write(true).open("/dev/null")?;
    nix::unistd::dup2_stdout(&null)?;
    Ok(())
}

/// Called by a detached session once it tracks and listens.
///
/// # Errors
/// The caller is gone.
pub fn announce_ready() -> io::Result<()> {
    announce(&Announcement::Ready)
}

/// Called by a detached session that cannot begin.
///
/// # Errors
/// The caller is gone.
pub fn announce_failure(reason: &str) -> io::Result<()> {
    announce(&Announcement::Failed { reason: reason.to_owned() })
}
