//! `memckpt show`: what a checkpoint and its chain hold.

use std::io::{self, Write};
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context as _, Result};
use clap::Args;
use memckpt::image::Chain;
use memckpt::image::meta::CheckpointKind;
use memckpt::image::summary::{MemberSummary, Summary};
use memckpt::kernel::process;
use memckpt::verify::{self, Comparison, DifferenceKind};

/// Arguments of `memckpt show`.
#[derive(Debug, Args)]
pub(crate) struct ShowArgs {
    /// Directory of a checkpoint
    #[arg(value_name = "DIR")]
    dir: PathBuf,
    /// One JSON object instead of tables
    #[arg(long)]
    json: bool,
    /// Compare the checkpoint, byte for byte, with the memory of a process, which should be stopped; ends with 1 where
    /// they differ
    #[arg(long, value_name = "PID")]
    compare: Option<i32>,
    /// List every memory area, too
    #[arg(long)]
    vmas: bool,
}

#[derive(serde::Serialize)]
struct Report<'a> {
    #[serde(flatten)]
    summary: &'a Summary,
    #[serde(skip_serializing_if = "Option::is_none")]
    comparison: Option<&'a Comparison>,
}

pub(crate) fn show(args: &ShowArgs) -> Result<ExitCode> {
    let chain = chain(args)?;
    let summary = Summary::of(&chain)?;
    let comparison = match args.compare {
        Some(pid) => {
            let compared = verify::compare(pid, &chain);
            Some(compared.with_context(|| format!("cannot compare with process {pid}"))?)
        }
        None => None,
    };
    // A thread that runs on changes memory under the comparison.
    if let Some(pid) = args.compare
        && !matches!(process::state(pid), Ok('T' | 't'))
    {
        tracing::warn!("process {pid} is not stopped: differences may be changes made meanwhile");
    }
    let mut out = io::stdout().lock();
    if args.json {
        serde_json::to_writer(&mut out, &Report { summary: &summary, comparison: comparison.as_ref() })
            .map_err(io::Error::from)?;
        writeln!(out)?;
    } else {
        write_summary(&mut out, &summary, args.vmas)?;
        if let Some(comparison) = &comparison {
            write_comparison(&mut out, comparison)?;
        }
    }
    let exact = comparison.is_none_or(|comparison| comparison.is_exact());
    Ok(ExitCode::from(u8::from(!exact)))
}

/// The memory of the tree's root, or of the process to compare with where that is another one of the tree.
fn chain(args: &ShowArgs) -> Result<Chain> {
    let root = Chain::open(&args.dir)?;
    let tree = root.youngest().tree()?;
    match args.compare {
        Some(pid) if pid != root.pid() && tree.iter().any(|process| process.pid as i32 == pid) => {
            Ok(Chain::open_task(&args.dir, pid)?)
        }
        _ => Ok(root),
    }
}

fn write_summary(out: &mut impl Write, summary: &Summary, vmas: bool) -> io::Result<()> {
    for process in &summary.processes {
        write!(out, "process {}  group {}  session {}", process.pid, process.pgid, process.sid)?;
        if process.ppid != 0 {
            write!(out, "  child of {}", process.ppid)?;
        }
        match process.exit_code {
            Some(status) => writeln!(out, "  has ended (wait status {status:#x})")?,
            None => writeln!(out)?,
        }
        for thread in &process.threads {
            write!(out, "  thread {}  {}", thread.tid, thread.comm.as_deref().unwrap_or("-"))?;
            if let (Some(ip), Some(sp)) = (thread.ip, thread.sp) {
                write!(out, "  ip {ip:#x}  sp {sp:#x}")?;
            }
            writeln!(out)?;
        }
    }
    if summary.processes.is_empty() {
        writeln!(out, "process {}  (memory only)", summary.pid)?;
    }
    writeln!(
        out,
        "memory  {} here, {} inherited, {} zero  in {} areas",
        size(summary.bytes_own),
        size(summary.bytes_inherited),
        size(summary.bytes_zero),
        summary.vmas.len()
    )?;
    if vmas {
        for vma in &summary.vmas {
            writeln!(
                out,
                "  {:<33} {}  {:>8} here {:>8} inherited  {}",
                vma.range, vma.perms, vma.pages_own, vma.pages_inherited, vma.kind
            )?;
        }
    }
    writeln!(out, "chain of {}", summary.chain.len())?;
    for member in &summary.chain {
        write_member(out, member)?;
    }
    Ok(())
}

fn write_member(out: &mut impl Write, member: &MemberSummary) -> io::Result<()> {
    let kind = match member.kind {
        CheckpointKind::PreDump => "pre-dump",
        CheckpointKind::Dump => "dump",
    };
    let taken = member.meta.as_ref().map_or_else(|| "no date".to_owned(), |meta| date(meta.taken_unix_ms));
    writeln!(
        out,
        "  {}\n    {kind}, {taken}, {} here, {} inherited",
        member.path.display(),
        size(member.pages_own.bytes()),
        size(member.pages_inherited.bytes())
    )?;
    let Some(meta) = &member.meta else {
        return writeln!(out, "    not made by memckpt");
    };
    writeln!(
        out,
        "    tracker {}, hints {}, scanned {} pages, read {} entries, losses {}",
        meta.tracker.as_deref().unwrap_or("none"),
        meta.hint_mode.as_deref().unwrap_or("none"),
        meta.counters.pages_scanned,
        meta.counters.entries_read,
        meta.counters.losses
    )?;
    let times = &meta.timings;
    writeln!(
        out,
        "    freezing {}, frozen {}, out of the target {}, to disk {}, clear {}",
        micros(times.freezing_us),
        micros(times.frozen_us),
        micros(times.memdump_us),
        micros(times.memwrite_us),
        micros(times.clear_us)
    )?;
    for note in &meta.notes {
        writeln!(out, "    note: {note}")?;
    }
    Ok(())
}

fn write_comparison(out: &mut impl Write, found: &Comparison) -> io::Result<()> {
    writeln!(
        out,
        "compared {} pages, {} more are zero in the process and absent here, {} differ",
        found.pages_compared, found.pages_zero, found.pages_different
    )?;
    for difference in &found.differences {
        let how = match difference.kind {
            DifferenceKind::Bytes => "other bytes",
            DifferenceKind::NotInCheckpoint => "not in the checkpoint",
            DifferenceKind::NotInProcess => "not in the process",
        };
        let vma = if difference.vma.is_empty() { "(anonymous)" } else { &difference.vma };
        writeln!(out, "  {}  {how}  {vma}", difference.address)?;
    }
    let untold = found.pages_different.get() - found.differences.len() as u64;
    if untold > 0 {
        writeln!(out, "  and {untold} more")?;
    }
    Ok(())
}

/// Bytes with a binary prefix.
fn size(bytes: u64) -> String {
    const UNITS: [&str; 5] = ["KiB", "MiB", "GiB", "TiB", "PiB"];
    if bytes < 1024 {
        return format!("{bytes} B");
    }
    let mut value = bytes as f64 / 1024.0;
    let mut unit = 0;
    while value >= 1024.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    format!("{value:.1} {}", UNITS[unit])
}

fn micros(us: u64) -> String {
    if us < 1000 { format!("{us} µs") } else { format!("{:.1} ms", us as f64 / 1000.0) }
}

/// UTC date and time of milliseconds since 1970.
fn date(unix_ms: u64) -> String {
    let seconds = unix_ms / 1000;
    let (hour, minute, second) = (seconds / 3600 % 24, seconds / 60 % 60, seconds % 60);
    // Years are counted from March, so that the leap day is a year's last day; an era is 400 years.
    let days = seconds / 86400 + 719_468;
    let (era, day_of_era) = (days / 146_097, days % 146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_from_march = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month_from_march + 2) / 5 + 1;
    let month = if month_from_march < 10 { month_from_march + 3 } else { month_from_march - 9 };
    let year = era * 400 + year_of_era + u64::from(month <= 2);
    format!("{year:04}-{month:02}-{day:02} {hour:02}:{minute:02}:{second:02} UTC")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_are_those_of_the_calendar() {
        for (unix, want) in [
            (0, "1970-01-01 00:00:00 UTC"),
            (951_782_400, "2000-02-29 00:00:00 UTC"),
            (1_709_251_199, "2024-02-29 23:59:59 UTC"),
            (1_709_251_200, "2024-03-01 00:00:00 UTC"),
            (4_102_444_799, "2099-12-31 23:59:59 UTC"),
        ] {
            assert_eq!(date(unix * 1000), want);
        }
    }

    #[test]
    fn sizes_have_one_digit_after_the_point() {
        assert_eq!(
            [0, 1023, 4096, 3 << 20, 64 << 30].map(size),
            ["0 B", "1023 B", "4.0 KiB", "3.0 MiB", "64.0 GiB"]
        );
    }
}
