//! The directory that a checkpoint is written into: whole, or visibly not.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Component, Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, AtFlags, OFlag, RenameFlags, openat, renameat2};
use nix::sys::stat::Mode;
use nix::unistd::{AccessFlags, LinkatFlags, UnlinkatFlags};

use crate::kernel::SyscallError;

use super::chain::{Chain, ChainError};
use super::checksums::CHECKSUMS;
use super::files;
use super::magic::{INVENTORY, PARENT, STATS_DUMP, pages_name};
use super::meta::META;
use super::pages::PagesFile;

/// The inventory until it is complete and on disk.
const UNFINISHED_INVENTORY: &str = "inventory.img.unfinished";

/// Why a checkpoint cannot go into a directory.
#[derive(Debug, thiserror::Error)]
pub enum DirError {
    /// There is no such directory.
    #[error("images directory {} does not exist; create it first", .0.display())]
    Missing(PathBuf),
    /// It is a file, or a symbolic link.
    #[error("{} is not a directory, or is a symbolic link to one", .0.display())]
    NotADirectory(PathBuf),
    /// No file can be made in it.
    #[error("images directory {} is not writable: {source}", path.display())]
    NotWritable {
        /// The directory.
        path: PathBuf,
        /// The reason.
        source: io::Error,
    },
    /// It holds a checkpoint.
    #[error("{} already holds a checkpoint ({INVENTORY}); each checkpoint needs a directory of its own", .0.display())]
    Occupied(PathBuf),
    /// It holds what a failed dump left.
    #[error("{} holds {file} of an unfinished checkpoint; remove that directory's files or use another one", path.display())]
    Leftovers {
        /// The directory.
        path: PathBuf,
        /// One of the files.
        file: String,
    },
    /// It is the previous images directory, or one of those before.
    #[error("{} would be its own ancestor: it is part of the parent chain, at {}", path.display(), member.display())]
    InChain {
        /// The directory.
        path: PathBuf,
        /// The member of the chain that it is.
        member: PathBuf,
    },
    /// The previous checkpoint cannot be used.
    #[error("previous checkpoint: {0}")]
    Parent(#[from] ChainError),
    /// A system call failed.
    #[error(transparent)]
    Syscall(#[from] SyscallError),
}

/// An images directory being filled. Dropped before [`ImagesDir::finish`], it removes what it has made.
#[derive(Debug)]
pub struct ImagesDir {
    fd: OwnedFd,
    path: PathBuf,
    created: Vec<String>,
    pages_files: u32,
    finished: bool,
}

impl ImagesDir {
    /// Opens `path` and checks that a checkpoint can be made in it. Nothing is written yet.
    ///
    /// # Errors
    /// It is missing, not a directory, not writable, or holds a checkpoint or parts of one.
    pub fn open(path: &Path) -> Result<Self, DirError> {
        let fd = files::open_dir(AT_FDCWD, path, false).map_err(|errno| match errno {
            Errno::ENOENT => DirError::Missing(path.to_owned()),
            Errno::ENOTDIR | Errno::ELOOP => DirError::NotADirectory(path.to_owned()),
            Errno::EACCES => DirError::NotWritable { path: path.to_owned(), source: errno.into() },
            _ => SyscallError::new("open", path.display().to_string(), errno).into(),
        })?;
        let dir = Self { fd, path: path.to_owned(), created: Vec::new(), pages_files: 0, finished: false };
        nix::unistd::faccessat(&dir.fd, ".", AccessFlags::W_OK | AccessFlags::X_OK, AtFlags::AT_EACCESS)
            .map_err(|e| DirError::NotWritable { path: path.to_owned(), source: e.into() })?;
        let names = files::names(&dir.fd).map_err(|e| dir.error("getdents64", ".", e))?;
        if names.iter().any(|name| name == INVENTORY) {
            return Err(DirError::Occupied(path.to_owned()));
        }
        let ours = |name: &str| {
            name.ends_with(".img")
                || [PARENT, STATS_DUMP, META, CHECKSUMS, UNFINISHED_INVENTORY].contains(&name)
        };
        if let Some(file) = names.iter().filter_map(|n| n.to_str()).find(|n| ours(n)) {
            return Err(DirError::Leftovers { path: path.to_owned(), file: file.to_owned() });
        }
        Ok(dir)
    }

    /// Opens the previous checkpoint, `prev`, relative to this directory as CRIU has it, and the whole chain behind
    /// it. Nothing is written yet; [`Self::link_parent`] does.
    ///
    /// # Errors
    /// The chain is damaged, or this directory is part of it.
    pub fn open_parent(&self, prev: &Path, pid: i32) -> Result<Chain, DirError> {
        let own = files::identity(&self.fd).map_err(|e| self.error("fstat", ".", e))?;
        let at = self.path.join(prev);
        if files::open_dir(&self.fd, prev, true)
            .and_then(|dir| files::identity(&dir))
            .is_ok_and(|id| id == own)
        {
            return Err(DirError::InChain { path: self.path.clone(), member: at });
        }
        let chain = Chain::open_at(&self.fd, prev, &at, Some(pid))?;
        match chain.members().iter().find(|member| member.identity() == own) {
            Some(member) => {
                Err(DirError::InChain { path: self.path.clone(), member: member.path().to_owned() })
            }
            None => Ok(chain),
        }
    }

    /// Writes the `parent` link to `prev`, relative to this directory.
    ///
    /// # Errors
    /// symlinkat(2) fails, or an absolute `prev` cannot be resolved.
    pub fn link_parent(&mut self, prev: &Path) -> Result<(), DirError> {
        let target = if prev.is_absolute() {
            let absolute = |path: &Path| {
                path.canonicalize().map_err(|e| SyscallError::new("realpath", path.display().to_string(), e))
            };
            relative(&absolute(&self.path)?, &absolute(prev)?)
        } else {
            prev.to_owned()
        };
        nix::unistd::symlinkat(&target, &self.fd, PARENT).map_err(|e| self.error("symlinkat", PARENT, e))?;
        self.created.push(PARENT.to_owned());
        Ok(())
    }

    /// The path that it was opened by.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Makes a file of its own: never an existing one, never through a link, for the owner alone.
    ///
    /// # Errors
    /// The name exists, or openat(2) fails otherwise.
    pub fn create(&mut self, name: &str) -> Result<File, DirError> {
        let flags = OFlag::O_RDWR | OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        let fd = openat(&self.fd, name, flags, Mode::S_IRUSR | Mode::S_IWUSR)
            .map_err(|e| self.error("openat", name, e))?;
        self.created.push(name.to_owned());
        Ok(File::from(fd))
    }

    /// Makes the file `name` with `bytes`.
    ///
    /// # Errors
    /// As [`Self::create`], or write(2) fails, as with ENOSPC.
    pub fn write(&mut self, name: &str, bytes: &[u8]) -> Result<(), DirError> {
        let mut file = self.create(name)?;
        file.write_all(bytes).map_err(|e| self.error("write", name, e).into())
    }

    /// Makes the next `pages-ID.img`, and says its number.
    ///
    /// # Errors
    /// As [`Self::create`].
    pub fn create_pages(&mut self) -> Result<(u32, PagesFile), DirError> {
        self.pages_files += 1;
        let name = pages_name(self.pages_files);
        let file = self.create(&name)?;
        Ok((self.pages_files, PagesFile::new(file, self.path.join(name).display().to_string())))
    }

    /// Makes the checkpoint whole: everything goes to disk, then `inventory` appears under its name, then that too
    /// goes to disk.
    ///
    /// # Errors
    /// A system call fails, and the directory holds no checkpoint; except when the last fsync(2) of the directory
    /// does, and the checkpoint is there but may not survive a power failure.
    pub fn finish(mut self, inventory: &[u8]) -> Result<(), DirError> {
        for name in self.created.iter().filter(|name| *name != PARENT) {
            let flags = OFlag::O_RDONLY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
            let file = openat(&self.fd, name.as_str(), flags, Mode::empty())
                .map_err(|e| self.error("openat", name, e))?;
            nix::unistd::fsync(&file).map_err(|e| self.error("fsync", name, e))?;
        }
        let mut file = self.create(UNFINISHED_INVENTORY)?;
        file.write_all(inventory).map_err(|e| self.error("write", UNFINISHED_INVENTORY, e))?;
        file.sync_all().map_err(|e| self.error("fsync", UNFINISHED_INVENTORY, e))?;
        // The names of all the others must be on disk before that of the inventory.
        nix::unistd::fsync(&self.fd).map_err(|e| self.error("fsync", ".", e))?;
        self.publish_inventory()?;
        self.finished = true;
        nix::unistd::fsync(&self.fd).map_err(|e| self.error("fsync", ".", e))?;
        Ok(())
    }

    fn publish_inventory(&self) -> Result<(), SyscallError> {
        let from = UNFINISHED_INVENTORY;
        match renameat2(&self.fd, from, &self.fd, INVENTORY, RenameFlags::RENAME_NOREPLACE) {
            Ok(()) => Ok(()),
            // The file system has no RENAME_NOREPLACE (renameat2(2)); a hard link never replaces either.
            Err(Errno::EINVAL) => {
                nix::unistd::linkat(&self.fd, from, &self.fd, INVENTORY, LinkatFlags::empty())
                    .map_err(|e| self.error("linkat", INVENTORY, e))?;
                let _ = nix::unistd::unlinkat(&self.fd, from, UnlinkatFlags::NoRemoveDir);
                Ok(())
            }
            Err(errno) => Err(self.error("renameat2", INVENTORY, errno)),
        }
    }

    fn error(&self, call: &'static str, name: &str, source: impl Into<io::Error>) -> SyscallError {
        SyscallError::new(call, self.path.join(name).display().to_string(), source)
    }
}

impl Drop for ImagesDir {
    fn drop(&mut self) {
        if self.finished {
            return;
        }
        for name in &self.created {
            if let Err(errno) =
                nix::unistd::unlinkat(self.fd.as_fd(), name.as_str(), UnlinkatFlags::NoRemoveDir)
            {
                tracing::warn!(
                    "cannot remove {} of the failed checkpoint: {errno}",
                    self.path.join(name).display()
                );
            }
        }
    }
}

/// The path of `to` as seen from the directory `from`; both absolute, without links and dots.
fn relative(from: &Path, to: &Path) -> PathBuf {
    let (from, to): (Vec<Component<'_>>, Vec<Component<'_>>) =
        (from.components().collect(), to.components().collect());
    let common = from.iter().zip(&to).take_while(|(a, b)| a == b).count();
    std::iter::repeat_n(Component::ParentDir, from.len() - common)
        .chain(to[common..].iter().copied())
        .collect()
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::{MetadataExt, symlink};

    use super::*;

    #[test]
    fn files_are_for_the_owner_and_a_drop_removes_them() {
        let tmp = tempfile::tempdir().unwrap();
        let mut dir = ImagesDir::open(tmp.path()).unwrap();
        dir.write("mm-1.img", b"x").unwrap();
        assert_eq!(fs::metadata(tmp.path().join("mm-1.img")).unwrap().mode() & 0o7777, 0o600);
        drop(dir);
        assert_eq!(fs::read_dir(tmp.path()).unwrap().count(), 0);
    }

    #[test]
    fn nothing_is_overwritten_or_written_through_a_link() {
        let tmp = tempfile::tempdir().unwrap();
        let mut dir = ImagesDir::open(tmp.path()).unwrap();
        fs::write(tmp.path().join("victim"), "precious").unwrap();
        symlink("victim", tmp.path().join("mm-1.img")).unwrap();
        fs::write(tmp.path().join("mm-2.img"), "precious").unwrap();
        for name in ["mm-1.img", "mm-2.img"] {
            assert!(
                matches!(dir.write(name, b"x"), Err(DirError::Syscall(e)) if e.errno() == Some(libc::EEXIST))
            );
        }
        drop(dir);
        assert_eq!(fs::read_to_string(tmp.path().join("victim")).unwrap(), "precious");
        assert_eq!(fs::read_to_string(tmp.path().join("mm-2.img")).unwrap(), "precious");
    }

    #[test]
    fn a_finished_directory_is_occupied_and_keeps_its_files() {
        let tmp = tempfile::tempdir().unwrap();
        let mut dir = ImagesDir::open(tmp.path()).unwrap();
        dir.write("mm-1.img", b"x").unwrap();
        dir.finish(b"inventory").unwrap();
        let mut names: Vec<_> = fs::read_dir(tmp.path())
            .unwrap()
            .map(|e| e.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        assert_eq!(names, ["inventory.img", "mm-1.img"]);
        assert!(matches!(ImagesDir::open(tmp.path()), Err(DirError::Occupied(_))));
    }

    #[test]
    fn an_inventory_that_appeared_meanwhile_is_not_replaced() {
        let tmp = tempfile::tempdir().unwrap();
        let dir = ImagesDir::open(tmp.path()).unwrap();
        fs::write(tmp.path().join(INVENTORY), "theirs").unwrap();
        assert!(dir.finish(b"ours").is_err());
        assert_eq!(fs::read_to_string(tmp.path().join(INVENTORY)).unwrap(), "theirs");
    }

    #[test]
    fn unusable_directories_are_refused_by_name() {
        let tmp = tempfile::tempdir().unwrap();
        let missing = tmp.path().join("none");
        assert!(matches!(ImagesDir::open(&missing), Err(DirError::Missing(p)) if p == missing));
        let file = tmp.path().join("file");
        fs::write(&file, "").unwrap();
        assert!(matches!(ImagesDir::open(&file), Err(DirError::NotADirectory(_))));
        let link = tmp.path().join("link");
        symlink(tmp.path(), &link).unwrap();
        assert!(matches!(ImagesDir::open(&link), Err(DirError::NotADirectory(_))));
        let torn = tmp.path().join("torn");
        fs::create_dir(&torn).unwrap();
        fs::write(torn.join("pages-1.img"), "").unwrap();
        assert!(
            matches!(ImagesDir::open(&torn), Err(DirError::Leftovers { file, .. }) if file == "pages-1.img")
        );
    }

    #[test]
    fn relative_paths_lead_there() {
        for (from, to, want) in [
            ("/a/b/c", "/a/b/d", "../d"),
            ("/a/b", "/a/b/d", "d"),
            ("/a/b", "/x/y", "../../x/y"),
            ("/a/b", "/a", ".."),
        ] {
            assert_eq!(relative(Path::new(from), Path::new(to)), Path::new(want));
        }
    }
}
