//! A running `crowd`, and what must be the same after somebody tampered with it.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::process::{Child, Command, ExitStatus};
use std::sync::atomic::{AtomicI32, AtomicI64, AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use memckpt::addr::{Addr, AddrRange};

const WORKERS: usize = 8;
const KINDS: usize = 16;

/// struct state of `victims/crowd.c`.
#[repr(C)]
pub(crate) struct State {
    progress: [AtomicI64; WORKERS],
    errors: [[AtomicI64; KINDS]; WORKERS],
    pub(crate) interrupted: AtomicI64,
    signals: AtomicI64,
    pub(crate) aborts: AtomicI64,
    commits: AtomicI64,
    pub(crate) tid: [AtomicI32; WORKERS],
    memory: AtomicU64,
    length: AtomicU64,
    ready: AtomicI32,
    stop: AtomicI32,
    workers: AtomicI32,
}

pub(crate) struct Victim {
    child: Child,
    state: &'static State,
    _file: tempfile::NamedTempFile,
}

/// What a process has that an infection could leave changed.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Belongings {
    maps: Vec<String>,
    descriptors: Vec<String>,
    masks: BTreeMap<i32, String>,
    tracer: String,
}

/// Tries until `done`, for as long as a loaded machine may take.
pub(crate) fn eventually(what: &str, mut done: impl FnMut() -> bool) -> Result<()> {
    let end = Instant::now() + Duration::from_secs(20);
    while !done() {
        ensure!(Instant::now() < end, "not within 20 s: {what}");
        std::thread::sleep(Duration::from_micros(300));
    }
    Ok(())
}

impl Victim {
    pub(crate) fn start(workers: &str, idle: usize) -> Result<Self> {
        Self::start_with(workers, idle, |_| ())
    }

    /// As `start`, the command changed before.
    pub(crate) fn start_with(workers: &str, idle: usize, change: impl FnOnce(&mut Command)) -> Result<Self> {
        let file = tempfile::NamedTempFile::new()?;
        file.as_file().set_len(1 << 16)?;
        file.as_file().set_permissions(std::os::unix::fs::PermissionsExt::from_mode(0o666))?;
        let state = map(file.as_file())?;
        let program = format!("{}/crowd", env!("MEMCKPT_VICTIMS"));
        let mut command = Command::new(&program);
        command.arg(file.path()).args([workers, &idle.to_string()]);
        change(&mut command);
        let child = command.spawn();
        let victim = Self { child: child.context(program)?, state, _file: file };
        eventually("the victim is ready", || victim.state().ready.load(Relaxed) == 1)?;
        victim.progresses()?;
        let threads = idle + victim.workers().max(1);
        // A new thread blocks all signals until the C library has set it up (clone in pthread_create, glibc 2.32).
        let set_up = |tid: &i32| {
            let blocked =
                victim.status(*tid, "SigBlk").ok().and_then(|mask| u64::from_str_radix(&mask, 16).ok());
            blocked.is_some_and(|mask| mask & 1 << (libc::SIGTERM - 1) == 0)
        };
        eventually("all threads are there", || {
            victim.threads().is_ok_and(|t| t.len() == threads && t.iter().all(set_up))
        })?;
        Ok(victim)
    }

    pub(crate) fn pid(&self) -> i32 {
        self.child.id() as i32
    }

    pub(crate) fn state(&self) -> &State {
        self.state
    }

    fn workers(&self) -> usize {
        self.state().workers.load(Relaxed) as usize
    }

    /// Memory with known content.
    pub(crate) fn memory(&self) -> AddrRange {
        AddrRange::with_len(Addr(self.state().memory.load(Relaxed)), self.state().length.load(Relaxed))
    }

    /// What it holds from `offset` on.
    pub(crate) fn content(offset: u64, len: usize) -> Vec<u8> {
        (offset..offset + len as u64).map(|i| (i.wrapping_mul(31) + (i >> 12)) as u8).collect()
    }

    fn threads(&self) -> Result<Vec<i32>> {
        let entries = fs::read_dir(format!("/proc/{}/task", self.pid()))?;
        Ok(entries.filter_map(|e| e.ok()?.file_name().to_str()?.parse().ok()).collect())
    }

    /// Every worker gets on, and none has found anything wrong.
    pub(crate) fn progresses(&self) -> Result<()> {
        let state = self.state();
        let now = || -> Vec<i64> { state.progress.iter().map(|p| p.load(Relaxed)).collect() };
        let before = now();
        eventually("every worker gets on", || {
            !self.is_alive() || now().iter().zip(&before).take(self.workers()).all(|(n, b)| n > b || *n < 0)
        })?;
        ensure!(self.is_alive(), "the victim is dead");
        for (worker, kinds) in state.errors.iter().enumerate() {
            for (kind, count) in kinds.iter().enumerate() {
                let count = count.load(Relaxed);
                ensure!(count == 0, "worker {worker} found error {kind} {count} times");
            }
        }
        Ok(())
    }

    pub(crate) fn status(&self, tid: i32, field: &str) -> Result<String> {
        let text = fs::read_to_string(format!("/proc/{}/task/{tid}/status", self.pid()))?;
        let line = text.lines().find_map(|l| l.strip_prefix(field)?.strip_prefix(':'));
        Ok(line.context("no such line in status")?.trim().to_owned())
    }

    fn is_alive(&self) -> bool {
        self.status(self.pid(), "State").is_ok_and(|s| !s.starts_with(['Z', 'X']))
    }

    pub(crate) fn belongings(&self) -> Result<Belongings> {
        let pid = self.pid();
        let maps = fs::read_to_string(format!("/proc/{pid}/maps"))?.lines().map(str::to_owned).collect();
        let mut descriptors = Vec::new();
        for entry in fs::read_dir(format!("/proc/{pid}/fd"))? {
            let entry = entry?;
            descriptors.push(format!("{:?} {:?}", entry.file_name(), fs::read_link(entry.path())?));
        }
        descriptors.sort();
        let mut masks = BTreeMap::new();
        for tid in self.threads()? {
            masks.insert(tid, self.status(tid, "SigBlk")?);
        }
        Ok(Belongings { maps, descriptors, masks, tracer: self.status(pid, "TracerPid")? })
    }

    /// Has, perhaps after a moment, what it had before.
    pub(crate) fn has(&self, before: &Belongings) -> Result<()> {
        let same = eventually("everything as before", || {
            !self.is_alive() || self.belongings().is_ok_and(|now| now == *before)
        });
        ensure!(self.is_alive(), "the victim is dead");
        same.with_context(|| format!("before: {before:#?}\nnow: {:#?}", self.belongings()))
    }

    pub(crate) fn signal(&self, signal: i32) {
        // SAFETY: no memory is involved.
        unsafe { libc::kill(self.pid(), signal) };
    }

    /// Ends it; it then checks its memory and its counters.
    pub(crate) fn finish(mut self) -> Result<()> {
        self.state().stop.store(1, Relaxed);
        let mut ended: Option<ExitStatus> = None;
        eventually("the victim ends", || {
            ended = self.child.try_wait().unwrap_or(None);
            ended.is_some()
        })?;
        match ended {
            Some(status) if status.success() => Ok(()),
            status => bail!("the victim ended with {status:?}"),
        }
    }
}

impl Drop for Victim {
    fn drop(&mut self) {
        let _ended = self.child.kill().and_then(|()| self.child.wait());
    }
}

fn map(file: &File) -> Result<&'static State> {
    use std::os::fd::AsRawFd;
    // SAFETY: a new mapping, as long as the file.
    let state = unsafe {
        libc::mmap(
            std::ptr::null_mut(),
            1 << 16,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_SHARED,
            file.as_raw_fd(),
            0,
        )
    };
    ensure!(state != libc::MAP_FAILED, "mmap");
    // SAFETY: mapped until this process ends; all fields are atomics, and the file is longer.
    Ok(unsafe { &*state.cast() })
}
