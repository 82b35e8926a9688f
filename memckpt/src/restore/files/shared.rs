//! Objects of shared memory: anonymous ones, and memfds. Each is made once, however many processes and mappings see it.

use std::collections::HashMap;
use std::ffi::CString;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::FileExt as _;

use nix::fcntl::{FcntlArg, SealFlag, fcntl};

use crate::image::chain::StoredPages;
use crate::image::pagemap::PagemapFlags;
use crate::image::proto::{MemfdFileEntry, MemfdInodeEntry};
use crate::image::{ImageKind, magic};
use crate::kernel::SyscallError;
use crate::restore::checkpoint::{Checkpoint, range};
use crate::restore::error::{Refusal, RestoreError};
use crate::restore::memory::{self, Origin, Source};

use super::{ONCE, reopen};

/// How much is copied at once.
const BLOCK: u64 = 1 << 20;
/// Forbids mappings that are yet to come (Linux 5.1), not in nix.
const FUTURE_WRITE: i32 = 0x10;

/// Those that are made.
#[derive(Debug, Default)]
pub(super) struct SharedObjects {
    anonymous: HashMap<u32, OwnedFd>,
    memfds: HashMap<u32, (MemfdInodeEntry, OwnedFd)>,
}

impl SharedObjects {
    /// Makes all of a checkpoint.
    pub(super) fn make(checkpoint: &Checkpoint) -> Result<Self, RestoreError> {
        let member = checkpoint.member();
        let mut made = Self::default();
        let mut lengths: HashMap<u32, u64> = HashMap::new();
        for (_, alive) in checkpoint.alive() {
            for vma in &alive.mm.vmas {
                if let Origin::Mapped(Source::Shared { id, offset }) = memory::origin(vma) {
                    let end = offset.saturating_add(range(vma).len());
                    let length = lengths.entry(id).or_default();
                    *length = end.max(*length);
                }
            }
        }
        for (id, length) in lengths {
            let fd = anonymous(length)?;
            if let Some(pages) = member.shared(id)? {
                fill(&pages, &fd, length)?;
            }
            made.anonymous.insert(id, fd);
        }
        let inodes: Vec<MemfdInodeEntry> = member.records(magic::MEMFD, ImageKind::MemfdInode)?;
        for inode in inodes {
            let fd = memfd(&inode)?;
            if let Some(pages) = member.shared(inode.shmid)? {
                fill(&pages, &fd, inode.size)?;
            }
            let seals = SealFlag::from_bits_retain(inode.seals as i32 & !FUTURE_WRITE);
            fcntl(&fd, FcntlArg::F_ADD_SEALS(seals))
                .map_err(|e| SyscallError::new("fcntl(F_ADD_SEALS)", inode.name.clone(), e))?;
            made.memfds.insert(inode.inode_id as u32, (inode, fd));
        }
        Ok(made)
    }

    /// The descriptor of an anonymous one.
    pub(super) fn get(&self, id: u32) -> Option<&OwnedFd> {
        self.anonymous.get(&id)
    }

    /// An opening of a memfd.
    pub(super) fn memfd(&self, pid: i32, entry: &MemfdFileEntry) -> Result<OwnedFd, RestoreError> {
        let Some((inode, fd)) = self.memfds.get(&entry.inode_id) else {
            let what = format!("memfd {} is not in the images", entry.inode_id);
            return Err(Refusal::State { pid, what }.into());
        };
        let opened = reopen(fd, entry.flags as i32 & !ONCE)?;
        if entry.pos > 0 {
            let seek = nix::unistd::Whence::SeekSet;
            nix::unistd::lseek(&opened, entry.pos as i64, seek)
                .map_err(|e| SyscallError::new("lseek", inode.name.clone(), e))?;
        }
        Ok(opened)
    }

    /// The seal that would have hindered mappings.
    pub(super) fn seal(&self) -> Result<(), RestoreError> {
        for (inode, fd) in self.memfds.values() {
            if inode.seals as i32 & FUTURE_WRITE != 0 {
                fcntl(fd, FcntlArg::F_ADD_SEALS(SealFlag::from_bits_retain(FUTURE_WRITE)))
                    .map_err(|e| SyscallError::new("fcntl(F_ADD_SEALS)", inode.name.clone(), e))?;
            }
        }
        Ok(())
    }
}

/// The object behind a shared anonymous mapping. The mapping itself is not needed to keep it.
fn anonymous(length: u64) -> Result<OwnedFd, SyscallError> {
    let flags = libc::MAP_SHARED | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
    let prot = libc::PROT_READ | libc::PROT_WRITE;
    // SAFETY: a new mapping.
    let at = unsafe { libc::mmap(std::ptr::null_mut(), length as usize, prot, flags, -1, 0) };
    if at == libc::MAP_FAILED {
        return Err(SyscallError::last("mmap", format!("{length} bytes of shared memory")));
    }
    let start = at.addr() as u64;
    // Needs CAP_CHECKPOINT_RESTORE or CAP_SYS_ADMIN (map_files, fs/proc/base.c).
    let path = format!("/proc/self/map_files/{start:x}-{:x}", start + length);
    let file = File::options().read(true).write(true).open(&path);
    // SAFETY: mapped above, used by nobody.
    unsafe { libc::munmap(at, length as usize) };
    Ok(file.map_err(|e| SyscallError::new("open", path, e))?.into())
}

fn memfd(inode: &MemfdInodeEntry) -> Result<OwnedFd, RestoreError> {
    let failed = |call, e: io::Error| SyscallError::new(call, format!("memfd {}", inode.name), e);
    let name = CString::new(inode.name.as_str()).map_err(|e| failed("memfd_create", e.into()))?;
    let flags = libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING;
    // SAFETY: reads the name.
    let fd = unsafe { libc::memfd_create(name.as_ptr(), flags) };
    if fd < 0 {
        return Err(failed("memfd_create", io::Error::last_os_error()).into());
    }
    // SAFETY: a new descriptor, which is nobody else's.
    let fd = unsafe { OwnedFd::from_raw_fd(fd) };
    let length =
        i64::try_from(inode.size).map_err(|_| failed("ftruncate", io::ErrorKind::InvalidInput.into()))?;
    nix::unistd::ftruncate(&fd, length).map_err(|e| failed("ftruncate", e.into()))?;
    if let Some(mode) = inode.mode {
        let mode = nix::sys::stat::Mode::from_bits_truncate(mode & 0o7777);
        nix::sys::stat::fchmod(&fd, mode).map_err(|e| failed("fchmod", e.into()))?;
    }
    nix::unistd::fchown(&fd, Some(inode.uid.into()), Some(inode.gid.into()))
        .map_err(|e| failed("fchown", e.into()))?;
    Ok(fd)
}

/// Copies what is stored of an object into it. Pages are whole; its `length` need not be.
fn fill(pages: &StoredPages, fd: &OwnedFd, length: u64) -> Result<(), RestoreError> {
    let file = File::from(reopen(fd, libc::O_RDWR)?);
    each_block(pages, |at, bytes| {
        let within = length.saturating_sub(at).min(bytes.len() as u64) as usize;
        let written = file.write_all_at(&bytes[..within], at);
        let object = || format!("shared memory (descriptor {})", fd.as_raw_fd());
        Ok(written.map_err(|e| SyscallError::new("pwrite", object(), e))?)
    })
}

/// Gives all that is stored of an object, by its offsets, to `write`.
pub(super) fn each_block(
    pages: &StoredPages,
    mut write: impl FnMut(u64, &[u8]) -> Result<(), RestoreError>,
) -> Result<(), RestoreError> {
    let mut buffer = vec![0; BLOCK as usize];
    for run in pages.pagemap().runs().iter().filter(|run| run.flags.contains(PagemapFlags::PRESENT)) {
        let mut done = 0;
        while done < run.range.len() {
            let len = BLOCK.min(run.range.len() - done) as usize;
            pages.read(run.offset + done, &mut buffer[..len])?;
            write(run.range.start.get() + done, &buffer[..len])?;
            done += len as u64;
        }
    }
    Ok(())
}
