//! Debian packages that a command needs: installed where we may, named where we may not.

use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, Result, bail};

/// A tool of ours and the Debian package that brings it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Tool {
    /// A command in `PATH`, or an absolute path.
    pub(crate) command: &'static str,
    /// The Debian package.
    pub(crate) package: &'static str,
}

const fn tool(command: &'static str, package: &'static str) -> Tool {
    Tool { command, package }
}

/// What `cargo xtask vm` needs.
pub(crate) const VM: &[Tool] = &[
    tool("qemu-system-x86_64", "qemu-system-x86"),
    tool("/bin/busybox", "busybox-static"),
    tool("xz", "xz-utils"),
    tool("zstd", "zstd"),
    tool("dpkg-deb", "dpkg"),
    tool("setpriv", "util-linux"),
];

/// What the integration tests need beside it.
pub(crate) const TEST: &[Tool] = &[
    tool("gcc", "gcc"),
    tool("/usr/include/stdio.h", "libc6-dev"),
    tool("crit", "criu"),
    tool("redis-server", "redis-server"),
    tool("redis-benchmark", "redis-tools"),
    tool("mount", "mount"),
    tool("/usr/bin/python3", "python3"),
    tool("java", "default-jre-headless"),
    tool("node", "nodejs"),
];

/// What `cargo xtask fuzz` needs beside it.
pub(crate) const FUZZ: &[Tool] = &[tool("g++", "g++")];

/// Installs the packages of those `tools` that are missing.
///
/// # Errors
///
/// Where we are not root, or this is no Debian: names the command to run.
pub(crate) fn install(tools: &[Tool]) -> Result<()> {
    let mut missing: Vec<&str> = tools.iter().filter(|t| !exists(t.command)).map(|t| t.package).collect();
    missing.sort_unstable();
    missing.dedup();
    if missing.is_empty() {
        return Ok(());
    }
    let names = missing.join(" ");
    let by_hand = format!("apt-get update && apt-get install -y --no-install-recommends {names}");
    if !nix::unistd::geteuid().is_root() {
        bail!("missing Debian packages: {names}\n  run:  sudo sh -c '{by_hand}'");
    }
    if !exists("apt-get") {
        bail!("missing: {names}, and there is no apt-get here\n  on Debian:  {by_hand}");
    }
    eprintln!("xtask: installing Debian packages: {names}");
    update()?;
    apt(&[&["install", "-y", "--no-install-recommends"], missing.as_slice()].concat())
        .with_context(|| format!("run by hand:  {by_hand}"))
}

/// Refreshes apt's lists, once a run of xtask.
pub(crate) fn update() -> Result<()> {
    static DONE: AtomicBool = AtomicBool::new(false);
    if DONE.swap(true, Ordering::Relaxed) || !nix::unistd::geteuid().is_root() {
        return Ok(());
    }
    apt(&["update"])
}

fn apt(args: &[&str]) -> Result<()> {
    // One lock for all of apt: another apt may be at work on a fresh machine. RUNLEVEL=1 keeps invoke-rc.d from
    // starting the daemons that packages bring.
    let output = Command::new("apt-get")
        .args(["-q", "-o", "DPkg::Lock::Timeout=300", "-o", "Acquire::Retries=3"])
        .args(args)
        .env("DEBIAN_FRONTEND", "noninteractive")
        .env("RUNLEVEL", "1")
        .stdin(Stdio::null())
        .output()
        .context("cannot start apt-get")?;
    if output.status.success() {
        return Ok(());
    }
    bail!(
        "apt-get {} failed ({}):\n{}{}",
        args.join(" "),
        output.status,
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    )
}

/// Whether a command is in `PATH` (or the absolute path exists).
pub(crate) fn exists(command: &str) -> bool {
    if command.starts_with('/') {
        return Path::new(command).exists();
    }
    let path = std::env::var_os("PATH").unwrap_or_default();
    // Not in every user's PATH, but where Debian puts criu.
    std::env::split_paths(&path)
        .chain(["/usr/sbin".into(), "/sbin".into()])
        .any(|dir| dir.join(command).is_file())
}
