//! Files that have a path, or had one: regular files, directories, device nodes.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::Path;

use nix::sys::stat::FileStat;

use crate::dump::error::DumpError;
use crate::image::proto::{
    FdTypes, FileEntry, FownEntry, GhostFileEntry, RegFileEntry, RemapFilePathEntry, RemapType, Timeval,
};
use crate::kernel::SyscallError;
use crate::kernel::descriptor::Descriptor;

use super::collector::{Collector, owner};
use super::refusal::{Place, refuse, refuse_descriptor};

/// What d_path() appends to the path of a file that has lost that name (fs/d_path.c).
const DELETED: &str = " (deleted)";

/// Which file: device and inode number, as stat(2) tells them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Inode {
    pub(super) dev: u64,
    pub(super) ino: u64,
}

impl Inode {
    pub(super) const fn of(stat: &FileStat) -> Self {
        Self { dev: stat.st_dev, ino: stat.st_ino }
    }
}

/// How a file can be found again.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Whereabouts {
    /// By this path.
    Path(String),
    /// By none: it was deleted; this was its path.
    Deleted(String),
    /// It has a name, but not the one that it was opened by.
    Elsewhere,
    /// Its path is no UTF-8; CRIU's `name` is a string.
    NotText,
}

/// A file with all that its image entry says.
pub(super) struct PathFile<'a> {
    pub(super) pid: i32,
    pub(super) place: Place,
    pub(super) link: &'a Path,
    pub(super) stat: FileStat,
    /// Where its content can be read, should it be a ghost: a path in /proc.
    pub(super) source: String,
    pub(super) flags: u32,
    pub(super) pos: u64,
    pub(super) owner: FownEntry,
}

impl Collector<'_> {
    /// A regular file or directory behind a descriptor.
    pub(super) fn path_file(&mut self, found: &Descriptor, id: u32) -> Result<FileEntry, DumpError> {
        let file = PathFile {
            pid: found.pid,
            place: Place::Descriptor(found.fd),
            link: &found.link,
            stat: found.stat,
            source: format!("/proc/self/fd/{}", found.as_raw_fd()),
            flags: found.info.file_flags(),
            pos: found.info.pos,
            owner: owner(found)?,
        };
        self.regular(id, file)
    }

    /// A device that is the same for everybody, or a terminal.
    pub(super) fn character_device(&mut self, found: &Descriptor, id: u32) -> Result<FileEntry, DumpError> {
        let (major, minor) = (libc::major(found.stat.st_rdev), libc::minor(found.stat.st_rdev));
        match (major, minor) {
            // Documentation/admin-guide/devices.txt: null, zero, full, random, urandom.
            (1, 3 | 5 | 7 | 8 | 9) => self.path_file(found, id),
            // Virtual consoles and serial lines; /dev/tty, /dev/console, /dev/ptmx; Unix98 pseudoterminals.
            (4 | 5 | 136..=143, _) => self.terminal(found, id),
            _ => Err(refuse_descriptor(
                found,
                format!("device {major}:{minor}"),
                "has a state that only its driver knows: close it first",
            )),
        }
    }

    /// The entry of a file that has, or had, a path.
    pub(super) fn regular(&mut self, id: u32, file: PathFile<'_>) -> Result<FileEntry, DumpError> {
        let kind = kind_of(file.stat.st_mode);
        let refused =
            |reason: String| refuse(file.pid, file.place, format!("{kind} {}", file.link.display()), reason);
        let name = match whereabouts(file.link, &file.stat, |path| nix::sys::stat::stat(path).ok()) {
            Whereabouts::Path(path) => path,
            Whereabouts::Deleted(path) if kind == "file" => {
                self.ghost(id, &file, &refused)?;
                path
            }
            Whereabouts::Deleted(_) => {
                return Err(refused("was deleted: it cannot be made again as it was".into()));
            }
            Whereabouts::Elsewhere => {
                return Err(refused(
                    "is not found by that path any more: it was renamed, replaced or mounted over. Put it back, or close it".into(),
                ));
            }
            Whereabouts::NotText => {
                return Err(refused(
                    "has a path that is not UTF-8, which the image format cannot hold".into(),
                ));
            }
        };
        let regular = file.stat.st_mode & libc::S_IFMT == libc::S_IFREG;
        let appended = file.flags & (libc::O_APPEND | libc::O_ACCMODE) as u32
            == (libc::O_APPEND | libc::O_WRONLY) as u32;
        let reg = RegFileEntry {
            id,
            flags: file.flags,
            pos: file.pos,
            fown: file.owner,
            name,
            // CRIU refuses to restore on top of a file that is not as long as it was. A log may grow.
            size: (regular && !appended).then_some(file.stat.st_size as u64),
            mode: Some(file.stat.st_mode),
            ..RegFileEntry::default()
        };
        Ok(FileEntry { r#type: FdTypes::Reg as i32, id, reg: Some(reg), ..FileEntry::default() })
    }

    /// Keeps the content of a file without a name, once however often it is open.
    fn ghost(
        &mut self,
        id: u32,
        file: &PathFile<'_>,
        refused: &impl Fn(String) -> DumpError,
    ) -> Result<(), DumpError> {
        let inode = Inode::of(&file.stat);
        let ghost = match self.ghosts.get(&inode) {
            Some(ghost) => *ghost,
            None => {
                let size = file.stat.st_size as u64;
                let limit = self.options.ghost_limit;
                if size > limit {
                    return Err(refused(format!(
                        "was deleted and holds {size} bytes, more than --ghost-limit ({limit}) allows to keep: give a larger one"
                    )));
                }
                let bytes = content(&file.source, size)?;
                let ghost = self.out.ghosts.len() as u32 + 1;
                self.out.ghosts.push((ghost, ghost_entry(&file.stat), bytes));
                self.ghosts.insert(inode, ghost);
                ghost
            }
        };
        self.out.remaps.push(RemapFilePathEntry {
            orig_id: id,
            remap_id: ghost,
            remap_type: Some(RemapType::Ghost as i32),
        });
        Ok(())
    }
}

/// What messages call a file of `mode`.
fn kind_of(mode: u32) -> &'static str {
    match mode & libc::S_IFMT {
        libc::S_IFDIR => "directory",
        libc::S_IFIFO => "FIFO",
        libc::S_IFCHR => "device",
        _ => "file",
    }
}

/// How the file that `link` and `stat` tell of can be found; `lookup` stats a path.
fn whereabouts(link: &Path, stat: &FileStat, lookup: impl Fn(&Path) -> Option<FileStat>) -> Whereabouts {
    let Some(text) = link.to_str() else { return Whereabouts::NotText };
    let there = |path: &str| lookup(Path::new(path)).is_some_and(|s| Inode::of(&s) == Inode::of(stat));
    // A file may really be called `x (deleted)`.
    if there(text) {
        return Whereabouts::Path(text.to_owned());
    }
    match text.strip_suffix(DELETED) {
        Some(path) if stat.st_nlink == 0 || stat.st_mode & libc::S_IFMT == libc::S_IFDIR => {
            Whereabouts::Deleted(path.to_owned())
        }
        // Deleted, and another file put there that is a link to the same one.
        Some(path) if there(path) => Whereabouts::Path(path.to_owned()),
        _ => Whereabouts::Elsewhere,
    }
}

fn ghost_entry(stat: &FileStat) -> GhostFileEntry {
    let time =
        |seconds: i64, nanos: i64| Some(Timeval { tv_sec: seconds as u64, tv_usec: nanos as u64 / 1000 });
    GhostFileEntry {
        uid: stat.st_uid,
        gid: stat.st_gid,
        mode: stat.st_mode,
        // The kernel's own encoding: major number << 20 | minor number.
        dev: Some(((libc::major(stat.st_dev)) << 20) | libc::minor(stat.st_dev)),
        ino: Some(stat.st_ino),
        atim: time(stat.st_atime, stat.st_atime_nsec),
        mtim: time(stat.st_mtime, stat.st_mtime_nsec),
        ..GhostFileEntry::default()
    }
}

/// The whole content of a file, through an opening of our own: that of the target may be for writing only.
fn content(source: &str, size: u64) -> Result<Vec<u8>, SyscallError> {
    let file = File::open(source).map_err(|e| SyscallError::new("open", source, e))?;
    let mut bytes = vec![0; usize::try_from(size).unwrap_or(usize::MAX)];
    let mut at = 0;
    while at < bytes.len() {
        match file.read_at(&mut bytes[at..], at as u64) {
            Ok(0) => break,
            Ok(n) => at += n,
            Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
            Err(e) => return Err(SyscallError::new("pread", source, e)),
        }
    }
    bytes.truncate(at);
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use std::os::unix::ffi::OsStrExt;

    use super::*;

    fn stat(ino: u64, nlink: u64, mode: u32) -> FileStat {
        let mut stat = nix::sys::stat::stat("/").unwrap();
        (stat.st_ino, stat.st_nlink, stat.st_mode) = (ino, nlink, mode);
        stat
    }

    #[test]
    fn a_file_is_found_by_its_path_or_is_a_ghost_or_is_elsewhere() {
        let of = |link: &str, stat: &FileStat, there: Option<(&str, FileStat)>| {
            whereabouts(Path::new(link), stat, |path| {
                there.filter(|(name, _)| path == Path::new(name)).map(|(_, s)| s)
            })
        };
        let file = stat(7, 1, libc::S_IFREG);
        let deleted = stat(7, 0, libc::S_IFREG);
        let other = stat(8, 1, libc::S_IFREG);
        assert_eq!(of("/a", &file, Some(("/a", file))), Whereabouts::Path("/a".into()));
        assert_eq!(of("/a", &file, Some(("/a", other))), Whereabouts::Elsewhere);
        assert_eq!(of("/a", &file, None), Whereabouts::Elsewhere);
        assert_eq!(of("/a (deleted)", &deleted, None), Whereabouts::Deleted("/a".into()));
        assert_eq!(of("/a (deleted)", &deleted, Some(("/a", other))), Whereabouts::Deleted("/a".into()));
        assert_eq!(of("/a (deleted)", &file, None), Whereabouts::Elsewhere, "it has another name");
        let named = Some(("/a (deleted)", file));
        assert_eq!(of("/a (deleted)", &file, named), Whereabouts::Path("/a (deleted)".into()));
        let bytes = Path::new(std::ffi::OsStr::from_bytes(b"/\xff"));
        assert_eq!(whereabouts(bytes, &file, |_| Some(file)), Whereabouts::NotText);
    }
}
