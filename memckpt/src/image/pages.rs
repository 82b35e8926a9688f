//! `pages-N.img`: raw pages in the order of the pagemap, without a header.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::FileExt;

use nix::errno::Errno;
use nix::fcntl::{SpliceFFlags, splice};

use crate::kernel::SyscallError;

/// A pages file being written, at offsets that the plan has given.
#[derive(Debug)]
pub struct PagesFile {
    file: File,
    object: String,
}

impl PagesFile {
    /// Writes into `file`, which messages call `object`.
    #[must_use]
    pub fn new(file: File, object: impl Into<String>) -> Self {
        Self { file, object: object.into() }
    }

    /// Writes all of `bytes` at `offset`.
    ///
    /// # Errors
    /// pwrite(2) fails, as with ENOSPC.
    pub fn write_at(&self, offset: u64, bytes: &[u8]) -> Result<(), SyscallError> {
        self.file.write_all_at(bytes, offset).map_err(|e| self.error("pwrite", e))
    }

    /// Fills `bytes` from `offset` on.
    ///
    /// # Errors
    /// pread(2) fails, or the file ends early.
    pub fn read_at(&self, offset: u64, bytes: &mut [u8]) -> Result<(), SyscallError> {
        self.file.read_exact_at(bytes, offset).map_err(|e| self.error("pread", e))
    }

    /// Moves `len` bytes out of the read end of a pipe to `offset`, by splice(2); by copying where the file system
    /// cannot splice.
    ///
    /// # Errors
    /// The pipe ends early, or splice(2), read(2) or pwrite(2) fails, as with ENOSPC.
    pub fn splice_from(&self, pipe: BorrowedFd<'_>, offset: u64, len: u64) -> Result<(), SyscallError> {
        let mut at = libc::loff_t::try_from(offset).map_err(|_| self.error("splice", Errno::EFBIG.into()))?;
        let mut left = len;
        while left > 0 {
            let want = usize::try_from(left).unwrap_or(usize::MAX).min(1 << 30);
            match splice(pipe, None, self.file.as_fd(), Some(&mut at), want, SpliceFFlags::SPLICE_F_MOVE) {
                Ok(0) => return Err(self.error("splice", io::ErrorKind::UnexpectedEof.into())),
                Ok(moved) => left -= moved as u64,
                Err(Errno::EINTR) => {}
                Err(Errno::EINVAL) => return self.copy_from(pipe, offset + (len - left), left),
                Err(errno) => return Err(self.error("splice", errno.into())),
            }
        }
        Ok(())
    }

    fn copy_from(&self, pipe: BorrowedFd<'_>, offset: u64, len: u64) -> Result<(), SyscallError> {
        let mut buffer = vec![0; usize::try_from(len).unwrap_or(usize::MAX).min(1 << 20)];
        let (mut at, end) = (offset, offset + len);
        while at < end {
            let want = usize::try_from(end - at).unwrap_or(usize::MAX).min(buffer.len());
            match nix::unistd::read(pipe, &mut buffer[..want]) {
                Ok(0) => return Err(self.error("read", io::ErrorKind::UnexpectedEof.into())),
                Ok(got) => {
                    self.write_at(at, &buffer[..got])?;
                    at += got as u64;
                }
                Err(Errno::EINTR) => {}
                Err(errno) => return Err(self.error("read", errno.into())),
            }
        }
        Ok(())
    }

    fn error(&self, call: &'static str, source: io::Error) -> SyscallError {
        SyscallError::new(call, self.object.clone(), source)
    }
}

impl AsFd for PagesFile {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    #[test]
    fn bytes_of_a_pipe_land_at_their_offset() {
        let file = tempfile::tempfile().unwrap();
        let pages = PagesFile::new(file.try_clone().unwrap(), "pages");
        let (reader, mut writer) = io::pipe().unwrap();
        let data: Vec<u8> = (0..8192u32).map(|i| (i % 251) as u8).collect();
        writer.write_all(&data).unwrap();
        pages.splice_from(reader.as_fd(), 4096, 5000).unwrap();
        pages.copy_from(reader.as_fd(), 4096 + 5000, 3192).unwrap();
        pages.write_at(0, &[7; 4096]).unwrap();
        let mut read = vec![0; 4096 + 8192];
        file.read_exact_at(&mut read, 0).unwrap();
        assert!(read[..4096].iter().all(|&b| b == 7));
        assert_eq!(&read[4096..], &data[..]);
    }

    #[test]
    fn a_pipe_that_ends_early_is_an_error() {
        let pages = PagesFile::new(tempfile::tempfile().unwrap(), "pages-1.img");
        let (reader, mut writer) = io::pipe().unwrap();
        writer.write_all(&[1; 100]).unwrap();
        drop(writer);
        let error = pages.splice_from(reader.as_fd(), 0, 4096).unwrap_err();
        assert_eq!((error.call, error.source.kind()), ("splice", io::ErrorKind::UnexpectedEof));
    }

    #[test]
    fn a_full_disk_is_named() {
        let full = File::options().write(true).open("/dev/full").unwrap();
        let error = PagesFile::new(full, "pages-1.img").write_at(0, &[0; 10]).unwrap_err();
        assert_eq!(error.errno(), Some(libc::ENOSPC));
        assert!(error.to_string().contains("pages-1.img"));
    }
}
