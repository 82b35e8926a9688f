//! Where the workspace is, and building things in it.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};
use serde::Deserialize;

/// The workspace's root.
pub(crate) fn root() -> PathBuf {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    here.parent().unwrap_or(here).to_path_buf()
}

/// The cargo that started us, else the one in `PATH`.
pub(crate) fn cargo() -> Command {
    let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo.current_dir(root()).stdin(Stdio::null());
    cargo
}

/// An executable that cargo built.
#[derive(Debug, Clone)]
pub(crate) struct Executable {
    /// The package, e.g. `memckpt-tests`.
    pub(crate) package_dir: PathBuf,
    /// The target's name, e.g. `exactness`.
    pub(crate) name: String,
    /// `lib`, `bin`, `test`, …
    pub(crate) kind: String,
    /// Whether it is a libtest binary.
    pub(crate) is_test: bool,
    /// Where it is.
    pub(crate) path: PathBuf,
}

#[derive(Deserialize)]
struct Message {
    reason: String,
    manifest_path: Option<PathBuf>,
    target: Option<Target>,
    profile: Option<Profile>,
    executable: Option<PathBuf>,
}

#[derive(Deserialize)]
struct Target {
    kind: Vec<String>,
    name: String,
}

#[derive(Deserialize)]
struct Profile {
    test: bool,
}

/// Runs `cargo ARGS --message-format=json` and returns the executables that it names.
pub(crate) fn build(args: &[&str]) -> Result<Vec<Executable>> {
    eprintln!("xtask: cargo {}", args.join(" "));
    let output = cargo()
        .args(args)
        .arg("--message-format=json-render-diagnostics")
        .stderr(Stdio::inherit())
        .output()
        .context("cannot start cargo")?;
    if !output.status.success() {
        bail!("cargo {} failed ({})", args.join(" "), output.status);
    }
    let mut built = Vec::new();
    for line in output.stdout.split(|&byte| byte == b'\n').filter(|line| line.starts_with(b"{")) {
        let message: Message = serde_json::from_slice(line).context("cannot read cargo's messages")?;
        let (Some(path), Some(target), Some(manifest)) =
            (message.executable, message.target, message.manifest_path)
        else {
            continue;
        };
        if message.reason == "compiler-artifact" {
            built.push(Executable {
                package_dir: manifest.parent().unwrap_or(&manifest).to_path_buf(),
                name: target.name,
                kind: target.kind.first().cloned().unwrap_or_default(),
                is_test: message.profile.is_some_and(|profile| profile.test),
                path,
            });
        }
    }
    Ok(built)
}

/// Builds binary `name` of `package` in the given profile and returns its path.
pub(crate) fn build_bin(package: &str, name: &str, release: bool) -> Result<PathBuf> {
    let mut args = vec!["build", "--package", package, "--bin", name];
    if release {
        args.push("--release");
    }
    build(&args)?
        .into_iter()
        .find(|exe| exe.name == name && exe.kind == "bin")
        .map(|exe| exe.path)
        .with_context(|| format!("cargo built no binary {name}"))
}
