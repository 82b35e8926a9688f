//! Terminals: pairs of pseudoterminals whose two ends the tree has, and with `--shell-job` the terminal that it was started from,
//! in whose place comes the one that the restore is started from.

use std::io;
use std::os::fd::AsFd as _;

use crate::dump::error::DumpError;
use crate::image::proto::{
    FdTypes, FileEntry, TermiosEntry, TtyFileEntry, TtyInfoEntry, TtyPtyEntry, TtyType, WinsizeEntry,
};
use crate::kernel::descriptor::Descriptor;
use crate::kernel::terminal::{self, LineSettings};
use crate::kernel::{SyscallError, status};

use super::collector::{Collector, owner};
use super::refusal::refuse_descriptor;

/// CRIU's number for `/dev/tty`; those of pseudoterminals follow from theirs.
const CTTY: u32 = 2012;

/// What a terminal is, by the number of its device (Documentation/admin-guide/devices.txt).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    /// `/dev/ptmx`
    Master,
    /// `/dev/pts/N`
    Slave(u32),
    /// `/dev/tty`: the controlling terminal of whoever opens it.
    Controlling,
    /// A console, a serial line.
    Other,
}

impl Kind {
    fn of(found: &Descriptor) -> Self {
        let (major, minor) = (libc::major(found.stat.st_rdev), libc::minor(found.stat.st_rdev));
        match (major, minor) {
            (5, 2) => Self::Master,
            (5, 0) => Self::Controlling,
            (136..=143, _) => Self::Slave((major - 136) * 256 + minor),
            _ => Self::Other,
        }
    }
}

/// The pseudoterminals of a tree, of which one end may be missing.
#[derive(Debug, Default)]
pub(super) struct Pseudoterminals {
    masters: Vec<u32>,
    /// A slave's number, and the refusal if there is no master.
    slaves: Vec<(u32, DumpError)>,
}

impl Collector<'_> {
    pub(super) fn terminal(&mut self, found: &Descriptor, id: u32) -> Result<FileEntry, DumpError> {
        let failed = |e: io::Error| SyscallError::new("ioctl", found.name(), e);
        let kind = Kind::of(found);
        let name = || format!("terminal {}", found.link.display());
        let (info_id, number, r#type) = match kind {
            Kind::Master => {
                let number = terminal::number_of_master(found.as_fd()).map_err(failed)?;
                self.pseudoterminals.masters.push(number);
                (2 * number + 1, Some(number), TtyType::Pty)
            }
            Kind::Slave(number) => {
                let reason = "is one end of a pair whose other end is outside of the tree: with --shell-job, the terminal that the restore runs on takes its place";
                let refusal = refuse_descriptor(found, name(), reason);
                self.pseudoterminals.slaves.push((number, refusal));
                (2 * number, Some(number), TtyType::Pty)
            }
            Kind::Controlling => (CTTY, None, TtyType::Ctty),
            Kind::Other => {
                let reason = "is no pseudoterminal: its state is its device's. Redirect it first";
                return Err(refuse_descriptor(found, name(), reason));
            }
        };
        if found.waiting()? > 0 {
            let reason = "has input that nobody has read yet: try again when it is read";
            self.passing(refuse_descriptor(found, name(), reason))?;
        }
        if self.out.terminals.iter().all(|known| known.id != info_id) {
            let entry = self.terminal_info(found, kind, info_id, number, r#type)?;
            self.out.terminals.push(entry);
        }
        // Its path is that of an ordinary file, of its own.
        let regular = self.next_id();
        let entry = self.path_file(found, regular)?;
        self.out.files.push(entry);
        let tty = TtyFileEntry {
            id,
            tty_info_id: info_id,
            flags: found.info.file_flags(),
            fown: owner(found)?,
            regf_id: Some(regular),
        };
        Ok(FileEntry { r#type: FdTypes::Tty as i32, id, tty: Some(tty), ..FileEntry::default() })
    }

    fn terminal_info(
        &self,
        found: &Descriptor,
        kind: Kind,
        id: u32,
        number: Option<u32>,
        r#type: TtyType,
    ) -> Result<TtyInfoEntry, DumpError> {
        let failed = |e: io::Error| SyscallError::new("ioctl", found.name(), e);
        let fd = found.as_fd();
        let is_master = kind == Kind::Master;
        let controls = match kind {
            Kind::Master => terminal::controlled_by_master(fd).map_err(failed)?.unwrap_or((0, 0)),
            _ => controlled(found.pid, kind)?,
        };
        let [ws_row, ws_col, ws_xpixel, ws_ypixel] = terminal::window(fd).map_err(failed)?.map(u32::from);
        Ok(TtyInfoEntry {
            id,
            r#type: r#type as i32,
            locked: is_master && terminal::is_locked(fd).map_err(failed)?,
            exclusive: terminal::is_exclusive(fd).map_err(failed)?,
            packet_mode: is_master && terminal::is_in_packet_mode(fd).map_err(failed)?,
            sid: controls.0 as u32,
            pgrp: controls.1 as u32,
            rdev: found.stat.st_rdev as u32,
            termios: Some(termios(&terminal::settings(fd).map_err(failed)?)),
            termios_locked: Some(termios(&terminal::locked_settings(fd).map_err(failed)?)),
            winsize: Some(WinsizeEntry { ws_row, ws_col, ws_xpixel, ws_ypixel }),
            pty: number.map(|index| TtyPtyEntry { index }),
            dev: Some(found.stat.st_dev as u32),
            uid: Some(found.stat.st_uid),
            gid: Some(found.stat.st_gid),
        })
    }

    /// Slaves whose masters nobody in the tree has.
    pub(super) fn outer_terminals(&mut self) -> Result<(), DumpError> {
        let Pseudoterminals { masters, slaves } = std::mem::take(&mut self.pseudoterminals);
        for (number, refusal) in slaves {
            if !masters.contains(&number) && !self.options.shell_job {
                self.unless_refused(Err::<(), _>(refusal))?;
            }
        }
        Ok(())
    }
}

/// Session and foreground group that a terminal controls, if it is that of process `pid`; (0, 0) otherwise.
fn controlled(pid: i32, kind: Kind) -> Result<(i32, i32), DumpError> {
    let stat = status::stat(pid)?;
    let (major, minor) = (libc::major(stat.tty as u64), libc::minor(stat.tty as u64));
    let is_its = match kind {
        Kind::Slave(number) => (136..=143).contains(&major) && (major - 136) * 256 + minor == number,
        Kind::Controlling => stat.tty != 0,
        Kind::Master | Kind::Other => false,
    };
    Ok(if is_its { (stat.sid, stat.foreground) } else { (0, 0) })
}

/// The control characters, a byte each, lie in the words of CRIU's array one behind the other.
fn termios(settings: &LineSettings) -> TermiosEntry {
    let [c_iflag, c_oflag, c_cflag, c_lflag] = settings.flags;
    let mut c_cc = vec![0; terminal::CONTROL_CHARACTERS];
    for (word, bytes) in c_cc.iter_mut().zip(settings.characters.chunks(4)) {
        let mut four = [0; 4];
        four[..bytes.len()].copy_from_slice(bytes);
        *word = u32::from_ne_bytes(four);
    }
    TermiosEntry {
        c_iflag,
        c_oflag,
        c_cflag,
        c_lflag,
        c_line: settings.line.into(),
        c_ispeed: 0,
        c_ospeed: 0,
        c_cc,
    }
}
