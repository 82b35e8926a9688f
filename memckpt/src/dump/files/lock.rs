//! File locks: flock(2), fcntl(2), open-file locks.

use crate::dump::error::DumpError;
use crate::image::proto::FileLockEntry;
use crate::kernel::descriptor::Descriptor;
use crate::kernel::fdinfo::Lock;

use super::collector::Collector;
use super::refusal::refuse_descriptor;

// FL_POSIX, FL_FLOCK and FL_OFDLCK of include/linux/filelock.h.
const FL_POSIX: u32 = 1;
const FL_FLOCK: u32 = 2;
const FL_OFDLCK: u32 = 1024;

impl Collector<'_> {
    /// The locks of `found`, each once however many descriptors tell of it.
    pub(super) fn locks(&mut self, found: &Descriptor) -> Result<(), DumpError> {
        let not_told = || {
            refuse_descriptor(
                found,
                "locked file",
                "has a lock that this kernel describes in a way that memckpt does not understand",
            )
        };
        for lock in found.info.locks().ok_or_else(not_told)? {
            if !self.options.file_locks {
                return Err(refuse_descriptor(
                    found,
                    format!("{} with a lock", found.link.display()),
                    "needs --file-locks: nobody else may take the lock before the restore",
                ));
            }
            let Some(kind) = kind(&lock) else {
                return Err(refuse_descriptor(
                    found,
                    format!("{} with a {} {}", found.link.display(), lock.kind, lock.state),
                    "is not captured: memckpt takes locks of flock(2) and fcntl(2)",
                ));
            };
            let entry = FileLockEntry {
                flag: kind,
                r#type: if lock.access == "WRITE" { libc::F_WRLCK } else { libc::F_RDLCK } as u32,
                pid: found.pid,
                fd: found.fd,
                start: lock.start as i64,
                // 0: to the end.
                len: lock.end.map_or(0, |end| (end - lock.start) as i64 + 1),
            };
            // A POSIX lock belongs to the process, and all its descriptors of the file tell of it.
            let same = |other: &FileLockEntry| {
                kind == FL_POSIX && FileLockEntry { fd: entry.fd, ..other.clone() } == entry
            };
            if !self.out.locks.iter().any(same) {
                self.out.locks.push(entry);
            }
        }
        Ok(())
    }
}

fn kind(lock: &Lock) -> Option<u32> {
    match lock.kind.as_str() {
        "POSIX" if lock.state == "ADVISORY" => Some(FL_POSIX),
        "FLOCK" if lock.state == "ADVISORY" => Some(FL_FLOCK),
        "OFDLCK" if lock.state == "ADVISORY" => Some(FL_OFDLCK),
        _ => None,
    }
}
