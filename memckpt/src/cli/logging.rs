//! `-v` and `-o`: where the log goes and how much of it.

use std::ffi::OsString;
use std::fs::OpenOptions;
use std::io::{self, IsTerminal as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::PathBuf;

use anyhow::Context as _;
use clap::{ArgAction, Args};
use tracing::level_filters::LevelFilter;
use tracing_subscriber::EnvFilter;

/// Flags that every command takes.
#[derive(Debug, Args)]
pub(crate) struct LogArgs {
    /// More log: -v what happens, -vv details, -vvv everything; or -vN as in CRIU, from -v0 (errors) to -v4
    #[arg(short = 'v', global = true, action = ArgAction::Count)]
    more: u8,
    #[arg(long, hide = true, global = true, value_name = "N")]
    verbosity: Option<u8>,
    /// Write the log to FILE instead of standard error; relative to the work directory where the command has one
    #[arg(short = 'o', long, value_name = "FILE", global = true)]
    log_file: Option<PathBuf>,
    /// Accepted for CRIU's users; memckpt reads no configuration files
    #[arg(long, global = true, hide = true)]
    no_default_config: bool,
}

/// CRIU's `-v4` as an ordinary long option: clap would read it as a flag `-v` and a flag `-4`.
pub(crate) fn criu_verbosity(arg: OsString) -> OsString {
    match arg.to_str().and_then(|a| a.strip_prefix("-v")).map(str::as_bytes) {
        Some(&[digit @ b'0'..=b'9']) => format!("--verbosity={}", char::from(digit)).into(),
        _ => arg,
    }
}

/// Starts logging.
pub(crate) fn start(args: &LogArgs) -> anyhow::Result<()> {
    let level = match args.verbosity.unwrap_or(args.more + 1) {
        0 => LevelFilter::ERROR,
        1 => LevelFilter::WARN,
        2 => LevelFilter::INFO,
        3 => LevelFilter::DEBUG,
        _ => LevelFilter::TRACE,
    };
    let filter = EnvFilter::builder()
        .with_default_directive(level.into())
        .with_env_var("MEMCKPT_LOG")
        .from_env_lossy();
    let builder = tracing_subscriber::fmt().with_env_filter(filter).with_target(level >= LevelFilter::DEBUG);
    if let Some(path) = &args.log_file {
        let file = OpenOptions::new()
            .create(true)
            .append(true)
            .mode(0o600)
            .open(path)
            .with_context(|| format!("log file {}", path.display()))?;
        builder.with_ansi(false).with_writer(std::sync::Mutex::new(file)).init();
    } else {
        builder.with_ansi(io::stderr().is_terminal()).with_writer(io::stderr).without_time().init();
    }
    Ok(())
}
