//! One directory of a chain.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use prost::Message;

use crate::image::files;
use crate::image::magic::{self, ImageKind};
use crate::image::meta::{CheckpointMeta, META};
use crate::image::pagemap::PagemapImage;
use crate::image::proto::{
    CoreEntry, FdinfoEntry, FileEntry, FsEntry, GhostChunkEntry, GhostFileEntry, InventoryEntry,
    MemfdFileEntry, MemfdInodeEntry, MmEntry, PstreeEntry, StatsEntry, TaskKobjIdsEntry,
};
use crate::image::record::{self, RecordError, Records};

use super::ChainError;
use super::stored::StoredPages;

/// A file without a name.
#[derive(Clone, Debug, PartialEq)]
pub struct Ghost {
    /// What it is.
    pub entry: GhostFileEntry,
    /// What it holds, by offsets; the rest is holes.
    pub pieces: Vec<(u64, Vec<u8>)>,
}

/// One directory of a chain, open.
#[derive(Debug)]
pub struct Member {
    fd: OwnedFd,
    identity: (u64, u64),
    path: PathBuf,
    pid: i32,
    inventory: InventoryEntry,
    meta: Option<CheckpointMeta>,
    memory: StoredPages,
}

impl Member {
    pub(super) fn open(
        fd: OwnedFd,
        identity: (u64, u64),
        path: PathBuf,
        pid: Option<i32>,
    ) -> Result<Self, ChainError> {
        let read = |file: &str| files::read_file(&fd, file).map_err(|source| read_error(&path, file, source));
        let damaged = |source| ChainError::Damaged { path: path.clone(), source };
        let Some(bytes) = read(magic::INVENTORY)? else {
            return Err(ChainError::Incomplete(path));
        };
        let inventory = record::single(magic::INVENTORY, ImageKind::Inventory, &bytes).map_err(damaged)?;
        let meta = match read(META)? {
            Some(bytes) => Some(
                CheckpointMeta::decode(&bytes)
                    .map_err(|source| ChainError::Meta { path: path.clone(), source })?,
            ),
            None => None,
        };
        let pid = match pid {
            Some(pid) => pid,
            None => root_pid(&fd, &path, meta.as_ref())?,
        };
        // A process that was not there yet when the parent was made has no pagemap in it.
        let memory = StoredPages::open(&fd, &path, &magic::pagemap_name(pid))?
            .unwrap_or_else(|| StoredPages::none(&path));
        Ok(Self { fd, identity, path, pid, inventory, meta, memory })
    }

    /// Device and inode of the directory.
    #[must_use]
    pub fn identity(&self) -> (u64, u64) {
        self.identity
    }

    /// The path that it was reached by.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Its inventory.
    #[must_use]
    pub fn inventory(&self) -> &InventoryEntry {
        &self.inventory
    }

    /// Its `memckpt.json`; `None` for a checkpoint that CRIU made.
    #[must_use]
    pub fn meta(&self) -> Option<&CheckpointMeta> {
        self.meta.as_ref()
    }

    /// The process's pagemap: what is here, and what is left to the parent.
    #[must_use]
    pub fn pagemap(&self) -> &PagemapImage {
        self.memory.pagemap()
    }

    /// The processes; empty for a pre-dump that has none.
    ///
    /// # Errors
    /// `pstree.img` is unreadable or damaged.
    pub fn tree(&self) -> Result<Vec<PstreeEntry>, ChainError> {
        read_tree(&self.fd, &self.path)
    }

    /// The address space of the process, if it is recorded.
    ///
    /// # Errors
    /// `mm-PID.img` is unreadable or damaged.
    pub fn mm(&self) -> Result<Option<MmEntry>, ChainError> {
        self.single(&magic::mm_name(self.pid), ImageKind::Mm)
    }

    /// Thread `tid`, if it is recorded.
    ///
    /// # Errors
    /// `core-TID.img` is unreadable or damaged.
    pub fn core(&self, tid: i32) -> Result<Option<CoreEntry>, ChainError> {
        self.single(&magic::core_name(tid), ImageKind::Core)
    }

    /// Which kernel objects process `pid` shares with others, if it is recorded.
    ///
    /// # Errors
    /// `ids-PID.img` is unreadable or damaged.
    pub fn ids(&self, pid: i32) -> Result<Option<TaskKobjIdsEntry>, ChainError> {
        self.single(&magic::ids_name(pid), ImageKind::Ids)
    }

    /// Working directory, root and umask of process `pid`, if they are recorded.
    ///
    /// # Errors
    /// `fs-PID.img` is unreadable or damaged.
    pub fn fs(&self, pid: i32) -> Result<Option<FsEntry>, ChainError> {
        self.single(&magic::fs_name(pid), ImageKind::Fs)
    }

    /// The descriptors of table `files_id`; none where there is no such table.
    ///
    /// # Errors
    /// `fdinfo-ID.img` is unreadable or damaged.
    pub fn descriptors(&self, files_id: u32) -> Result<Vec<FdinfoEntry>, ChainError> {
        self.records(&magic::fdinfo_name(files_id), ImageKind::Fdinfo)
    }

    /// The open files.
    ///
    /// # Errors
    /// `files.img` is unreadable or damaged.
    pub fn files(&self) -> Result<Vec<FileEntry>, ChainError> {
        self.records(magic::FILES, ImageKind::Files)
    }

    /// All records of image `name`; none where there is no such file.
    ///
    /// # Errors
    /// It is unreadable or damaged.
    pub fn records<M: Message + Default>(&self, name: &str, kind: ImageKind) -> Result<Vec<M>, ChainError> {
        several(&self.fd, &self.path, name, kind)
    }

    /// All records of image `name`, each with the bytes that follow it, as many as `len` says; none where there is no such file.
    ///
    /// # Errors
    /// It is unreadable or damaged, or the bytes are cut off.
    pub fn with_bytes<M: Message + Default>(
        &self,
        name: &str,
        kind: ImageKind,
        len: impl Fn(&M) -> u64,
    ) -> Result<Vec<(M, Vec<u8>)>, ChainError> {
        let Some(bytes) = self.file(name)? else {
            return Ok(Vec::new());
        };
        let read = || {
            let mut records = Records::open(name, kind, &bytes)?;
            let mut all = Vec::new();
            while let Some(record) = records.next_record::<M>()? {
                let content = records.raw(len(&record))?.to_vec();
                all.push((record, content));
            }
            Ok(all)
        };
        read().map_err(|source| ChainError::Damaged { path: self.path.clone(), source })
    }

    /// A file without a name, and what it holds; absent where there is no image `name`.
    ///
    /// # Errors
    /// It is unreadable or damaged.
    pub fn ghost(&self, name: &str) -> Result<Option<Ghost>, ChainError> {
        let Some(bytes) = self.file(name)? else { return Ok(None) };
        let read = || {
            let mut records = Records::open(name, ImageKind::GhostFile, &bytes)?;
            let entry: GhostFileEntry = records.expect()?;
            let mut pieces = Vec::new();
            if entry.chunks.unwrap_or(false) {
                // CRIU's form of a file with holes.
                while let Some(chunk) = records.next_record::<GhostChunkEntry>()? {
                    pieces.push((chunk.off, records.raw(chunk.len)?.to_vec()));
                }
            } else {
                pieces.push((0, records.everything().to_vec()));
            }
            Ok(Ghost { entry, pieces })
        };
        read().map(Some).map_err(|source| ChainError::Damaged { path: self.path.clone(), source })
    }

    /// An error about what record `record` of file `file` says.
    pub fn damaged(&self, file: &str, record: usize, reason: impl Into<String>) -> ChainError {
        let source = RecordError::Content { file: file.to_owned(), record, reason: reason.into() };
        ChainError::Damaged { path: self.path.clone(), source }
    }

    /// `stats-dump`, if there is one.
    ///
    /// # Errors
    /// It is unreadable or damaged.
    pub fn stats(&self) -> Result<Option<StatsEntry>, ChainError> {
        self.single(magic::STATS_DUMP, ImageKind::Stats)
    }

    /// The content of file `name`, which has records or is ours; `None` where there is no such file.
    pub(super) fn file(&self, name: &str) -> Result<Option<Vec<u8>>, ChainError> {
        files::read_file(&self.fd, name).map_err(|source| read_error(&self.path, name, source))
    }

    /// The pages of the process.
    pub(super) fn memory(&self) -> &StoredPages {
        &self.memory
    }

    pub(super) fn pid(&self) -> i32 {
        self.pid
    }

    pub(super) fn read(&self, offset: u64, buffer: &mut [u8]) -> Result<(), ChainError> {
        self.memory.read(offset, buffer)
    }

    /// The content of shared object `id`, by offset; `None` where there is no such object.
    ///
    /// # Errors
    /// Its images are unreadable or damaged.
    pub fn shared(&self, id: u32) -> Result<Option<StoredPages>, ChainError> {
        self.stored(&magic::pagemap_shmem_name(id))
    }

    /// The pages of pagemap image `name`; `None` where there is no such image.
    pub(super) fn stored(&self, name: &str) -> Result<Option<StoredPages>, ChainError> {
        StoredPages::open(&self.fd, &self.path, name)
    }

    /// The shared object of each opened file that is a memfd, by the file's number.
    ///
    /// # Errors
    /// `files.img` or `memfd.img` is unreadable or damaged.
    pub fn memfds(&self) -> Result<BTreeMap<u32, u32>, ChainError> {
        let files = self.files()?;
        let inodes: Vec<MemfdInodeEntry> = self.records(magic::MEMFD, ImageKind::MemfdInode)?;
        let openings = files.into_iter().filter_map(|file| file.memfd);
        let object = |opening: MemfdFileEntry| {
            let inode = inodes.iter().find(|inode| inode.inode_id == u64::from(opening.inode_id))?;
            Some((opening.id, inode.shmid))
        };
        Ok(openings.filter_map(object).collect())
    }

    fn single<M: Message + Default>(&self, name: &str, kind: ImageKind) -> Result<Option<M>, ChainError> {
        self.file(name)?
            .map(|bytes| record::single(name, kind, &bytes))
            .transpose()
            .map_err(|source| ChainError::Damaged { path: self.path.clone(), source })
    }
}

pub(super) fn read_error(path: &Path, file: &str, source: io::Error) -> ChainError {
    ChainError::Read { path: path.to_owned(), file: file.to_owned(), source }
}

fn read_tree(fd: &OwnedFd, path: &Path) -> Result<Vec<PstreeEntry>, ChainError> {
    several(fd, path, magic::PSTREE, ImageKind::Pstree)
}

/// All records of image `name`; none where there is no such file.
fn several<M: Message + Default>(
    fd: &OwnedFd,
    path: &Path,
    name: &str,
    kind: ImageKind,
) -> Result<Vec<M>, ChainError> {
    let Some(bytes) = files::read_file(fd, name).map_err(|source| read_error(path, name, source))? else {
        return Ok(Vec::new());
    };
    Records::open(name, kind, &bytes)
        .and_then(|mut records| records.rest())
        .map_err(|source| ChainError::Damaged { path: path.to_owned(), source })
}

/// The root of the tree; without one, as in CRIU's pre-dumps, the only process with a pagemap.
fn root_pid(fd: &OwnedFd, path: &Path, meta: Option<&CheckpointMeta>) -> Result<i32, ChainError> {
    if let Some(root) = read_tree(fd, path)?.first() {
        return i32::try_from(root.pid).map_err(|_| ChainError::Damaged {
            path: path.to_owned(),
            source: RecordError::Content {
                file: magic::PSTREE.to_owned(),
                record: 0,
                reason: format!("{} is no PID", root.pid),
            },
        });
    }
    if let Some(meta) = meta {
        return Ok(meta.target.pid);
    }
    let names = files::names(fd).map_err(|errno| read_error(path, ".", errno.into()))?;
    let pids: Vec<i32> = names
        .iter()
        .filter_map(|name| name.to_str()?.strip_prefix("pagemap-")?.strip_suffix(".img")?.parse().ok())
        .collect();
    match pids[..] {
        [pid] => Ok(pid),
        _ => Err(ChainError::WhichProcess { path: path.to_owned(), pids }),
    }
}
