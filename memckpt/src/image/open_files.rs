//! `files.img` and the images beside it: open files, who has them, and what they hold.

use prost::Message;

use super::dir::{DirError, ImagesDir};
use super::magic::{
    FIFO_DATA, FILE_LOCKS, FILES, ImageKind, MEMFD, PIPES_DATA, REMAP_FPATH, SK_QUEUES, TTY_INFO,
    fdinfo_name, fs_name, ghost_name, ids_name, tcp_stream_name,
};
use super::proto::{
    FdinfoEntry, FileEntry, FileLockEntry, FsEntry, GhostFileEntry, MemfdInodeEntry, PipeDataEntry,
    RemapFilePathEntry, SkPacketEntry, TaskKobjIdsEntry, TcpStreamEntry, TtyInfoEntry,
};
use super::record::Image;

/// The open files of a tree.
#[derive(Clone, Debug, Default)]
pub struct OpenFiles {
    /// Each open file once, however many descriptors mean it.
    pub files: Vec<FileEntry>,
    /// The tables of descriptors, by their `files_id`.
    pub descriptors: Vec<(u32, Vec<FdinfoEntry>)>,
    /// Each process's working directory, root and umask.
    pub directories: Vec<(i32, FsEntry)>,
    /// Each process's kernel objects.
    pub ids: Vec<(i32, TaskKobjIdsEntry)>,
    /// Files without a name, by number, and what they hold.
    pub ghosts: Vec<(u32, GhostFileEntry, Vec<u8>)>,
    /// Which file is found at another place than its path.
    pub remaps: Vec<RemapFilePathEntry>,
    /// Pipes and what is in them.
    pub pipes: Vec<(PipeDataEntry, Vec<u8>)>,
    /// FIFOs and what is in them.
    pub fifos: Vec<(PipeDataEntry, Vec<u8>)>,
    /// memfds.
    pub memfds: Vec<MemfdInodeEntry>,
    /// What waits in sockets, oldest first.
    pub packets: Vec<(SkPacketEntry, Vec<u8>)>,
    /// Connections by inode, and what waits in their two queues.
    pub streams: Vec<(u32, TcpStreamEntry, Vec<u8>)>,
    /// Terminals.
    pub terminals: Vec<TtyInfoEntry>,
    /// Locks.
    pub locks: Vec<FileLockEntry>,
}

impl OpenFiles {
    /// Writes all images that have anything to hold; `files.img` always.
    ///
    /// # Errors
    /// As [`ImagesDir::write`].
    pub fn write(&self, images: &mut ImagesDir) -> Result<(), DirError> {
        images.write(FILES, &Image::of(ImageKind::Files, &self.files).into_bytes())?;
        for (id, table) in &self.descriptors {
            images.write(&fdinfo_name(*id), &Image::of(ImageKind::Fdinfo, table).into_bytes())?;
        }
        for (pid, directories) in &self.directories {
            images.write(&fs_name(*pid), &Image::of(ImageKind::Fs, [directories]).into_bytes())?;
        }
        for (pid, ids) in &self.ids {
            images.write(&ids_name(*pid), &Image::of(ImageKind::Ids, [ids]).into_bytes())?;
        }
        for (id, entry, bytes) in &self.ghosts {
            let mut image = Image::of(ImageKind::GhostFile, [entry]);
            image.push_raw(bytes);
            images.write(&ghost_name(*id), &image.into_bytes())?;
        }
        for (inode, entry, bytes) in &self.streams {
            let mut image = Image::of(ImageKind::TcpStream, [entry]);
            image.push_raw(bytes);
            images.write(&tcp_stream_name(*inode), &image.into_bytes())?;
        }
        records(images, REMAP_FPATH, ImageKind::RemapFpath, &self.remaps)?;
        records(images, MEMFD, ImageKind::MemfdInode, &self.memfds)?;
        records(images, TTY_INFO, ImageKind::TtyInfo, &self.terminals)?;
        records(images, FILE_LOCKS, ImageKind::FileLocks, &self.locks)?;
        with_bytes(images, PIPES_DATA, ImageKind::PipesData, &self.pipes)?;
        with_bytes(images, FIFO_DATA, ImageKind::FifoData, &self.fifos)?;
        with_bytes(images, SK_QUEUES, ImageKind::SkQueues, &self.packets)
    }
}

fn records<M: Message>(
    images: &mut ImagesDir,
    name: &str,
    kind: ImageKind,
    records: &[M],
) -> Result<(), DirError> {
    if records.is_empty() {
        return Ok(());
    }
    images.write(name, &Image::of(kind, records).into_bytes())
}

fn with_bytes<M: Message>(
    images: &mut ImagesDir,
    name: &str,
    kind: ImageKind,
    records: &[(M, Vec<u8>)],
) -> Result<(), DirError> {
    if records.is_empty() {
        return Ok(());
    }
    let mut image = Image::new(kind);
    for (record, bytes) in records {
        image.push(record);
        image.push_raw(bytes);
    }
    images.write(name, &image.into_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A pipe with two bytes: magic, length, three fields, the bytes.
    #[test]
    fn bytes_follow_their_record() {
        let tmp = tempfile::tempdir().unwrap();
        let mut images = ImagesDir::open(tmp.path()).unwrap();
        let pipe = PipeDataEntry { pipe_id: 5, bytes: 2, size: Some(64) };
        let open = OpenFiles { pipes: vec![(pipe, b"ab".to_vec())], ..OpenFiles::default() };
        open.write(&mut images).unwrap();
        let mut names: Vec<_> = std::fs::read_dir(tmp.path())
            .unwrap()
            .map(|e| e.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        assert_eq!(names, [FILES, PIPES_DATA], "nothing to hold, no image");
        let written = std::fs::read(tmp.path().join(PIPES_DATA)).unwrap();
        assert_eq!(written[..8], [0x19, 0x43, 0x56, 0x54, 0x09, 0x37, 0x45, 0x56]);
        assert_eq!(written[8..], [6, 0, 0, 0, 0x08, 5, 0x10, 2, 0x18, 64, b'a', b'b']);
    }
}
