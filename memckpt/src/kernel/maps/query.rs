//! An open `/proc/PID/maps`, and the PROCMAP_QUERY ioctl on it.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;

use super::{MapsError, Prot, Vma, parse};
use crate::addr::{Addr, AddrRange};
use crate::kernel::SyscallError;

/// `struct procmap_query` of linux/fs.h (Linux 6.11).
#[repr(C)]
#[derive(Default)]
struct ProcmapQuery {
    size: u64,
    query_flags: u64,
    query_addr: u64,
    vma_start: u64,
    vma_end: u64,
    vma_flags: u64,
    vma_page_size: u64,
    vma_offset: u64,
    inode: u64,
    dev_major: u32,
    dev_minor: u32,
    vma_name_size: u32,
    build_id_size: u32,
    vma_name_addr: u64,
    build_id_addr: u64,
}

/// `_IOWR('f', 17, struct procmap_query)`
const PROCMAP_QUERY: libc::c_ulong = 0xc068_6611;
const VMA_READABLE: u64 = 1;
const VMA_WRITABLE: u64 = 2;
const VMA_EXECUTABLE: u64 = 4;
const VMA_SHARED: u64 = 8;
const COVERING_OR_NEXT_VMA: u64 = 0x10;
/// do_procmap_query() gives names up to PATH_MAX.
const NAME_MAX: usize = 4096;
/// maps ends with the gate area, which is no VMA: PROCMAP_QUERY does not know it.
const GATE_AREA: Addr = Addr(0xffff_ffff_ff60_0000);

/// An open `/proc/PID/maps`.
///
/// It stays with the address space that the process had when it was opened: after an exec it reads [`MapsError::Gone`].
#[derive(Debug)]
pub struct MapsFile {
    pid: i32,
    file: File,
    can_query: bool,
}

impl MapsFile {
    /// Opens the maps of `pid` and finds out whether the kernel has PROCMAP_QUERY (Linux 6.11).
    ///
    /// # Errors
    /// The open failed: no such process, or too few rights.
    pub fn open(pid: i32) -> Result<Self, MapsError> {
        let path = format!("/proc/{pid}/maps");
        let file = File::open(&path).map_err(|e| SyscallError::new("open", path, e))?;
        let mut maps = Self { pid, file, can_query: true };
        if let Err(MapsError::Syscall(e)) = maps.covering_or_next(Addr(0)) {
            maps.can_query = !matches!(e.errno(), Some(libc::ENOTTY | libc::EINVAL));
        }
        Ok(maps)
    }

    /// Whether [`Self::query`] asks for single VMAs rather than reading everything.
    #[must_use]
    pub fn can_query(&self) -> bool {
        self.can_query
    }

    /// Reads the whole layout, as [`super::read`] does.
    ///
    /// # Errors
    /// As [`super::read`].
    pub fn read(&self) -> Result<Vec<Vma>, MapsError> {
        let mut text = Vec::new();
        let mut len = 0;
        loop {
            if text.len() - len < 64 << 10 {
                text.resize((text.len() * 2).max(256 << 10), 0);
            }
            match self.file.read_at(&mut text[len..], len as u64) {
                Ok(0) => break,
                Ok(n) => len += n,
                Err(e) if e.raw_os_error() == Some(libc::EINTR) => {}
                Err(e) if e.raw_os_error() == Some(libc::ESRCH) => {
                    return Err(MapsError::Gone { pid: self.pid });
                }
                Err(e) => return Err(SyscallError::new("pread", self.path(), e).into()),
            }
        }
        if len == 0 {
            return Err(MapsError::Gone { pid: self.pid });
        }
        parse(&text[..len])
    }

    /// The VMAs that share an address with `range`, whole, in order; the same values that [`Self::read`] gives.
    ///
    /// # Errors
    /// As [`Self::read`].
    pub fn query(&self, range: AddrRange) -> Result<Vec<Vma>, MapsError> {
        if self.can_query && range.end <= GATE_AREA {
            match self.query_each(range) {
                Ok(Some(vmas)) => return Ok(vmas),
                Ok(None) => {}
                // A path longer than PATH_MAX: only maps itself prints those.
                Err(MapsError::Syscall(e)) if e.errno() == Some(libc::ENAMETOOLONG) => {}
                Err(e) => return Err(e),
            }
        }
        let mut vmas = self.read()?;
        vmas.retain(|vma| vma.range.overlaps(range));
        Ok(vmas)
    }

    /// `None` when the layout moved under the queries.
    fn query_each(&self, range: AddrRange) -> Result<Option<Vec<Vma>>, MapsError> {
        let mut vmas: Vec<Vma> = Vec::new();
        let mut at = range.start;
        while at < range.end {
            let Some(vma) = self.covering_or_next(at)? else { break };
            if vma.range.start >= range.end {
                break;
            }
            if vmas.last().is_some_and(|last| vma.range.start < last.range.end) {
                return Ok(None);
            }
            at = vma.range.end;
            vmas.push(vma);
        }
        Ok(Some(vmas))
    }

    fn covering_or_next(&self, addr: Addr) -> Result<Option<Vma>, MapsError> {
        let mut name = [0u8; NAME_MAX];
        let mut query = ProcmapQuery {
            size: size_of::<ProcmapQuery>() as u64,
            query_flags: COVERING_OR_NEXT_VMA,
            query_addr: addr.get(),
            vma_name_size: NAME_MAX as u32,
            vma_name_addr: name.as_mut_ptr() as u64,
            ..ProcmapQuery::default()
        };
        // SAFETY: the kernel reads and writes `size` bytes of `query` and at most `vma_name_size` bytes of `name`;
        // both outlive the call.
        let result = unsafe { libc::ioctl(self.file.as_raw_fd(), PROCMAP_QUERY, &raw mut query) };
        if result < 0 {
            let error = SyscallError::last("ioctl(PROCMAP_QUERY)", self.path());
            return match error.errno() {
                Some(libc::ENOENT) => Ok(None),
                Some(libc::ESRCH) => Err(MapsError::Gone { pid: self.pid }),
                _ => Err(error.into()),
            };
        }
        // The size counts the terminating NUL, and is 0 without a name.
        let name = name.get(..(query.vma_name_size as usize).saturating_sub(1)).unwrap_or_default();
        let mut prot = Prot::empty();
        prot.set(Prot::READ, query.vma_flags & VMA_READABLE != 0);
        prot.set(Prot::WRITE, query.vma_flags & VMA_WRITABLE != 0);
        prot.set(Prot::EXEC, query.vma_flags & VMA_EXECUTABLE != 0);
        Ok(Some(Vma {
            range: AddrRange::new(query.vma_start, query.vma_end),
            prot,
            shared: query.vma_flags & VMA_SHARED != 0,
            offset: query.vma_offset,
            dev: (query.dev_major, query.dev_minor),
            inode: query.inode,
            name: as_maps_prints(name),
        }))
    }

    fn path(&self) -> String {
        format!("/proc/{}/maps", self.pid)
    }
}

/// maps escapes newlines (seq_path in show_map_vma); PROCMAP_QUERY gives the bytes as they are.
fn as_maps_prints(name: &[u8]) -> String {
    let name = String::from_utf8_lossy(name);
    if name.contains('\n') { name.replace('\n', "\\012") } else { name.into_owned() }
}

#[cfg(test)]
mod tests {
    use std::os::fd::OwnedFd;

    use super::*;
    use crate::kernel::puppet::{Puppet, skip};

    #[test]
    fn the_ioctl_number_fits_the_struct() {
        assert_eq!(size_of::<ProcmapQuery>(), 104);
        assert_eq!(PROCMAP_QUERY >> 16 & 0x3fff, 104);
    }

    #[test]
    fn a_query_gives_what_maps_prints() {
        let puppet = Puppet::start().unwrap();
        let dir = tempfile::tempdir().unwrap();
        for name in ["with space", "new\nline", "back\\slash", "trailing ", "gone (deleted)", "gone"] {
            let path = dir.path().join(name);
            std::fs::write(&path, [1; 8192]).unwrap();
            let file: OwnedFd = File::open(&path).unwrap().into();
            puppet.map_file(&path, 8192).unwrap();
            drop(file);
            if name.starts_with("gone") {
                std::fs::remove_file(&path).unwrap();
            }
        }
        let anonymous = puppet.map(16 << 12).unwrap();
        puppet.syscall(libc::SYS_mprotect, &[anonymous.start.get() + 8192, 4096, 0]).unwrap();
        // PR_SET_VMA, PR_SET_VMA_ANON_NAME: Linux 5.17, where configured.
        let label = puppet.place(b"a label\0").unwrap();
        let _ = puppet.syscall(libc::SYS_prctl, &[0x5356_4d41, 0, anonymous.start.get(), 8192, label.get()]);
        let maps = MapsFile::open(puppet.pid()).unwrap();
        if !maps.can_query() {
            return skip("a_query_gives_what_maps_prints", "no PROCMAP_QUERY (Linux 6.11)");
        }
        let all = maps.read().unwrap();
        assert_eq!(all, super::super::read(puppet.pid()).unwrap());
        let below_gate: Vec<Vma> = all.iter().filter(|v| v.range.end <= GATE_AREA).cloned().collect();
        assert!(below_gate.iter().any(|v| v.name.ends_with("new\\012line")));
        assert!(below_gate.iter().any(|v| v.name.ends_with("/gone (deleted)")));
        assert_eq!(maps.query(AddrRange { start: Addr(0), end: GATE_AREA }).unwrap(), below_gate);
        assert_eq!(maps.query(AddrRange::new(0, u64::MAX)).unwrap(), all);
        for vma in &below_gate {
            assert_eq!(maps.query(vma.range).unwrap(), std::slice::from_ref(vma));
            let first_page = AddrRange::with_len(vma.range.start, 4096);
            assert_eq!(maps.query(first_page).unwrap(), std::slice::from_ref(vma));
        }
    }

    #[test]
    fn the_address_space_of_a_dead_process_is_gone() {
        let puppet = Puppet::start().unwrap();
        let maps = MapsFile::open(puppet.pid()).unwrap();
        drop(puppet);
        assert!(matches!(maps.read(), Err(MapsError::Gone { .. })), "{:?}", maps.read());
        let low = AddrRange::new(0, 1 << 47);
        assert!(matches!(maps.query(low), Err(MapsError::Gone { .. })), "{:?}", maps.query(low));
    }
}
