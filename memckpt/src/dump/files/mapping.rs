//! Files that are mapped: by `/proc/PID/map_files`, and so the right one, whatever has happened to its path.

use crate::dump::error::DumpError;
use crate::kernel::SyscallError;
use crate::kernel::maps::Vma;
use crate::plan::{SharedKind, VmaClass};

use super::Mapped;
use super::collector::Collector;
use super::directories::look;
use super::refusal::Place;

impl Collector<'_> {
    /// What `vma` maps, if that is a file.
    pub(super) fn mapping(
        &mut self,
        pid: i32,
        vma: &Vma,
        class: VmaClass,
    ) -> Result<Option<Mapped>, DumpError> {
        let of_file = match class {
            VmaClass::Private(_) => !vma.is_anonymous(),
            VmaClass::SharedFile | VmaClass::SharedAnon(SharedKind::Memfd) => true,
            _ => false,
        };
        if !of_file {
            return Ok(None);
        }
        let path = format!("/proc/{pid}/map_files/{:x}-{:x}", vma.range.start.get(), vma.range.end.get());
        let flags = opened_as(&path)?;
        let (link, stat) = look(&path)?;
        let place = Place::Mapping(vma.range.start.get());
        let id = if vma.is_memfd() {
            self.mapped_memfd(pid, vma, &link, &stat, path)?
        } else {
            self.without_descriptor(pid, place, &link, stat, path)?
        };
        Ok(Some(Mapped { id, flags }))
    }
}

/// How a mapped file was opened: the link's own permissions tell (proc_map_files_instantiate, fs/proc/base.c).
fn opened_as(path: &str) -> Result<u32, SyscallError> {
    let mode = nix::sys::stat::lstat(path).map_err(|e| SyscallError::new("lstat", path, e))?.st_mode;
    let flags = match (mode & libc::S_IRUSR != 0, mode & libc::S_IWUSR != 0) {
        (true, true) => libc::O_RDWR,
        (false, true) => libc::O_WRONLY,
        _ => libc::O_RDONLY,
    };
    Ok(flags as u32)
}
