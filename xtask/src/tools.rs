//! Tools that no Debian package offers: built by cargo, each in a directory of its own, and kept.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};

/// Where they are kept.
pub(crate) fn directory() -> Result<PathBuf> {
    let cache = match std::env::var_os("XDG_CACHE_HOME").filter(|v| Path::new(v).is_absolute()) {
        Some(cache) => PathBuf::from(cache),
        None => PathBuf::from(std::env::var_os("HOME").context("HOME is not set")?).join(".cache"),
    };
    Ok(cache.join("memckpt/tools"))
}

/// Makes sure of `name` in this `version`, and says where it is; `build` adds to the command that builds it.
pub(crate) fn install(name: &str, version: &str, build: impl FnOnce(&mut Command)) -> Result<PathBuf> {
    let prefix = directory()?.join(name);
    let program = prefix.join("bin").join(name);
    let found = Command::new(&program).arg("--version").output();
    if found.is_ok_and(|output| String::from_utf8_lossy(&output.stdout).contains(version)) {
        return Ok(program);
    }
    println!("building {name} {version} (minutes, once)");
    let mut cargo = Command::new("cargo");
    cargo.args(["install", name, "--version", version, "--locked", "--force", "--root"]).arg(&prefix);
    build(&mut cargo);
    must(&mut cargo)?;
    Ok(program)
}

/// Runs a command, which must succeed.
pub(crate) fn must(command: &mut Command) -> Result<()> {
    let status = command.status().with_context(|| format!("running {command:?}"))?;
    ensure!(status.success(), "{command:?}: {status}");
    Ok(())
}
