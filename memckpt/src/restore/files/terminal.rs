//! Pseudoterminals of the tree, and the terminal of the caller in the place of the one that a job was started from.

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet, HashMap, hash_map};
use std::io::IsTerminal as _;
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, OwnedFd};

use nix::fcntl::OFlag;
use nix::sys::stat::Mode;

use crate::image::chain::Member;
use crate::image::proto::{TermiosEntry, TtyFileEntry, TtyInfoEntry, TtyType, WinsizeEntry};
use crate::image::{ImageKind, magic};
use crate::kernel::SyscallError;
use crate::kernel::terminal::{self, LineSettings};
use crate::restore::batch::Batch;
use crate::restore::checkpoint::Checkpoint;
use crate::restore::error::{Refusal, RestoreError};
use crate::restore::task::Task;

use super::{ONCE, copy, high, reopen, set_flags};

/// More pseudoterminals than any tree has.
const MOST: u32 = 1 << 16;

/// The terminals of a tree.
#[derive(Debug, Default)]
pub(in crate::restore) struct Terminals {
    infos: HashMap<u32, TtyInfoEntry>,
    /// By their numbers.
    masters: HashMap<u32, OwnedFd>,
    /// One opening of each terminal that is in use, by the number of its description.
    opened: BTreeMap<u32, OwnedFd>,
    controls: Vec<Control>,
}

/// A terminal that controls a session.
#[derive(Debug)]
struct Control {
    /// The process that leads it; the root, where the session is that of the caller.
    leader: i32,
    is_callers: bool,
    /// The group in the foreground.
    foreground: i32,
    terminal: OwnedFd,
}

/// Which end of a pair `/dev/ptmx` is.
fn is_master(info: &TtyInfoEntry) -> bool {
    let device = u64::from(info.rdev);
    (libc::major(device), libc::minor(device)) == (5, 2)
}

fn number(info: &TtyInfoEntry) -> Option<u32> {
    Some(info.pty.as_ref()?.index)
}

impl Terminals {
    pub(super) fn read(member: &Member) -> Result<Self, RestoreError> {
        let infos: Vec<TtyInfoEntry> = member.records(magic::TTY_INFO, ImageKind::TtyInfo)?;
        let infos = infos.into_iter().map(|info| (info.id, info)).collect();
        Ok(Self { infos, ..Self::default() })
    }

    /// What kind of terminal a description is of.
    pub(super) fn kind(&self, id: u32) -> Option<TtyType> {
        TtyType::try_from(self.infos.get(&id)?.r#type).ok()
    }

    /// Opens one. `path`: that of the file.
    pub(super) fn open(
        &mut self,
        pid: i32,
        entry: &TtyFileEntry,
        path: Option<&str>,
        shell_job: bool,
    ) -> Result<OwnedFd, RestoreError> {
        let refused = |reason: &str| {
            let what = format!("terminal {}", path.unwrap_or("without a path"));
            RestoreError::from(Refusal::File { pid, what, reason: reason.to_owned() })
        };
        let Some(info) = self.infos.get(&entry.tty_info_id).cloned() else {
            return Err(refused("is not described in the images"));
        };
        let Some(number) = number(&info).filter(|number| *number < MOST) else {
            return Err(refused("is no pseudoterminal, and is not restored"));
        };
        let flags = entry.flags as i32 & !ONCE | libc::O_NOCTTY;
        let fd = if is_master(&info) {
            copy(self.master(number, path.unwrap_or("/dev/ptmx"))?)?
        } else if self.infos.values().any(|other| is_master(other) && self::number(other) == Some(number)) {
            self.master(number, "/dev/ptmx")?;
            slave(number, flags)?
        } else if shell_job {
            let ours = callers().ok_or_else(|| {
                refused("is that of a shell's job: restore it from a terminal, which takes its place")
            })?;
            reopen(&ours, flags)?
        } else {
            return Err(refused(
                "is one end of a pair whose other end was outside of the tree: --shell-job puts yours in its place",
            ));
        };
        if let Entry::Vacant(first) = self.opened.entry(info.id) {
            first.insert(copy(&fd)?);
        }
        set_flags(&fd, entry.flags)?;
        Ok(fd)
    }

    /// The master of pair `number`.
    fn master(&mut self, number: u32, path: &str) -> Result<&OwnedFd, RestoreError> {
        let entry = match self.masters.entry(number) {
            hash_map::Entry::Occupied(known) => return Ok(known.into_mut()),
            hash_map::Entry::Vacant(entry) => entry,
        };
        // Each gets the lowest number that is free: those before it are taken for as long.
        let mut before = Vec::new();
        let master = loop {
            let flags = OFlag::O_RDWR | OFlag::O_NOCTTY | OFlag::O_CLOEXEC;
            let master = nix::fcntl::open(path, flags, Mode::empty())
                .map_err(|e| SyscallError::new("open", path, e))?;
            let got = terminal::number_of_master(master.as_fd())
                .map_err(|e| SyscallError::new("ioctl(TIOCGPTN)", path, e))?;
            if got == number {
                break master;
            }
            if got > number {
                let what = format!("/dev/pts/{number} is in use: end its user first");
                return Err(Refusal::Checkpoint(what).into());
            }
            before.push(master);
        };
        terminal::lock(master.as_fd(), false).map_err(|e| SyscallError::new("ioctl(TIOCSPTLCK)", path, e))?;
        Ok(entry.insert(master))
    }

    /// Sets them as they were, and keeps those that control a session at hand, from `least` on.
    pub(super) fn settle(&mut self, checkpoint: &Checkpoint, least: i32) -> Result<(), RestoreError> {
        let mut controlled = BTreeSet::new();
        for (id, fd) in &self.opened {
            let info = &self.infos[id];
            let pair = number(info).and_then(|number| self.masters.get(&number).map(|_| number));
            set(fd.as_fd(), info, pair).map_err(|(call, e)| SyscallError::new(call, "a terminal", e))?;
            let (session, foreground) = (info.sid as i32, info.pgrp as i32);
            if session == 0 || !controlled.insert(session) {
                continue;
            }
            let leads =
                checkpoint.alive().any(|(process, _)| process.pid == session && process.sid == session);
            let (leader, terminal) = match pair {
                Some(number) if leads => (session, slave(number, libc::O_RDWR | libc::O_NOCTTY)?),
                Some(_) => continue,
                None => (checkpoint.root().pid, reopen(fd, libc::O_RDWR | libc::O_NOCTTY)?),
            };
            let terminal = high(&terminal, least)?;
            self.controls.push(Control { leader, is_callers: pair.is_none(), foreground, terminal });
        }
        Ok(())
    }

    /// Has `pid`, which has made its session, get the terminal that controls it: its children have it from their birth.
    pub(in crate::restore) fn control(&self, pid: i32, batch: &mut Batch<'_>) -> Result<(), RestoreError> {
        for control in self.controls.iter().filter(|control| control.leader == pid && !control.is_callers) {
            let fd = control.terminal.as_raw_fd() as u64;
            batch.call("ioctl(TIOCSCTTY)", libc::SYS_ioctl, [fd, libc::TIOCSCTTY, 0])?;
        }
        Ok(())
    }

    /// Has each terminal get the group in the foreground that it had. All groups are there.
    pub(in crate::restore) fn foreground(
        &self,
        checkpoint: &Checkpoint,
        tasks: &BTreeMap<i32, Task<'_>>,
    ) -> Result<(), RestoreError> {
        let is_there =
            |group| checkpoint.processes.iter().any(|process| process.pid == group && process.pgid == group);
        for control in self.controls.iter().filter(|control| is_there(control.foreground)) {
            let Some(task) = tasks.get(&control.leader) else { continue };
            let mut batch = Batch::of(*task);
            let (fd, group) = (control.terminal.as_raw_fd() as u64, control.foreground.to_ne_bytes());
            batch.call_with("ioctl(TIOCSPGRP)", libc::SYS_ioctl, &group, |at| [fd, libc::TIOCSPGRP, at])?;
            batch.flush()?;
        }
        Ok(())
    }
}

/// The terminal that we were started on.
fn callers() -> Option<BorrowedFd<'static>> {
    // SAFETY: the standard descriptors stay open for as long as we run.
    let standard = [0, 1, 2].map(|fd| unsafe { BorrowedFd::borrow_raw(fd) });
    standard.into_iter().find(BorrowedFd::is_terminal)
}

fn slave(number: u32, flags: i32) -> Result<OwnedFd, SyscallError> {
    let path = format!("/dev/pts/{number}");
    let flags = OFlag::from_bits_retain(flags | libc::O_CLOEXEC);
    nix::fcntl::open(path.as_str(), flags, Mode::empty()).map_err(|e| SyscallError::new("open", path, e))
}

type Failure = (&'static str, std::io::Error);

/// Sets a terminal as it was. `pair`: its number, if both of its ends are ours.
fn set(fd: BorrowedFd<'_>, info: &TtyInfoEntry, pair: Option<u32>) -> Result<(), Failure> {
    let failed = |call| move |e| (call, e);
    if let Some(settings) = &info.termios {
        terminal::set_settings(fd, &line_settings(settings)).map_err(failed("ioctl(TCSETS)"))?;
    }
    let Some(number) = pair else { return Ok(()) };
    if let Some(WinsizeEntry { ws_row, ws_col, ws_xpixel, ws_ypixel }) = info.winsize {
        let window = [ws_row, ws_col, ws_xpixel, ws_ypixel].map(|n| n as u16);
        terminal::set_window(fd, window).map_err(failed("ioctl(TIOCSWINSZ)"))?;
    }
    if let Some(locked) =
        info.termios_locked.as_ref().map(line_settings).filter(|l| *l != LineSettings::default())
    {
        terminal::set_locked_settings(fd, &locked).map_err(failed("ioctl(TIOCSLCKTRMIOS)"))?;
    }
    if is_master(info) {
        terminal::set_packet_mode(fd, info.packet_mode).map_err(failed("ioctl(TIOCPKT)"))?;
        if info.locked {
            terminal::lock(fd, true).map_err(failed("ioctl(TIOCSPTLCK)"))?;
        }
    } else if let (Some(uid), Some(gid)) = (info.uid, info.gid) {
        std::os::unix::fs::chown(format!("/dev/pts/{number}"), Some(uid), Some(gid))
            .map_err(failed("chown"))?;
    }
    if info.exclusive {
        terminal::make_exclusive(fd).map_err(failed("ioctl(TIOCEXCL)"))?;
    }
    Ok(())
}

/// The control characters, a byte each, lie in the words of CRIU's array one behind the other.
fn line_settings(entry: &TermiosEntry) -> LineSettings {
    let mut bytes = entry.c_cc.iter().flat_map(|word| word.to_ne_bytes());
    LineSettings {
        flags: [entry.c_iflag, entry.c_oflag, entry.c_cflag, entry.c_lflag],
        line: entry.c_line as u8,
        characters: std::array::from_fn(|_| bytes.next().unwrap_or(0)),
    }
}
