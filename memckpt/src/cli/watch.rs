//! `memckpt watch`: track a process, and show it.

use std::io::{self, IsTerminal, Write};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, bail};
use clap::Args;
use memckpt::tracker::agent::HookChoice;
use memckpt::tracker::control::{self, BackgroundOptions, Seat, SessionClient};
use memckpt::tracker::dirty::TrackerKind;
use memckpt::tracker::session::{Sample, ServeOptions, Session, SessionOptions, Summary, end_signals, serve};

use super::audit::Auditor;
use super::exit;

/// Track a process continuously: its mappings, the chunks it touches, the pages it dirties
#[derive(Debug, Args)]
pub(crate) struct WatchArgs {
    /// The process
    pid: i32,
    /// Seconds between reports
    #[arg(long, value_name = "SECONDS", default_value = "1", value_parser = seconds)]
    interval: Duration,
    /// End after this many seconds
    #[arg(long, value_name = "SECONDS", value_parser = seconds)]
    duration: Option<Duration>,
    /// Leave the session in a process of its own, for pre-dump and dump to use
    #[arg(long, conflicts_with_all = ["duration", "stop"])]
    background: bool,
    /// End the session that watches the process
    #[arg(long, conflicts_with = "duration")]
    stop: bool,
    /// At each interval stop the process and compare what the session knows with all that there is: the mappings, and
    /// every dirty page. Exits with 6 if anything was wrong
    #[arg(long, conflicts_with_all = ["background", "stop"])]
    audit: bool,
    /// One JSON object a line
    #[arg(long)]
    json: bool,
    /// Force what tells dirty pages; the best that works here otherwise
    #[arg(long, value_name = "soft-dirty|uffd-wp")]
    tracker: Option<TrackerKind>,
    /// Force a kind of eBPF hook
    #[arg(long, value_name = "auto|fentry|kprobe|tracepoint", default_value_t)]
    hooks: HookChoice,
    /// Where a background session logs to
    #[arg(long, value_name = "FILE", requires = "background")]
    session_log: Option<std::path::PathBuf>,
    /// What `--background` runs
    #[arg(long, hide = true, conflicts_with_all = ["background", "stop", "json", "duration"])]
    detached: bool,
}

fn seconds(text: &str) -> Result<Duration, String> {
    let seconds: f64 = text.parse().map_err(|_| "not a number of seconds".to_owned())?;
    let duration = Duration::try_from_secs_f64(seconds).map_err(|e| e.to_string())?;
    if duration < Duration::from_millis(10) {
        return Err("less than 0.01 seconds".to_owned());
    }
    Ok(duration)
}

/// Runs the command.
pub(crate) fn run(args: &WatchArgs) -> anyhow::Result<ExitCode> {
    if args.stop {
        return stop(args);
    }
    if args.background {
        return background(args);
    }
    if args.detached {
        return detached(args);
    }
    foreground(args)
}

fn stop(args: &WatchArgs) -> anyhow::Result<ExitCode> {
    let Some(client) = SessionClient::connect(args.pid)? else {
        bail!("process {} is not watched", args.pid);
    };
    client.stop()?;
    Ok(ExitCode::SUCCESS)
}

fn background(args: &WatchArgs) -> anyhow::Result<ExitCode> {
    let options = BackgroundOptions {
        tracker: args.tracker,
        hooks: args.hooks,
        log: args.session_log.clone(),
        ..BackgroundOptions::default()
    };
    let info = control::start_background(args.pid, &options)?.hello()?;
    if args.json {
        return print(&serde_json::to_string(&info)?);
    }
    for note in &info.notes {
        eprint(&format!("note: {note}"));
    }
    let tracker = info.tracker.map_or_else(|| "nothing".to_owned(), |t| t.to_string());
    print(&format!(
        "process {} is watched by process {}: dirty pages from {tracker}, hints {}",
        args.pid, info.pid, info.hint_mode
    ))
}

fn options(args: &WatchArgs) -> SessionOptions {
    SessionOptions { tracker: args.tracker, hooks: args.hooks, ..SessionOptions::default() }
}

/// The seat first: a second session must be refused before it touches the target.
fn begin(args: &WatchArgs) -> anyhow::Result<(Seat, Session)> {
    end_signals().thread_block().context("sigprocmask")?;
    let seat = Seat::take(args.pid)?;
    let session = Session::attach(args.pid, &options(args))?;
    Ok((seat, session))
}

fn runtime() -> anyhow::Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_current_thread().enable_all().build().context("tokio runtime")
}

fn detached(args: &WatchArgs) -> anyhow::Result<ExitCode> {
    // Neither the caller's terminal nor its working directory may be held.
    nix::unistd::setsid().context("setsid")?;
    std::env::set_current_dir("/").context("chdir to /")?;
    let begun = runtime().and_then(|runtime| begin(args).map(|(seat, session)| (runtime, seat, session)));
    let (runtime, seat, session) = match begun {
        Ok(begun) => begun,
        Err(e) => {
            tracing::error!("{e:#}");
            control::announce_failure(&format!("{e:#}"))?;
            return Ok(ExitCode::FAILURE);
        }
    };
    let options = ServeOptions { on_listening: Some(control::announce_ready), ..ServeOptions::default() };
    let summary = runtime.block_on(serve(session, seat, options, &mut |_| {}))?;
    tracing::info!("session of process {} over: {}", summary.pid, summary.end);
    Ok(exit_code(&summary))
}

fn foreground(args: &WatchArgs) -> anyhow::Result<ExitCode> {
    let runtime = runtime()?;
    let (seat, mut session) = begin(args)?;
    let mut view = View::new(args.json);
    let info = session.info()?;
    if !args.json {
        for note in &info.notes {
            eprint(&format!("note: {note}"));
        }
    }
    let options = ServeOptions { interval: Some(args.interval), duration: args.duration, on_listening: None };
    let auditor = args
        .audit
        .then(|| Auditor::start(args.pid, args.interval, args.json))
        .transpose()
        .context("no thread for the audit")?;
    let summary = runtime.block_on(serve(session, seat, options, &mut |sample| view.show(sample)))?;
    // With it the last connections are closed.
    drop(runtime);
    view.finish(&summary);
    let right = auditor.is_none_or(Auditor::finish);
    Ok(if right { exit_code(&summary) } else { ExitCode::from(exit::AUDIT) })
}

fn exit_code(summary: &Summary) -> ExitCode {
    if summary.end.is_failure() { ExitCode::FAILURE } else { ExitCode::SUCCESS }
}

fn print(line: &str) -> anyhow::Result<ExitCode> {
    match writeln!(io::stdout(), "{line}") {
        // The reader has seen enough.
        Err(e) if e.kind() != io::ErrorKind::BrokenPipe => Err(e).context("standard output"),
        _ => Ok(ExitCode::SUCCESS),
    }
}

fn eprint(line: &str) {
    let _ = writeln!(io::stderr(), "{line}");
}

/// How samples are shown: a table in place, lines, or JSON.
struct View {
    json: bool,
    in_place: bool,
    /// Lines of the table on the screen.
    drawn: usize,
    header: bool,
}

impl View {
    fn new(json: bool) -> Self {
        Self { json, in_place: !json && io::stdout().is_terminal(), drawn: 0, header: false }
    }

    fn show(&mut self, sample: &Sample) {
        let mut text = String::new();
        if self.json {
            text = serde_json::to_string(sample).unwrap_or_default() + "\n";
        } else if self.in_place {
            if self.drawn > 0 {
                // Up to the first line of the table, and clear from there: the rest of the screen stays the user's.
                text.push_str(&format!("\x1b[{}A\x1b[J", self.drawn));
            }
            let rows = rows(sample);
            self.drawn = rows.len();
            // A line that wraps would be two on the way up.
            let width = ratatui::crossterm::terminal::size().map_or(80, |(columns, _)| usize::from(columns));
            for (name, value) in rows {
                text.extend(format!("{name:>14}  {value}").chars().take(width.saturating_sub(1)));
                text.push('\n');
            }
        } else {
            if !self.header {
                self.header = true;
                text.push_str(HEADER);
            }
            text.push_str(&line(sample));
        }
        // Somebody who no longer reads does not end the tracking; it ends by its own rules.
        let mut out = io::stdout().lock();
        let _ = out.write_all(text.as_bytes()).and_then(|()| out.flush());
    }

    fn finish(&self, summary: &Summary) {
        if self.json {
            let _ = print(&serde_json::json!({ "summary": summary }).to_string());
            return;
        }
        eprint(&format!(
            "process {} watched for {:.1} s, to epoch {}: {} layout events, {} losses; {}",
            summary.pid, summary.seconds, summary.epoch, summary.events, summary.losses, summary.end
        ));
    }
}

const HEADER: &str =
    "   vmas  resident MiB   dirty pages   pages/s  chunks    events  losses  epoch  tracker     hints\n";

fn mib(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 20)
}

fn or_dash(value: Option<impl ToString>) -> String {
    value.map_or_else(|| "-".to_owned(), |v| v.to_string())
}

fn line(s: &Sample) -> String {
    format!(
        "{:>7} {:>13.1} {:>13} {:>9} {:>7} {:>9} {:>7} {:>6}  {:<10}  {}{}\n",
        s.vmas,
        mib(s.resident.bytes()),
        or_dash(s.dirty),
        or_dash(s.dirty_rate.map(|r| format!("{r:.0}"))),
        s.chunks_touched,
        s.events,
        s.losses,
        s.epoch,
        or_dash(s.tracker),
        s.hint_mode,
        s.broken.as_ref().map_or_else(String::new, |why| format!("  broken: {why}")),
    )
}

fn rows(s: &Sample) -> Vec<(&'static str, String)> {
    let mut rows = vec![
        ("process", s.pid.to_string()),
        ("VMAs", s.vmas.to_string()),
        ("resident", format!("{:.1} MiB", mib(s.resident.bytes()))),
        (
            "dirty",
            s.dirty.map_or_else(|| "-".to_owned(), |d| format!("{d} pages, {:.1} MiB", mib(d.bytes()))),
        ),
        ("dirty rate", s.dirty_rate.map_or_else(|| "-".to_owned(), |r| format!("{r:.0} pages/s"))),
        ("chunks touched", s.chunks_touched.to_string()),
        ("events", s.events.to_string()),
        ("losses", s.losses.to_string()),
        ("generation", s.generation.to_string()),
        ("epoch", s.epoch.to_string()),
        ("tracker", or_dash(s.tracker)),
        ("hints", s.hint_mode.to_string()),
    ];
    if let Some(why) = &s.broken {
        rows.push(("broken", why.clone()));
    }
    rows
}
