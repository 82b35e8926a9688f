//! Debian's criu, a peer.

use std::ffi::OsStr;
use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};

/// Why it cannot be asked here, if so.
///
/// # Errors
///
/// When there is none.
pub fn missing() -> Result<Option<String>> {
    if !crate::is_root() {
        return Ok(Some("not root".to_owned()));
    }
    let checked = Command::new("criu").arg("check").output().context("start criu")?;
    let said = String::from_utf8_lossy(&checked.stderr);
    let last = said.lines().last().unwrap_or("no word").to_owned();
    Ok((!checked.status.success()).then(|| format!("Debian's criu does not work on this kernel: {last}")))
}

/// `criu ACTION`, with its log beside the images.
///
/// # Errors
///
/// When it fails: what its log calls errors.
pub fn run(action: &str, images: &Path, args: &[impl AsRef<OsStr>]) -> Result<()> {
    let log = format!("{action}.log");
    let mut command = Command::new("criu");
    command.arg(action).args(["-v4", "-o", &log, "-D"]).arg(images).args(args);
    // It would hold our pipes.
    let status = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).status()?;
    let log = fs::read_to_string(images.join(&log)).unwrap_or_default();
    let errors: Vec<&str> = log.lines().filter(|line| line.contains("Error")).collect();
    ensure!(status.success(), "criu {action} fails ({status}): {errors:#?}");
    Ok(())
}
