//! Running the built `memckpt`.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail, ensure};

/// The built `memckpt`: `MEMCKPT_BIN`, else the one beside the test that runs (`target/PROFILE/deps/TEST`).
///
/// # Panics
///
/// When there is none: no test can run then.
#[must_use]
pub fn binary() -> PathBuf {
    if let Some(path) = std::env::var_os("MEMCKPT_BIN") {
        return PathBuf::from(path);
    }
    let test = std::env::current_exe().expect("a path of this test");
    let path = test.parent().and_then(Path::parent).expect("target/PROFILE").join("memckpt");
    assert!(path.exists(), "no {}: cargo build --package memckpt", path.display());
    path
}

/// `memckpt` with arguments.
#[must_use]
pub fn memckpt<I: IntoIterator<Item = S>, S: AsRef<OsStr>>(args: I) -> Memckpt {
    let mut command = Command::new(binary());
    command.args(args).stdin(Stdio::null());
    Memckpt { command }
}

/// A `memckpt` about to be run.
#[derive(Debug)]
pub struct Memckpt {
    command: Command,
}

/// What it did.
#[derive(Debug)]
pub struct Ran {
    /// Its exit code; `None` after a signal.
    pub code: Option<i32>,
    /// Data.
    pub stdout: String,
    /// Progress, logs and errors.
    pub stderr: String,
    what: String,
}

impl Memckpt {
    /// Adds an argument.
    #[must_use]
    pub fn arg(mut self, arg: impl AsRef<OsStr>) -> Self {
        self.command.arg(arg);
        self
    }

    /// Adds arguments.
    #[must_use]
    pub fn args<S: AsRef<OsStr>>(mut self, args: &[S]) -> Self {
        self.command.args(args);
        self
    }

    /// The command itself, for what this type cannot do.
    pub fn command(&mut self) -> &mut Command {
        &mut self.command
    }

    /// Runs it to its end.
    ///
    /// # Errors
    ///
    /// When it cannot be started.
    pub fn run(mut self) -> Result<Ran> {
        let what = format!("{:?}", self.command);
        // A session that it starts in the background must not hold our pipes: output goes to files.
        let (mut out, mut err) = (tempfile::tempfile()?, tempfile::tempfile()?);
        let status = self
            .command
            .stdout(out.try_clone()?)
            .stderr(err.try_clone()?)
            .status()
            .with_context(|| format!("cannot start {what}"))?;
        Ok(Ran { code: status.code(), stdout: read(&mut out)?, stderr: read(&mut err)?, what })
    }

    /// Runs it and expects success.
    ///
    /// # Errors
    ///
    /// When it fails: with all that it said.
    pub fn ok(self) -> Result<Ran> {
        let ran = self.run()?;
        if ran.code != Some(0) {
            bail!("{} failed ({:?})\n{}{}", ran.what, ran.code, ran.stdout, ran.stderr);
        }
        Ok(ran)
    }

    /// Runs it and expects a refusal whose message holds every one of `words` (letters of either case).
    ///
    /// # Errors
    ///
    /// When it succeeds, dies of a signal, panics, or says something else.
    pub fn refused(self, words: &[&str]) -> Result<Ran> {
        let ran = self.run()?;
        ensure!(
            ran.code.is_some_and(|code| code != 0),
            "not refused: {} ({:?})\n{}",
            ran.what,
            ran.code,
            ran.stderr
        );
        ensure!(!ran.stderr.contains("panicked at"), "{} panicked:\n{}", ran.what, ran.stderr);
        let said = ran.stderr.to_lowercase();
        for word in words {
            ensure!(said.contains(&word.to_lowercase()), "{}: no {word:?} in:\n{}", ran.what, ran.stderr);
        }
        Ok(ran)
    }
}

fn read(file: &mut std::fs::File) -> Result<String> {
    use std::io::{Read as _, Seek as _};
    file.rewind()?;
    let mut bytes = Vec::new();
    file.read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}
