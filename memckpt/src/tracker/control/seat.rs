//! Where a target's session listens, and that there is one only.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Read, Seek, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};

use super::ControlError;

/// Overrides the directory of sockets.
const DIRECTORY_VARIABLE: &str = "MEMCKPT_RUNTIME_DIR";
/// How long a killed session may take to let go: it has hooks to detach.
const DYING: Duration = Duration::from_secs(60);
/// The inode of the initial PID namespace (PROC_PID_INIT_INO, include/linux/proc_ns.h).
const INITIAL_PID_NAMESPACE: u64 = 0xEFFF_FFFC;

/// The right to be the session of a target. Dropping it takes its files away.
#[derive(Debug)]
pub struct Seat {
    socket: PathBuf,
    lock_path: PathBuf,
    /// Held as long as the seat: the kernel gives it up with the process.
    _lock: Flock<File>,
}

impl Seat {
    /// Takes the seat of `target`.
    ///
    /// # Errors
    /// Another session has it, or the directory cannot be used.
    pub fn take(target: i32) -> Result<Self, ControlError> {
        Self::take_in(&directory(), target)
    }

    fn take_in(dir: &Path, target: i32) -> Result<Self, ControlError> {
        prepare(dir)?;
        let socket = socket_in(dir, target);
        let lock_path = socket.with_extension("lock");
        let failed = |call| {
            let path = lock_path.clone();
            move |source| ControlError::Files { call, path, source }
        };
        let patience = Instant::now() + DYING;
        loop {
            let file = OpenOptions::new()
                .read(true)
                .write(true)
                .create(true)
                .truncate(false)
                .mode(0o600)
                .custom_flags(libc::O_NOFOLLOW | libc::O_CLOEXEC)
                .open(&lock_path)
                .map_err(failed("open"))?;
            let mut lock = match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
                Ok(lock) => lock,
                Err((mut file, Errno::EWOULDBLOCK)) => {
                    let mut text = String::new();
                    let _ = file.read_to_string(&mut text);
                    let session = text.trim().parse().ok();
                    // A killed session closes its socket before its lock: it is not in the way, only slow.
                    if session.is_some_and(is_ending) && Instant::now() < patience {
                        std::thread::sleep(Duration::from_millis(1));
                        continue;
                    }
                    return Err(ControlError::Taken { target, session });
                }
                Err((_, errno)) => return Err(failed("flock")(errno.into())),
            };
            // The last session may have unlinked the file between our open and our lock.
            let ours = lock.metadata().map_err(failed("fstat"))?;
            if !fs::symlink_metadata(&lock_path).is_ok_and(|m| m.ino() == ours.ino() && m.dev() == ours.dev())
            {
                continue;
            }
            lock.set_len(0)
                .and_then(|()| lock.rewind())
                .and_then(|()| writeln!(&mut *lock, "{}", std::process::id()))
                .map_err(failed("write"))?;
            // A killed session's.
            remove(&socket)?;
            return Ok(Self { socket, lock_path, _lock: lock });
        }
    }

    /// Begins to listen.
    ///
    /// # Errors
    /// The socket cannot be made.
    pub fn listen(&self) -> Result<UnixListener, ControlError> {
        let failed = |call| {
            let path = self.socket.clone();
            move |source| ControlError::Files { call, path, source }
        };
        // The directory lets nobody else in, so that nothing can connect before the chmod.
        let listener = UnixListener::bind(&self.socket).map_err(failed("bind"))?;
        fs::set_permissions(&self.socket, fs::Permissions::from_mode(0o600)).map_err(failed("chmod"))?;
        listener.set_nonblocking(true).map_err(failed("fcntl"))?;
        Ok(listener)
    }

    /// The socket's path.
    #[must_use]
    pub fn socket(&self) -> &Path {
        &self.socket
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        let _ = remove(&self.socket);
        let _ = remove(&self.lock_path);
    }
}

/// Whether process `pid` has ended or is about to.
fn is_ending(pid: i32) -> bool {
    /// PF_EXITING (linux/sched.h).
    const EXITING: u64 = 4;
    crate::kernel::status::stat(pid).map_or(true, |s| matches!(s.state, 'Z' | 'X') || s.flags & EXITING != 0)
}

fn remove(path: &Path) -> Result<(), ControlError> {
    match fs::remove_file(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => {
            Err(ControlError::Files { call: "unlink", path: path.to_owned(), source: e })
        }
        _ => Ok(()),
    }
}

fn directory() -> PathBuf {
    if let Some(dir) = std::env::var_os(DIRECTORY_VARIABLE).filter(|d| !d.is_empty()) {
        return dir.into();
    }
    match std::env::var_os("XDG_RUNTIME_DIR").filter(|d| !d.is_empty()) {
        Some(dir) if !nix::unistd::geteuid().is_root() => Path::new(&dir).join("memckpt"),
        _ => PathBuf::from("/run/memckpt"),
    }
}

/// Where the session of `target` (a PID of our own namespace) listens.
pub(super) fn socket_of(target: i32) -> PathBuf {
    socket_in(&directory(), target)
}

fn socket_in(dir: &Path, target: i32) -> PathBuf {
    // Containers may share /run and yet number their processes apart.
    let namespace = fs::metadata("/proc/self/ns/pid").map_or(INITIAL_PID_NAMESPACE, |m| m.ino());
    if namespace == INITIAL_PID_NAMESPACE {
        dir.join(format!("{target}.sock"))
    } else {
        dir.join(format!("{target}@{namespace}.sock"))
    }
}

fn prepare(dir: &Path) -> Result<(), ControlError> {
    match DirBuilder::new().mode(0o700).create(dir) {
        Err(e) if e.kind() != io::ErrorKind::AlreadyExists => {
            return Err(ControlError::Files { call: "mkdir", path: dir.to_owned(), source: e });
        }
        _ => {}
    }
    let meta = fs::symlink_metadata(dir).map_err(|source| ControlError::Files {
        call: "lstat",
        path: dir.to_owned(),
        source,
    })?;
    let owner = meta.uid() == 0 || meta.uid() == nix::unistd::geteuid().as_raw();
    if !meta.is_dir() || !owner || meta.mode() & 0o077 != 0 {
        return Err(ControlError::Unsafe { path: dir.to_owned() });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scratch() -> (tempfile::TempDir, PathBuf) {
        let dir = tempfile::tempdir().unwrap_or_else(|e| panic!("no temporary directory: {e}"));
        let path = dir.path().join("run");
        (dir, path)
    }

    #[test]
    fn one_seat_a_target_and_no_trace_after_it() {
        let (_dir, run) = scratch();
        let seat = Seat::take_in(&run, 77).unwrap_or_else(|e| panic!("{e}"));
        let listener = seat.listen().unwrap_or_else(|e| panic!("{e}"));
        let mode = fs::metadata(seat.socket()).map(|m| m.mode() & 0o777).ok();
        assert_eq!(mode, Some(0o600));
        let ours = i32::try_from(std::process::id()).ok();
        match Seat::take_in(&run, 77) {
            Err(ControlError::Taken { target: 77, session }) => assert_eq!(session, ours),
            other => panic!("{other:?}"),
        }
        assert!(Seat::take_in(&run, 78).is_ok());
        drop((seat, listener));
        assert_eq!(fs::read_dir(&run).map(Iterator::count).ok(), Some(0));
        assert!(Seat::take_in(&run, 77).is_ok());
    }

    #[test]
    fn a_dead_sessions_socket_is_no_obstacle() {
        let (_dir, run) = scratch();
        prepare(&run).unwrap_or_else(|e| panic!("{e}"));
        drop(UnixListener::bind(socket_in(&run, 77)));
        assert!(socket_in(&run, 77).exists());
        let seat = Seat::take_in(&run, 77).unwrap_or_else(|e| panic!("{e}"));
        assert!(seat.listen().is_ok());
    }

    #[test]
    fn a_directory_open_to_others_or_a_link_is_refused() {
        let (dir, run) = scratch();
        prepare(&run).unwrap_or_else(|e| panic!("{e}"));
        let link = dir.path().join("link");
        std::os::unix::fs::symlink(&run, &link).unwrap_or_else(|e| panic!("{e}"));
        assert!(matches!(Seat::take_in(&link, 1), Err(ControlError::Unsafe { .. })));
        fs::set_permissions(&run, fs::Permissions::from_mode(0o755)).unwrap_or_else(|e| panic!("{e}"));
        assert!(matches!(Seat::take_in(&run, 1), Err(ControlError::Unsafe { .. })));
    }
}
