//! `memckpt pre-dump` and `memckpt dump`.

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, bail};
use clap::{Args, ValueEnum};
use memckpt::dump::{self, Afterwards, CriuVersion, FileOptions, Kind, PageMode, Request};
use memckpt::kernel::descriptor;
use memckpt::tracker::dirty::TrackerKind;

use super::report;

/// How pages leave the target.
#[derive(Clone, Copy, Debug, Default, ValueEnum)]
enum PreDumpMode {
    /// A parasite in the target vmsplices its pages into pipes
    #[default]
    Splice,
    /// Read from outside, no parasite
    Read,
}

/// What pre-dump and dump share.
#[derive(Debug, Args)]
struct CommonArgs {
    /// Process to checkpoint
    #[arg(short = 't', long = "tree", value_name = "PID", conflicts_with = "pid")]
    tree: Option<i32>,
    /// Process to checkpoint, as with --tree
    #[arg(value_name = "PID")]
    pid: Option<i32>,
    /// Directory for the images; it must exist and hold no checkpoint
    #[arg(short = 'D', long, value_name = "DIR", default_value = ".")]
    images_dir: PathBuf,
    /// Directory for stats-dump (default: the images directory)
    #[arg(short = 'W', long, value_name = "DIR")]
    work_dir: Option<PathBuf>,
    /// Parent checkpoint, relative to the images directory: pages that have not changed since are inherited
    #[arg(long, value_name = "DIR")]
    prev_images_dir: Option<PathBuf>,
    /// With --prev-images-dir: take a full checkpoint where the parent does not belong to the epoch being tracked,
    /// instead of refusing
    #[arg(long, requires = "prev_images_dir")]
    or_full: bool,
    /// Seconds that the target's threads may take to stop; then all are released and the run fails
    #[arg(long, value_name = "SECONDS", default_value = "10", value_parser = seconds)]
    timeout: Duration,
    /// Source of truth for changed pages, where a session has to be started (default: soft-dirty where the kernel has it)
    #[arg(long, value_name = "TRACKER")]
    tracker: Option<TrackerKind>,
    /// Checkpoint a process in which remap_file_pages was seen: since Linux 4.0 it makes ordinary VMAs
    #[arg(long)]
    allow_emulated_nonlinear: bool,
    /// Check, while the target stands still, that nothing is inherited that has changed: the layout against maps, the
    /// narrowed scan against a full one, inherited pages against the chain. If anything is wrong, no checkpoint is taken
    #[arg(long)]
    audit: bool,
    /// All processes of this cgroup, and of those below it, must be in the checkpoint. memckpt stops them itself and does
    /// not use the freezer, so that nothing stays frozen whatever becomes of memckpt
    #[arg(long, value_name = "DIR")]
    freeze_cgroup: Option<PathBuf>,
    /// Write a zero byte to this descriptor once the target has been let go
    #[arg(long, value_name = "FD")]
    status_fd: Option<i32>,
    /// Write the process's PID to FILE once the checkpoint is whole; relative to the work directory
    #[arg(long, value_name = "FILE")]
    pidfile: Option<PathBuf>,
    /// Print the checkpoint's figures as one JSON object
    #[arg(long)]
    json: bool,
    /// Print stats-dump as CRIU does
    #[arg(long)]
    display_stats: bool,
}

/// Flags of `memckpt pre-dump`.
#[derive(Debug, Args)]
pub(crate) struct PreDumpArgs {
    #[command(flatten)]
    common: CommonArgs,
    /// How pages are taken
    #[arg(long, value_enum, value_name = "MODE", default_value_t)]
    pre_dump_mode: PreDumpMode,
    /// Implied: a pre-dump always leaves the target tracked
    #[arg(long, hide = true)]
    track_mem: bool,
    /// Implied: a pre-dump always leaves the target running
    #[arg(short = 'R', long, hide = true)]
    leave_running: bool,
}

/// Flags of `memckpt dump`.
#[derive(Debug, Args)]
pub(crate) struct DumpArgs {
    #[command(flatten)]
    common: CommonArgs,
    /// Leave the target tracked, so that the next checkpoint can inherit from this one
    #[arg(long)]
    track_mem: bool,
    /// Leave the target running after the checkpoint
    #[arg(short = 'R', long, conflicts_with = "leave_stopped")]
    leave_running: bool,
    /// Leave the target stopped (SIGSTOP) after the checkpoint
    #[arg(short = 's', long)]
    leave_stopped: bool,
    /// Take pages by reading from outside instead of by a parasite
    #[arg(long, value_enum, value_name = "MODE", default_value_t, hide = true)]
    pre_dump_mode: PreDumpMode,
    #[command(flatten)]
    files: FileArgs,
}

/// What a dump does about open files.
#[derive(Debug, Args)]
struct FileArgs {
    /// Most bytes of a deleted file that are kept in the images; K, M and G count in powers of 1024
    #[arg(long, value_name = "SIZE", default_value = "1M", value_parser = size)]
    ghost_limit: u64,
    /// Capture the locks of open files. Nobody else may take them before the restore
    #[arg(short = 'l', long)]
    file_locks: bool,
    /// Capture established TCP connections. If the process ends, their packets are dropped until it is restored
    #[arg(long)]
    tcp_established: bool,
    /// The process belongs to a session of somebody else's, as what a shell starts does: it will come back in the session, and
    /// on the terminal, that the restore runs in
    #[arg(short = 'j', long)]
    shell_job: bool,
    /// What will be provided again at restore: pipe:[INODE], for a pipe that leads out of the tree; unix[INODE], for somebody
    /// else's unix socket to which datagrams go
    #[arg(long, value_name = "NAME", value_parser = external)]
    external: Vec<String>,
    /// Version of CRIU that shall be able to restore, where versions differ
    #[arg(long, value_enum, value_name = "VERSION", default_value_t)]
    criu_version: CriuVersionArg,
}

/// Versions of CRIU whose images differ.
#[derive(Clone, Copy, Debug, Default, ValueEnum)]
enum CriuVersionArg {
    /// Debian 12's
    #[value(name = "3.17")]
    V3_17,
    /// The newest known
    #[default]
    #[value(name = "4.2")]
    V4_2,
}

impl FileArgs {
    fn options(&self) -> FileOptions {
        FileOptions {
            ghost_limit: self.ghost_limit,
            file_locks: self.file_locks,
            tcp_established: self.tcp_established,
            shell_job: self.shell_job,
            external: self.external.clone(),
            criu_version: match self.criu_version {
                CriuVersionArg::V3_17 => CriuVersion::V3_17,
                CriuVersionArg::V4_2 => CriuVersion::V4_2,
            },
        }
    }
}

fn size(text: &str) -> Result<u64, String> {
    let (digits, unit) = match text.find(|c: char| !c.is_ascii_digit()) {
        Some(at) => text.split_at(at),
        None => (text, ""),
    };
    let factor = match unit {
        "" => Some(1),
        "K" | "k" => Some(1 << 10),
        "M" | "m" => Some(1 << 20),
        "G" | "g" => Some(1 << 30),
        _ => None,
    };
    let bytes = digits.parse::<u64>().ok().zip(factor).and_then(|(n, factor)| n.checked_mul(factor));
    bytes.ok_or_else(|| "a number of bytes, as 1048576 or 1M".to_owned())
}

pub(super) fn external(text: &str) -> Result<String, String> {
    let rest = text.strip_prefix("pipe:[").or_else(|| text.strip_prefix("unix["));
    let inode = rest.and_then(|rest| rest.strip_suffix(']'));
    match inode.map(str::parse::<u64>) {
        Some(Ok(_)) => Ok(text.to_owned()),
        _ => Err("what can be external is pipe:[INODE], as /proc/PID/fd shows it, and unix[INODE], as a refusal does".to_owned()),
    }
}

fn seconds(text: &str) -> Result<Duration, String> {
    match text.parse::<f64>() {
        Ok(s) if s > 0.0 && s <= 86400.0 => Ok(Duration::from_secs_f64(s)),
        _ => Err("a number of seconds above 0, at most 86400".to_owned()),
    }
}

impl CommonArgs {
    fn request(&self, kind: Kind, mode: PreDumpMode) -> anyhow::Result<Request> {
        let Some(pid) = self.tree.or(self.pid) else {
            bail!("which process? give its PID: `memckpt {kind} PID -D DIR`");
        };
        Ok(Request {
            pid,
            kind,
            images_dir: self.images_dir.clone(),
            work_dir: self.work_dir.clone(),
            prev_images_dir: self.prev_images_dir.clone(),
            or_full: self.or_full,
            page_mode: match mode {
                PreDumpMode::Splice => PageMode::Splice,
                PreDumpMode::Read => PageMode::Read,
            },
            track_mem: true,
            afterwards: Afterwards::Running,
            timeout: self.timeout,
            tracker: self.tracker,
            allow_emulated_nonlinear: self.allow_emulated_nonlinear,
            audit: self.audit,
            files: FileOptions::default(),
            cgroup: self.freeze_cgroup.clone(),
            status_fd: match self.status_fd {
                Some(fd) => Some(Arc::new(
                    descriptor::inherited(fd).with_context(|| format!("--status-fd: descriptor {fd}"))?,
                )),
                None => None,
            },
        })
    }

    fn run(&self, request: &Request) -> anyhow::Result<ExitCode> {
        let checkpoint = dump::run(request)?;
        if let Some(file) = &self.pidfile {
            let path = self.work_dir.as_ref().unwrap_or(&self.images_dir).join(file);
            std::fs::write(&path, request.pid.to_string()).with_context(|| {
                format!("the checkpoint is whole, but --pidfile {} is not written", path.display())
            })?;
        }
        report::checkpoint(&checkpoint, self.json)?;
        if self.display_stats {
            report::stats(&checkpoint)?;
        }
        Ok(ExitCode::SUCCESS)
    }
}

/// `memckpt pre-dump`.
pub(crate) fn pre_dump(args: &PreDumpArgs) -> anyhow::Result<ExitCode> {
    args.common.run(&args.common.request(Kind::PreDump, args.pre_dump_mode)?)
}

/// `memckpt dump`.
pub(crate) fn dump(args: &DumpArgs) -> anyhow::Result<ExitCode> {
    let mut request = args.common.request(Kind::Dump, args.pre_dump_mode)?;
    request.track_mem = args.track_mem;
    request.files = args.files.options();
    request.afterwards = match (args.leave_running, args.leave_stopped) {
        (_, true) => Afterwards::Stopped,
        (true, false) => Afterwards::Running,
        (false, false) => Afterwards::Ended,
    };
    args.common.run(&request)
}
