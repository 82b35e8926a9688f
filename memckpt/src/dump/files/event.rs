//! Files that tell of events: eventfd, signalfd, timerfd, epoll, inotify, pidfd.

use crate::dump::error::DumpError;
use crate::dump::request::CriuVersion;
use crate::image::proto::{
    EventfdFileEntry, EventpollFileEntry, EventpollTfdEntry, FdTypes, FhEntry, FileEntry, InotifyFileEntry,
    InotifyWdEntry, PidfdEntry, SignalfdEntry, TimerfdEntry,
};
use crate::kernel::descriptor::Descriptor;
use crate::kernel::fdinfo::{EpollTarget, InotifyWatch};
use crate::kernel::{file_handle, kcmp};

use super::collector::{Collector, owner};
use super::refusal::refuse_descriptor;

/// fh_entry holds its handle in 64-bit words, and CRIU reads this many.
const HANDLE_WORDS: usize = 16;

impl Collector<'_> {
    pub(super) fn eventfd(found: &Descriptor, id: u32) -> Result<FileEntry, DumpError> {
        let counter = found.info.eventfd_counter().ok_or_else(|| not_told(found, "eventfd"))?;
        // Kernels before 6.5 do not tell, and then CRIU knows no better than we do.
        if found.info.eventfd_semaphore() == Some(true) {
            return Err(refuse_descriptor(
                found,
                "eventfd made with EFD_SEMAPHORE",
                "cannot be made again: the image format has no place for that flag. Close it first",
            ));
        }
        let efd = EventfdFileEntry { id, flags: found.info.file_flags(), fown: owner(found)?, counter };
        Ok(FileEntry { r#type: FdTypes::Eventfd as i32, id, efd: Some(efd), ..FileEntry::default() })
    }

    pub(super) fn signalfd(found: &Descriptor, id: u32) -> Result<FileEntry, DumpError> {
        let sigmask = found.info.signalfd_mask().ok_or_else(|| not_told(found, "signalfd"))?;
        let sgfd = SignalfdEntry { id, flags: found.info.file_flags(), fown: owner(found)?, sigmask };
        Ok(FileEntry { r#type: FdTypes::Signalfd as i32, id, sgfd: Some(sgfd), ..FileEntry::default() })
    }

    pub(super) fn timerfd(found: &Descriptor, id: u32) -> Result<FileEntry, DumpError> {
        let timer = found.info.timer().ok_or_else(|| not_told(found, "timerfd"))?;
        // A periodic timer that has expired, unread, shows no time left: it starts again when it is read (fs/timerfd.c). Restored with
        // that value it would be disarmed.
        let waits_to_be_read = timer.ticks > 0 && timer.value == (0, 0);
        let value = if waits_to_be_read { timer.interval } else { timer.value };
        let tfd = TimerfdEntry {
            id,
            flags: found.info.file_flags(),
            fown: owner(found)?,
            clockid: timer.clock,
            ticks: timer.ticks,
            settime_flags: timer.settime_flags,
            vsec: value.0,
            vnsec: value.1,
            isec: timer.interval.0,
            insec: timer.interval.1,
        };
        Ok(FileEntry { r#type: FdTypes::Timerfd as i32, id, tfd: Some(tfd), ..FileEntry::default() })
    }

    pub(super) fn epoll(found: &Descriptor, id: u32) -> Result<FileEntry, DumpError> {
        let targets = found.info.epoll_targets().ok_or_else(|| not_told(found, "epoll"))?;
        let mut tfd = Vec::with_capacity(targets.len());
        for (at, target) in targets.iter().enumerate() {
            let nth = targets[..at].iter().filter(|t| t.fd == target.fd).count();
            watched(found, target, nth as u32)?;
            tfd.push(EventpollTfdEntry {
                id,
                tfd: target.fd,
                events: target.events,
                data: target.data,
                dev: Some(target.dev),
                inode: Some(target.inode),
                pos: Some(target.pos),
            });
        }
        let epfd = EventpollFileEntry { id, flags: found.info.file_flags(), fown: owner(found)?, tfd };
        Ok(FileEntry { r#type: FdTypes::Eventpoll as i32, id, epfd: Some(epfd), ..FileEntry::default() })
    }

    pub(super) fn inotify(found: &Descriptor, id: u32) -> Result<FileEntry, DumpError> {
        let watches = found.info.inotify_watches().ok_or_else(|| not_told(found, "inotify"))?;
        if found.waiting()? > 0 {
            return Err(refuse_descriptor(
                found,
                "inotify",
                "holds events that were not read yet, and cannot be seen without taking them: try again when they are read",
            ));
        }
        let wd = watches.iter().map(|watch| watch_entry(found, id, watch)).collect::<Result<_, _>>()?;
        let ify = InotifyFileEntry { id, flags: found.info.file_flags(), fown: owner(found)?, wd };
        Ok(FileEntry { r#type: FdTypes::Inotify as i32, id, ify: Some(ify), ..FileEntry::default() })
    }

    pub(super) fn pidfd(&mut self, found: &Descriptor, id: u32) -> Result<FileEntry, DumpError> {
        let target = found.info.pidfd_target().ok_or_else(|| not_told(found, "pidfd"))?;
        if self.options.criu_version == CriuVersion::V3_17 {
            return Err(refuse_descriptor(
                found,
                "pidfd",
                "is something that CRIU 3.17 cannot make again: close it first, or leave --criu-version out",
            ));
        }
        if target <= 0 {
            return Err(refuse_descriptor(found, "pidfd", "means a process that has ended: close it first"));
        }
        let pidfd = PidfdEntry {
            id,
            ino: found.stat.st_ino as u32,
            flags: found.info.file_flags(),
            nspid: target,
            fown: owner(found)?,
        };
        Ok(FileEntry { r#type: FdTypes::Pidfd as i32, id, pidfd: Some(pidfd), ..FileEntry::default() })
    }
}

/// The kernel's lines in fdinfo are not what they were when this was written.
fn not_told(found: &Descriptor, kind: &str) -> DumpError {
    refuse_descriptor(found, kind, "is described by this kernel in a way that memckpt does not understand")
}

/// Refuses a target that is not under the number by which it was added: it was closed there, and lives on through a copy.
fn watched(found: &Descriptor, target: &EpollTarget, nth: u32) -> Result<(), DumpError> {
    match kcmp::epoll_watches(found.pid, target.fd as i32, found.fd, target.fd, nth) {
        Ok(true) => Ok(()),
        Ok(false) => Err(stale(found, target)),
        Err(error) if error.errno() == Some(libc::EBADF) => Err(stale(found, target)),
        Err(error) => Err(error.into()),
    }
}

fn stale(found: &Descriptor, target: &EpollTarget) -> DumpError {
    refuse_descriptor(
        found,
        "epoll",
        format!(
            "watches a file that was added as descriptor {} and is not there any more: remove it first (EPOLL_CTL_DEL)",
            target.fd
        ),
    )
}

fn watch_entry(found: &Descriptor, id: u32, watch: &InotifyWatch) -> Result<InotifyWdEntry, DumpError> {
    let refused = |reason: String| {
        refuse_descriptor(
            found,
            "inotify",
            format!(
                "watches inode {} of device {}:{}, which {reason}",
                watch.inode,
                watch.dev >> 20,
                watch.dev & 0xf_ffff
            ),
        )
    };
    let Some((kind, bytes)) = &watch.handle else {
        return Err(refused("cannot be found by its handle: that file system has none".into()));
    };
    let path = file_handle::path(watch.dev, *kind, bytes)
        .map_err(|error| refused(format!("cannot be found by its handle: {error}")))?;
    let Some(path) = path.to_str().filter(|path| !path.ends_with(" (deleted)")) else {
        return Err(refused("was deleted: remove the watch first".into()));
    };
    let mut handle: Vec<u64> = bytes
        .chunks(8)
        .map(|chunk| {
            let mut word = [0; 8];
            word[..chunk.len()].copy_from_slice(chunk);
            u64::from_le_bytes(word)
        })
        .collect();
    handle.resize(HANDLE_WORDS.max(handle.len()), 0);
    Ok(InotifyWdEntry {
        id,
        i_ino: watch.inode,
        mask: watch.mask,
        ignored_mask: watch.ignored_mask,
        s_dev: watch.dev,
        wd: watch.wd,
        f_handle: FhEntry {
            bytes: bytes.len() as u32,
            r#type: *kind as u32,
            handle,
            path: Some(path.to_owned()),
            mnt_id: None,
        },
    })
}
