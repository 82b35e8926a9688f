//! Unix sockets: pairs, listeners, and sockets for datagrams, with what waits to be read.

use std::collections::HashMap;
use std::io::IoSlice;
use std::os::fd::{AsFd as _, AsRawFd as _, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;

use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, Backlog, ControlMessage, MsgFlags, SockFlag, SockType, UnixAddr, accept4, bind, connect,
    listen, sendmsg, socket, socketpair,
};

use crate::image::chain::Member;
use crate::image::proto::{FilePermsEntry, SkPacketEntry, UnixSkEntry};
use crate::image::{ImageKind, magic};
use crate::kernel::SyscallError;
use crate::kernel::sock_diag::state::{ESTABLISHED, LISTEN};
use crate::kernel::socket_options;
use crate::restore::error::{Refusal, RestoreError};

use super::super::{copy, set_flags};
use super::options;
use super::rooted::InAnotherRoot;

/// CRIU's USK_EXTERN: a socket of somebody else's.
const EXTERN: u32 = 1;

/// The unix sockets of a tree, also those that are under way only.
#[derive(Debug, Default)]
pub(in crate::restore::files) struct UnixSockets {
    entries: Vec<UnixSkEntry>,
    /// By their numbers in `files.img`.
    made: HashMap<u32, OwnedFd>,
    /// The other ends of those whose other end was closed, until all is in that waits to be read.
    feeds: HashMap<u32, OwnedFd>,
    messages: Vec<(SkPacketEntry, Vec<u8>)>,
}

impl UnixSockets {
    /// What waits to be read in them.
    pub(in crate::restore::files) fn read(
        member: &Member,
    ) -> Result<Vec<(SkPacketEntry, Vec<u8>)>, RestoreError> {
        let length = |entry: &SkPacketEntry| entry.length.into();
        Ok(member.with_bytes(magic::SK_QUEUES, ImageKind::SkQueues, length)?)
    }

    /// Makes all of them, empty.
    pub(in crate::restore::files) fn make(
        member: &Member,
        entries: impl Iterator<Item = UnixSkEntry>,
    ) -> Result<Self, RestoreError> {
        let mut sockets = Self { messages: Self::read(member)?, ..Self::default() };
        let entries: Vec<UnixSkEntry> = entries.collect();
        for entry in own(&entries) {
            match other_end(&entries, entry) {
                _ if sockets.made.contains_key(&entry.id) => {}
                Some(other) if other.id != entry.id => sockets.pair(entry, other, &entries)?,
                _ if is_half(entry) => sockets.half(entry)?,
                _ => {
                    sockets.made.insert(entry.id, new(entry)?);
                }
            }
        }
        // After the connections that were made by way of their names.
        for entry in own(&entries).filter(|entry| !is_accepted(entry)) {
            let fd = &sockets.made[&entry.id];
            bind_to_name(fd, entry)?;
            if entry.state == u32::from(LISTEN) {
                listen(fd, options::backlog(entry.backlog)).map_err(|e| failed("listen", entry, e))?;
            }
        }
        sockets.entries = entries;
        Ok(sockets)
    }

    /// Another descriptor of socket `id`.
    pub(in crate::restore::files) fn get(&self, id: u32) -> Option<Result<OwnedFd, SyscallError>> {
        Some(copy(self.made.get(&id)?))
    }

    /// Two ends of a connection, or of a pair.
    fn pair(
        &mut self,
        one: &UnixSkEntry,
        other: &UnixSkEntry,
        all: &[UnixSkEntry],
    ) -> Result<(), RestoreError> {
        let listens = |end: &UnixSkEntry| {
            all.iter().any(|entry| entry.state == u32::from(LISTEN) && entry.name == end.name)
        };
        let (accepted, client) = match (is_accepted(one), is_accepted(other)) {
            (true, true) if listens(other) => (other, one),
            (true, _) => (one, other),
            (false, true) => (other, one),
            (false, false) => {
                let (a, b) = socketpair(AddressFamily::Unix, kind(one)?, None, SockFlag::SOCK_CLOEXEC)
                    .map_err(|e| failed("socketpair", one, e))?;
                self.made.insert(one.id, a);
                self.made.insert(other.id, b);
                return Ok(());
            }
        };
        let connecting = new(client)?;
        if !client.name.is_empty() {
            bind_to_name(&connecting, client)?;
        }
        let serving = accept_at_name(&connecting, accepted)?;
        self.made.insert(client.id, connecting);
        self.made.insert(accepted.id, serving);
        Ok(())
    }

    /// One whose other end was closed.
    fn half(&mut self, entry: &UnixSkEntry) -> Result<(), RestoreError> {
        let (ours, feed) = if is_accepted(entry) {
            let feed = new(entry)?;
            (accept_at_name(&feed, entry)?, feed)
        } else {
            socketpair(AddressFamily::Unix, kind(entry)?, None, SockFlag::SOCK_CLOEXEC)
                .map_err(|e| failed("socketpair", entry, e))?
        };
        self.made.insert(entry.id, ours);
        self.feeds.insert(entry.id, feed);
        Ok(())
    }

    /// Files that are in a message, by their numbers.
    pub(in crate::restore::files) fn under_way(&self) -> Vec<u32> {
        self.messages.iter().flat_map(|(packet, _)| &packet.scm).flat_map(|scm| scm.rights.clone()).collect()
    }

    /// Puts in what waits to be read, and sets all that would have hindered it. `file` knows the files that are in messages.
    pub(in crate::restore::files) fn settle(
        &mut self,
        file: impl Fn(u32) -> Option<RawFd>,
        is_external: impl Fn(&str) -> bool,
    ) -> Result<(), RestoreError> {
        // What all of them take at once, each with what the kernel needs beside it.
        let room = self.messages.iter().map(|(_, bytes)| bytes.len() + 4096).sum::<usize>();
        let room = i32::try_from(room).unwrap_or(i32::MAX);
        for (packet, bytes) in &self.messages {
            self.put(packet, bytes, room, &file)?;
        }
        self.feeds.clear();
        // Who is connected hears nobody else, who must be connected to it before.
        let mut entries: Vec<&UnixSkEntry> = own(&self.entries).collect();
        entries.sort_by_cached_key(|entry| std::cmp::Reverse(self.distance(entry)));
        for entry in entries {
            self.connect(entry, &self.made[&entry.id], &is_external)?;
        }
        for entry in own(&self.entries) {
            let fd = &self.made[&entry.id];
            if let Some(how @ 1..=3) = entry.shutdown {
                // SAFETY: no memory is involved.
                if unsafe { libc::shutdown(fd.as_raw_fd(), how - 1) } != 0 {
                    return Err(failed("shutdown", entry, Errno::last()).into());
                }
            }
            options::set(fd, &entry.opts)?;
            set_flags(fd, entry.flags)?;
        }
        Ok(())
    }

    /// A message, from where its socket gets its messages, by a buffer with this `room`.
    fn put(
        &self,
        packet: &SkPacketEntry,
        bytes: &[u8],
        room: i32,
        file: impl Fn(u32) -> Option<RawFd>,
    ) -> Result<(), RestoreError> {
        let refused = |what: String| {
            RestoreError::from(Refusal::Checkpoint(format!("message for socket {}: {what}", packet.id_for)))
        };
        let Some(entry) = self.entries.iter().find(|entry| entry.id == packet.id_for) else {
            return Err(refused("there is no such socket".into()));
        };
        let mut rights = Vec::new();
        for id in packet.scm.iter().flat_map(|scm| &scm.rights) {
            rights.push(
                file(*id).ok_or_else(|| refused(format!("file {id}, which comes with it, is missing")))?,
            );
        }
        let other_end = other_end(&self.entries, entry)
            .and_then(|peer| self.made.get(&peer.id))
            .or_else(|| self.feeds.get(&entry.id));
        let anybody;
        let (from, to) = match other_end {
            Some(end) => (end, None),
            None if !entry.name.is_empty() => {
                anybody = new(entry)?;
                (&anybody, Some(address(entry)?))
            }
            None => {
                return Err(refused("nobody can send to it: it has neither a name nor another end".into()));
            }
        };
        socket_options::set_int(from.as_fd(), libc::SOL_SOCKET, libc::SO_SNDBUFFORCE, room)
            .map_err(|e| SyscallError::new("setsockopt(SO_SNDBUFFORCE)", shown(entry), e))?;
        let control = [ControlMessage::ScmRights(&rights)];
        let control = if rights.is_empty() { &[][..] } else { &control[..] };
        let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
        let sent = sendmsg(from.as_raw_fd(), &[IoSlice::new(bytes)], control, flags, to.as_ref())
            .map_err(|e| failed("sendmsg", entry, e))?;
        if sent != bytes.len() {
            return Err(failed("sendmsg", entry, Errno::EAGAIN).into());
        }
        Ok(())
    }

    /// How many sockets are one behind the other, each connected to the next, from `entry` on.
    fn distance(&self, entry: &UnixSkEntry) -> usize {
        let next =
            |entry: &UnixSkEntry| self.entries.iter().find(|peer| entry.peer != 0 && peer.ino == entry.peer);
        let chain = std::iter::successors(Some(entry), |entry| next(entry));
        // Pairs are circles.
        chain.take(self.entries.len()).take_while(|entry| other_end(&self.entries, entry).is_none()).count()
    }

    /// Connects a socket for datagrams to one that is not connected to it in turn.
    fn connect(
        &self,
        entry: &UnixSkEntry,
        fd: &OwnedFd,
        is_external: impl Fn(&str) -> bool,
    ) -> Result<(), RestoreError> {
        if entry.peer == 0 || other_end(&self.entries, entry).is_some() {
            return Ok(());
        }
        let refused = |what: String| {
            Err(Refusal::Checkpoint(format!(
                "{} is connected to socket:[{}], {what}",
                shown(entry),
                entry.peer
            ))
            .into())
        };
        let Some(peer) = self.entries.iter().find(|peer| peer.ino == entry.peer) else {
            return refused("which is not in the checkpoint".into());
        };
        if peer.name.is_empty() {
            return refused("which has no name by which it could be connected again".into());
        }
        let external = format!("unix[{}]", peer.ino);
        if peer.uflags & EXTERN != 0 && !is_external(&external) {
            return refused(format!(
                "{}, of a process outside: with --external '{external}' it is connected again",
                shown(peer)
            ));
        }
        connect(fd.as_raw_fd(), &address(peer)?).map_err(|e| failed("connect", peer, e))?;
        Ok(())
    }
}

/// Those of the tree.
fn own(entries: &[UnixSkEntry]) -> impl Iterator<Item = &UnixSkEntry> {
    entries.iter().filter(|entry| entry.uflags & EXTERN == 0)
}

/// The other end of a pair: whom `entry` is connected to, and is connected to it in turn.
fn other_end<'a>(entries: &'a [UnixSkEntry], entry: &UnixSkEntry) -> Option<&'a UnixSkEntry> {
    own(entries).find(|other| other.ino == entry.peer && other.peer == entry.ino)
}

/// A stream with a name that listens to nobody: the name is that of the listener that it was accepted from.
fn is_accepted(entry: &UnixSkEntry) -> bool {
    entry.state == u32::from(ESTABLISHED) && entry.r#type != libc::SOCK_DGRAM as u32 && !entry.name.is_empty()
}

/// One whose other end was closed. A socket for datagrams counts as connected as soon as somebody is connected to it
/// (unix_dgram_connect in net/unix/af_unix.c), for which it needs a name.
fn is_half(entry: &UnixSkEntry) -> bool {
    let has_name = entry.r#type == libc::SOCK_DGRAM as u32 && !entry.name.is_empty();
    entry.peer == 0 && entry.state == u32::from(ESTABLISHED) && !has_name
}

fn kind(entry: &UnixSkEntry) -> Result<SockType, RestoreError> {
    match entry.r#type as i32 {
        libc::SOCK_STREAM => Ok(SockType::Stream),
        libc::SOCK_DGRAM => Ok(SockType::Datagram),
        libc::SOCK_SEQPACKET => Ok(SockType::SeqPacket),
        other => Err(Refusal::Checkpoint(format!("{} is of type {other}", shown(entry))).into()),
    }
}

fn new(entry: &UnixSkEntry) -> Result<OwnedFd, RestoreError> {
    Ok(socket(AddressFamily::Unix, kind(entry)?, SockFlag::SOCK_CLOEXEC, None)
        .map_err(|e| failed("socket", entry, e))?)
}

/// What users know it by.
fn shown(entry: &UnixSkEntry) -> String {
    match entry.name.split_first() {
        None => format!("unix socket:[{}]", entry.ino),
        Some((0, name)) => format!("unix socket @{}", String::from_utf8_lossy(name)),
        Some(_) => format!("unix socket {}", path(entry).display()),
    }
}

fn failed(call: &'static str, entry: &UnixSkEntry, errno: Errno) -> SyscallError {
    SyscallError::new(call, shown(entry), errno)
}

/// The path of a socket that is not abstract.
fn path(entry: &UnixSkEntry) -> &Path {
    let name = entry.name.strip_suffix(&[0]).unwrap_or(&entry.name);
    Path::new(std::ffi::OsStr::from_bytes(name))
}

fn address(entry: &UnixSkEntry) -> Result<UnixAddr, RestoreError> {
    let address = match entry.name.split_first() {
        Some((0, name)) => UnixAddr::new_abstract(name),
        _ => UnixAddr::new(path(entry)),
    };
    Ok(address.map_err(|e| failed("sockaddr_un", entry, e))?)
}

/// Connects `client` to the name of `accepted`, and gives the other end, which has that name. A path is one in a root of its own:
/// the file that has it here belongs to the listener, or to somebody else by now.
fn accept_at_name(client: &OwnedFd, accepted: &UnixSkEntry) -> Result<OwnedFd, RestoreError> {
    let listener = new(accepted)?;
    let address = address(accepted)?;
    let meet = || {
        bind(listener.as_raw_fd(), &address)?;
        listen(&listener, Backlog::MAXCONN)?;
        connect(client.as_raw_fd(), &address)?;
        accept4(listener.as_raw_fd(), SockFlag::SOCK_CLOEXEC)
    };
    let refused = |e: Errno| RestoreError::from(failed("bind", accepted, e));
    let fd = if accepted.name[0] == 0 {
        meet().map_err(|e| match e {
            Errno::EADDRINUSE => taken(accepted),
            e => refused(e),
        })?
    } else {
        let root = InAnotherRoot::with_directory_of(path(accepted))?;
        root.run(|| meet().map_err(refused))?
    };
    // SAFETY: accept4 has just made it.
    Ok(unsafe { std::os::fd::FromRawFd::from_raw_fd(fd) })
}

fn taken(entry: &UnixSkEntry) -> RestoreError {
    let what = format!("{} is in use: end its user first", shown(entry));
    Refusal::Checkpoint(what).into()
}

/// Binds it to its name, in place of the file that is left of it.
fn bind_to_name(fd: &OwnedFd, entry: &UnixSkEntry) -> Result<(), RestoreError> {
    if entry.name.is_empty() {
        return Ok(());
    }
    let address = address(entry)?;
    match bind(fd.as_raw_fd(), &address) {
        Err(Errno::EADDRINUSE) if entry.name[0] != 0 => {
            make_room(entry, &address)?;
            bind(fd.as_raw_fd(), &address).map_err(|e| failed("bind", entry, e))?;
        }
        Err(Errno::EADDRINUSE) => return Err(taken(entry)),
        other => other.map_err(|e| failed("bind", entry, e))?,
    }
    match &entry.file_perms {
        Some(perms) if entry.name[0] != 0 => give(path(entry), perms),
        _ => Ok(()),
    }
}

fn give(path: &Path, perms: &FilePermsEntry) -> Result<(), RestoreError> {
    use std::os::unix::fs::PermissionsExt as _;
    let name = || path.display().to_string();
    std::os::unix::fs::lchown(path, Some(perms.uid), Some(perms.gid))
        .map_err(|e| SyscallError::new("lchown", name(), e))?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(perms.mode & 0o7777))
        .map_err(|e| SyscallError::new("chmod", name(), e))?;
    Ok(())
}

/// Removes the file of a socket that nobody has bound any more.
fn make_room(entry: &UnixSkEntry, address: &UnixAddr) -> Result<(), RestoreError> {
    use std::os::unix::fs::FileTypeExt as _;
    let path = path(entry);
    let name = || path.display().to_string();
    let is = std::fs::symlink_metadata(path).map_err(|e| SyscallError::new("lstat", name(), e))?;
    if !is.file_type().is_socket() {
        let what = format!("{} is there, and is no socket: move it away first", name());
        return Err(Refusal::Checkpoint(what).into());
    }
    let probe = new(entry)?;
    if connect(probe.as_raw_fd(), address) != Err(Errno::ECONNREFUSED) {
        return Err(taken(entry));
    }
    std::fs::remove_file(path).map_err(|e| SyscallError::new("unlink", name(), e))?;
    Ok(())
}
