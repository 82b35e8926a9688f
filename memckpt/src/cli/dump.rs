//! `memckpt pre-dump` and `memckpt dump`.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::bail;
use clap::{Args, ValueEnum};
use memckpt::dump::{self, Afterwards, Kind, PageMode, Request};
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
    /// Accepted for CRIU's users: a terminal is not captured yet
    #[arg(short = 'j', long, hide = true)]
    shell_job: bool,
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
        })
    }

    fn run(&self, request: &Request) -> anyhow::Result<ExitCode> {
        let checkpoint = dump::run(request)?;
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
    request.afterwards = match (args.leave_running, args.leave_stopped) {
        (_, true) => Afterwards::Stopped,
        (true, false) => Afterwards::Running,
        (false, false) => Afterwards::Ended,
    };
    args.common.run(&request)
}
