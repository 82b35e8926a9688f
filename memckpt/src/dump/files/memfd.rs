//! memfd_create(2): the descriptor here, the content with the other shared memory.

use std::path::Path;

use nix::fcntl::{FcntlArg, fcntl};
use nix::sys::stat::FileStat;

use crate::dump::error::DumpError;
use crate::image::proto::{FdTypes, FileEntry, FownEntry, MemfdFileEntry, MemfdInodeEntry};
use crate::kernel::SyscallError;
use crate::kernel::descriptor::Descriptor;
use crate::kernel::map_files::MappedObject;
use crate::kernel::maps::Vma;

use super::collector::{Collector, owner};
use super::path::Inode;
use super::refusal::{Place, refuse};

/// What the name of a memfd begins with; the file system that it is on is nowhere mounted.
const PREFIX: &str = "/memfd:";

impl Collector<'_> {
    /// Whether a regular file is a memfd.
    pub(super) fn is_memfd(found: &Descriptor) -> bool {
        libc::major(found.stat.st_dev) == 0
            && found.link.to_str().is_some_and(|link| link.starts_with(PREFIX))
    }

    pub(super) fn memfd(&mut self, found: &Descriptor, id: u32) -> Result<FileEntry, DumpError> {
        let source = format!("/proc/{}/fd/{}", found.pid, found.fd);
        let place = Place::Descriptor(found.fd);
        let inode_id = self.memfd_inode(found.pid, place, &found.link, &found.stat, source)?;
        let flags = found.info.file_flags();
        Ok(entry(MemfdFileEntry { id, flags, pos: found.info.pos, fown: owner(found)?, inode_id }))
    }

    /// The number of a memfd that is mapped: an opening of its own, for the one that it was mapped by may be closed.
    pub(super) fn mapped_memfd(
        &mut self,
        pid: i32,
        vma: &Vma,
        link: &Path,
        stat: &FileStat,
        source: String,
    ) -> Result<u32, DumpError> {
        let inode = Inode::of(stat);
        if let Some(id) = self.inodes.get(&inode) {
            return Ok(*id);
        }
        let place = Place::Mapping(vma.range.start.get());
        let inode_id = self.memfd_inode(pid, place, link, stat, source)?;
        let id = self.next_id();
        let flags = libc::O_RDWR as u32;
        self.out.files.push(entry(MemfdFileEntry {
            id,
            flags,
            pos: 0,
            fown: FownEntry::default(),
            inode_id,
        }));
        self.inodes.insert(inode, id);
        Ok(id)
    }

    /// The number of the object itself; its pages go to `pagemap-shmem-SHMID.img`.
    fn memfd_inode(
        &mut self,
        pid: i32,
        place: Place,
        link: &Path,
        stat: &FileStat,
        source: String,
    ) -> Result<u32, DumpError> {
        let inode_id = stat.st_ino as u32;
        if self.out.memfds.iter().any(|known| known.inode_id == u64::from(inode_id)) {
            return Ok(inode_id);
        }
        let link = link.to_string_lossy();
        let name = link.strip_prefix(PREFIX).unwrap_or(&link);
        let name = name.strip_suffix(" (deleted)").unwrap_or(name).to_owned();
        let object = MappedObject::open_path(source)?;
        if object.is_hugetlb()? {
            return Err(refuse(
                pid,
                place,
                "memfd of huge pages",
                "is not captured: close and unmap it first",
            ));
        }
        let seals = fcntl(&object, FcntlArg::F_GET_SEALS)
            .map_err(|e| SyscallError::new("fcntl(F_GET_SEALS)", object.path(), e))?;
        let shmid = self.shared.memfd(stat, object, self.images)?;
        self.out.memfds.push(MemfdInodeEntry {
            name,
            uid: stat.st_uid,
            gid: stat.st_gid,
            size: stat.st_size as u64,
            shmid,
            seals: seals as u32,
            inode_id: u64::from(inode_id),
            hugetlb_flag: None,
            mode: Some(stat.st_mode),
        });
        Ok(inode_id)
    }
}

fn entry(memfd: MemfdFileEntry) -> FileEntry {
    FileEntry { r#type: FdTypes::Memfd as i32, id: memfd.id, memfd: Some(memfd), ..FileEntry::default() }
}
