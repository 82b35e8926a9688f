//! `memckpt restore`.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context as _;
use clap::Args;
use memckpt::restore::{self, Inherited, Parent, Request};
use nix::errno::Errno;
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::Pid;

/// Flags of `memckpt restore`.
#[derive(Debug, Args)]
pub(crate) struct RestoreArgs {
    /// Directory of the checkpoint
    #[arg(short = 'D', long, value_name = "DIR", default_value = ".")]
    images_dir: PathBuf,
    /// Directory for the pidfile (default: the images directory)
    #[arg(short = 'W', long, value_name = "DIR")]
    work_dir: Option<PathBuf>,
    /// Make DIR the root directory of the tree, where all its files are looked for; /proc must be mounted there
    #[arg(short = 'r', long, value_name = "DIR")]
    root: Option<PathBuf>,
    /// Return as soon as the tree runs, instead of waiting for its root to end
    #[arg(short = 'd', long)]
    restore_detached: bool,
    /// Make the root a child of the caller instead of memckpt's own; it takes --restore-detached
    #[arg(short = 'S', long, requires = "restore_detached")]
    restore_sibling: bool,
    /// Leave the tree stopped, as by SIGSTOP
    #[arg(short = 's', long)]
    leave_stopped: bool,
    /// Restore the job of a shell: its root leads no session, and gets that of the caller
    #[arg(short = 'j', long)]
    shell_job: bool,
    /// Restore established TCP connections, too; their peers notice a delay
    #[arg(long)]
    tcp_established: bool,
    /// Connect again to a socket of a process outside, as the dump was told: unix[INODE]
    #[arg(long, value_name = "NAME", value_parser = super::dump::external)]
    external: Vec<String>,
    /// Give the tree a pipe of the caller's in the place of one that leads out of it: fd[N]:pipe:[INODE], where N is the
    /// caller's descriptor
    #[arg(long, value_name = "FD", value_parser = inherited)]
    inherit_fd: Vec<Inherited>,
    /// Take pages as they are, without comparing them with the checksums that the dump has left
    #[arg(long)]
    no_verify: bool,
    /// Read and check all images, and restore nothing
    #[arg(long)]
    dry_run: bool,
    /// Write the root's PID to FILE once it runs; relative to the work directory
    #[arg(long, value_name = "FILE")]
    pidfile: Option<PathBuf>,
}

/// Restores, and waits for the end unless told not to: then the exit code is the root's, or 128 and the signal that ended it.
pub(crate) fn run(args: &RestoreArgs) -> anyhow::Result<ExitCode> {
    if args.dry_run {
        restore::read(&args.images_dir, !args.no_verify)?;
        return Ok(ExitCode::SUCCESS);
    }
    let request = Request {
        images_dir: args.images_dir.clone(),
        root: args.root.clone(),
        parent: if args.restore_sibling { Parent::Ours } else { Parent::Us },
        verify: !args.no_verify,
        leave_stopped: args.leave_stopped,
        shell_job: args.shell_job,
        tcp_established: args.tcp_established,
        external: args.external.clone(),
        inherited: args.inherit_fd.clone(),
    };
    let pid = restore::run(&request)?;
    if let Some(file) = &args.pidfile {
        let path = args.work_dir.as_ref().unwrap_or(&args.images_dir).join(file);
        std::fs::write(&path, pid.to_string()).with_context(|| {
            format!("process {pid} runs, but --pidfile {} is not written", path.display())
        })?;
    }
    if args.restore_detached {
        return Ok(ExitCode::SUCCESS);
    }
    loop {
        match waitpid(Pid::from_raw(pid), None) {
            Ok(WaitStatus::Exited(_, code)) => return Ok(ExitCode::from(code as u8)),
            Ok(WaitStatus::Signaled(_, signal, _)) => return Ok(ExitCode::from(128 + signal as u8)),
            Ok(_) | Err(Errno::EINTR) => {}
            Err(errno) => {
                return Err(errno).with_context(|| format!("process {pid} runs, but cannot be waited for"));
            }
        }
    }
}

fn inherited(text: &str) -> Result<Inherited, String> {
    let parts = text.strip_prefix("fd[").and_then(|rest| rest.split_once("]:"));
    let parsed = parts.and_then(|(fd, resource)| {
        let is_pipe = resource.starts_with("pipe:[") && resource.ends_with(']');
        is_pipe.then_some(Inherited { fd: fd.parse().ok()?, resource: resource.to_owned() })
    });
    parsed.ok_or_else(|| "what can be given is a pipe, as fd[N]:pipe:[INODE]".to_owned())
}
