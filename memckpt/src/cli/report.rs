//! What a finished checkpoint prints.

use std::io::{self, Write as _};

use memckpt::image::CheckpointMeta;

/// The checkpoint's figures: a short table, or one JSON object.
pub(crate) fn checkpoint(meta: &CheckpointMeta, json: bool) -> anyhow::Result<()> {
    let mut out = io::stdout().lock();
    if json {
        serde_json::to_writer(&mut out, meta)?;
        writeln!(out)?;
        return Ok(());
    }
    let CheckpointMeta { counters, timings, .. } = meta;
    let kind = serde_json::to_value(meta.kind)?;
    writeln!(out, "{} of process {}", kind.as_str().unwrap_or_default(), meta.target.pid)?;
    let rows = [
        ("pages scanned", counters.pages_scanned.to_string()),
        ("entries read", counters.entries_read.to_string()),
        ("pages written", format!("{} ({})", counters.pages_written, bytes(counters.pages_written.bytes()))),
        (
            "pages inherited",
            format!("{} ({})", counters.pages_inherited, bytes(counters.pages_inherited.bytes())),
        ),
        (
            "shared memory",
            format!("{} ({})", counters.shared_pages_written, bytes(counters.shared_pages_written.bytes())),
        ),
        (
            "frozen",
            format!(
                "{:.3} ms (and {:.3} ms to stop all threads)",
                ms(timings.frozen_us),
                ms(timings.freezing_us)
            ),
        ),
        ("  of it clearing", format!("{:.3} ms", ms(timings.clear_us))),
        ("tracker", meta.tracker.clone().unwrap_or_else(|| "none: a full checkpoint".into())),
        ("hints", meta.hint_mode.clone().unwrap_or_else(|| "none".into())),
        ("losses", counters.losses.to_string()),
    ];
    let absent = |name| name == "shared memory" && counters.shared_pages_written.get() == 0;
    for (name, value) in rows.into_iter().filter(|(name, _)| !absent(*name)) {
        writeln!(out, "  {name:<18}{value}")?;
    }
    if let Some(audit) = &meta.audit {
        writeln!(
            out,
            "  {:<18}{} mappings, {} pages scanned, {} inherited pages compared, {} wrong",
            "audit", audit.vmas, audit.pages_scanned, audit.pages_compared, audit.disagreements
        )?;
    }
    for note in &meta.notes {
        writeln!(out, "  note: {note}")?;
    }
    Ok(())
}

/// `stats-dump` in the words of CRIU's `--display-stats`.
pub(crate) fn stats(meta: &CheckpointMeta) -> anyhow::Result<()> {
    let mut out = io::stdout().lock();
    writeln!(out, "Displaying dump stats:")?;
    writeln!(out, "Freezing time: {} us", meta.timings.freezing_us)?;
    writeln!(out, "Frozen time: {} us", meta.timings.frozen_us)?;
    writeln!(out, "Memory dump time: {} us", meta.timings.memdump_us)?;
    writeln!(out, "Memory write time: {} us", meta.timings.memwrite_us)?;
    writeln!(out, "Memory pages scanned: {}", meta.counters.pages_scanned)?;
    writeln!(out, "Memory pages skipped from parent: {}", meta.counters.pages_inherited)?;
    writeln!(out, "Memory pages written: {}", meta.counters.pages_written)?;
    Ok(())
}

fn ms(us: u64) -> f64 {
    us as f64 / 1000.0
}

fn bytes(n: u64) -> String {
    match n {
        0..1_048_576 => format!("{} KiB", n >> 10),
        1_048_576..1_073_741_824 => format!("{:.1} MiB", n as f64 / 1_048_576.0),
        _ => format!("{:.2} GiB", n as f64 / 1_073_741_824.0),
    }
}
