//! What a process looks like from outside, to be the same before and after memckpt was at work on it.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

/// Mappings, descriptors, threads and signal masks of a process.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Outward {
    /// The lines of `/proc/PID/maps`: places, protections, files.
    pub maps: Vec<String>,
    /// Descriptors and what they are.
    pub descriptors: BTreeMap<i32, PathBuf>,
    /// Threads.
    pub threads: BTreeMap<i32, Thread>,
}

/// What is kept of a thread.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Thread {
    /// `TracerPid`.
    pub tracer: i32,
    /// Blocked, pending, ignored and caught signals, as in `status`.
    pub signals: Vec<String>,
    /// Its state letter, with R, S and D as one: a thread that runs may sleep a moment later.
    pub stopped: char,
    /// Its name.
    pub name: String,
}

/// The value of `key` in a status file's text.
#[must_use]
pub fn status_field<'a>(status: &'a str, key: &str) -> Option<&'a str> {
    status.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(':')).map(str::trim)
}

/// (thread, state letter) of each thread of `pid`.
///
/// # Errors
///
/// When the process is gone.
pub fn thread_states(pid: i32) -> Result<Vec<(i32, char)>> {
    tasks(pid)?
        .into_iter()
        .map(|tid| {
            let status = read(format!("/proc/{pid}/task/{tid}/status"))?;
            let state = status_field(&status, "State").and_then(|state| state.chars().next()).unwrap_or('?');
            Ok((tid, state))
        })
        .collect()
}

fn tasks(pid: i32) -> Result<Vec<i32>> {
    let path = format!("/proc/{pid}/task");
    let mut tasks = Vec::new();
    for entry in fs::read_dir(&path).with_context(|| path.clone())? {
        tasks.push(entry?.file_name().to_string_lossy().parse()?);
    }
    tasks.sort_unstable();
    Ok(tasks)
}

fn read(path: impl AsRef<Path>) -> Result<String> {
    let path = path.as_ref();
    let bytes = fs::read(path).with_context(|| path.display().to_string())?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

impl Outward {
    /// Looks at `pid` now.
    ///
    /// # Errors
    ///
    /// When it is gone, or we may not look.
    pub fn of(pid: i32) -> Result<Self> {
        let mut descriptors = BTreeMap::new();
        for entry in fs::read_dir(format!("/proc/{pid}/fd")).context("descriptors")? {
            let entry = entry?;
            // A descriptor may close while we look.
            if let Ok(target) = fs::read_link(entry.path()) {
                descriptors.insert(entry.file_name().to_string_lossy().parse()?, target);
            }
        }
        let mut threads = BTreeMap::new();
        for tid in tasks(pid)? {
            let status = read(format!("/proc/{pid}/task/{tid}/status"))?;
            let field = |key| status_field(&status, key).unwrap_or_default().to_owned();
            let state = field("State").chars().next().unwrap_or('?');
            let thread = Thread {
                tracer: field("TracerPid").parse()?,
                signals: ["SigPnd", "ShdPnd", "SigBlk", "SigIgn", "SigCgt"].map(field).to_vec(),
                stopped: if matches!(state, 'R' | 'S' | 'D') { 'R' } else { state },
                name: field("Name"),
            };
            threads.insert(tid, thread);
        }
        let maps = read(format!("/proc/{pid}/maps"))?.lines().map(str::to_owned).collect();
        Ok(Self { maps, descriptors, threads })
    }

    /// What is different in `other`, a line each.
    #[must_use]
    pub fn differences(&self, other: &Self) -> String {
        let mut text = String::new();
        for line in self.maps.iter().filter(|line| !other.maps.contains(line)) {
            text += &format!("  - {line}\n");
        }
        for line in other.maps.iter().filter(|line| !self.maps.contains(line)) {
            text += &format!("  + {line}\n");
        }
        if self.descriptors != other.descriptors {
            text +=
                &format!("  descriptors: {:?}\n         now: {:?}\n", self.descriptors, other.descriptors);
        }
        for (tid, before) in &self.threads {
            match other.threads.get(tid) {
                Some(now) if now == before => {}
                now => text += &format!("  thread {tid}: {before:?}\n         now: {now:?}\n"),
            }
        }
        for tid in other.threads.keys().filter(|tid| !self.threads.contains_key(tid)) {
            text += &format!("  thread {tid} is new\n");
        }
        text
    }
}
