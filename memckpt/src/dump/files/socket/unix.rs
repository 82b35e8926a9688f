//! Unix sockets: unconnected, listening, and connected to another one of the tree; with what waits to be read.

use std::collections::{HashMap, HashSet, VecDeque};

use crate::dump::error::DumpError;
use crate::dump::queues::{self, Message};
use crate::image::proto::{
    FdTypes, FileEntry, FilePermsEntry, ScmEntry, SkPacketEntry, SkShutdown, UnixSkEntry,
};
use crate::kernel::descriptor::Descriptor;
use crate::kernel::sock_diag::state::LISTEN;
use crate::kernel::sock_diag::{SockDiag, UnixSocket};

use super::super::collector::{Collector, owner};
use super::super::refusal::{Place, refuse, refuse_descriptor};
use super::options;

/// The unix sockets that were seen, and those that they are connected to.
#[derive(Debug, Default)]
pub(in super::super) struct UnixEnds {
    diag: Option<SockDiag>,
    /// Number and inode of those whose messages are still to be taken.
    with_messages: VecDeque<(u32, u64)>,
    seen: HashMap<u32, End>,
    /// Sockets of others that were noted.
    outside: Vec<u32>,
}

#[derive(Debug)]
struct End {
    pid: i32,
    fd: i32,
    peer: Option<u32>,
}

impl Collector<'_> {
    pub(super) fn unix_socket(&mut self, found: &Descriptor, id: u32) -> Result<FileEntry, DumpError> {
        let inode = found.stat.st_ino as u32;
        let told = self.diagnose(inode)?;
        if told.pending > 0 {
            self.passing(refuse_descriptor(
                found,
                "listening unix socket",
                "has connections that wait to be accepted: try again when they are",
            ))?;
        }
        let has_messages = self.messages(found.stat.st_ino).is_some();
        if self.is_frozen() && told.state != LISTEN && (told.received > 0 || has_messages) {
            self.take_queue(found, id)?;
        }
        self.unix.seen.insert(inode, End { pid: found.pid, fd: found.fd, peer: told.peer });
        let name = told.name.unwrap_or_default();
        let socket = UnixSkEntry {
            id,
            ino: inode,
            r#type: u32::from(told.kind),
            state: u32::from(told.state),
            flags: found.info.file_flags(),
            uflags: 0,
            backlog: told.backlog,
            peer: told.peer.unwrap_or(0),
            fown: owner(found)?,
            opts: options::of(found)?,
            file_perms: permissions(found, &name)?,
            name,
            shutdown: match told.shutdown {
                0 => None,
                1 => Some(SkShutdown::Read as i32),
                2 => Some(SkShutdown::Write as i32),
                _ => Some(SkShutdown::Both as i32),
            },
            name_dir: None,
            deleted: None,
            ns_id: None,
            mnt_id: None,
        };
        Ok(FileEntry { r#type: FdTypes::Unixsk as i32, id, usk: Some(socket), ..FileEntry::default() })
    }

    fn diagnose(&mut self, inode: u32) -> Result<UnixSocket, DumpError> {
        let diag = match self.unix.diag.take() {
            Some(diag) => diag,
            None => SockDiag::open()?,
        };
        Ok(self.unix.diag.insert(diag).unix(inode)?)
    }

    /// Takes a copy of what waits to be read.
    fn take_queue(&mut self, found: &Descriptor, id: u32) -> Result<(), DumpError> {
        if self.messages(found.stat.st_ino).is_some() {
            self.unix.with_messages.push_back((id, found.stat.st_ino));
            return Ok(());
        }
        // A socket that is itself under way. What is no plain stream would be there, had its process a parasite.
        match queues::plain_stream(found)? {
            Some(bytes) => {
                self.packet(id, bytes, Vec::new());
                Ok(())
            }
            None => Err(refuse_descriptor(
                found,
                "unix socket",
                "holds messages, which only the process itself could show without taking them: try again when they are received",
            )),
        }
    }

    fn messages(&self, inode: u64) -> Option<&'_ [Message]> {
        self.sockets.and_then(|(_, queues)| queues.of(inode))
    }

    /// Takes the messages, once all sockets are known: a socket may be under way to itself.
    pub(in super::super) fn take_messages(&mut self) -> Result<(), DumpError> {
        let Some((_, queues)) = self.sockets else { return Ok(()) };
        while let Some((id, inode)) = self.unix.with_messages.pop_front() {
            for message in queues.of(inode).unwrap_or_default() {
                let rights = message.rights.iter().map(|copy| self.file_under_way(copy));
                let rights = rights.collect::<Result<Vec<u32>, _>>();
                if let Some(rights) = self.unless_refused(rights)? {
                    self.packet(id, message.bytes.clone(), rights);
                }
            }
        }
        Ok(())
    }

    fn packet(&mut self, id_for: u32, bytes: Vec<u8>, rights: Vec<u32>) {
        let scm = match rights.is_empty() {
            true => Vec::new(),
            false => vec![ScmEntry { r#type: libc::SCM_RIGHTS as u32, rights }],
        };
        let packet = SkPacketEntry { id_for, length: bytes.len() as u32, scm };
        self.out.packets.push((packet, bytes));
    }

    /// Refuses sockets whose other end is not in the tree, but for those whose other end the user provides again.
    pub(in super::super) fn outer_unix_peers(&mut self) -> Result<(), DumpError> {
        let mut outside: Vec<(i32, i32, u32)> = self
            .unix
            .seen
            .values()
            .filter_map(|end| {
                let peer = end.peer.filter(|peer| !self.unix.seen.contains_key(peer))?;
                Some((end.pid, end.fd, peer))
            })
            .collect();
        outside.sort_unstable();
        for (pid, fd, peer) in outside {
            if self.options.is_external(&format!("unix[{peer}]")) && self.outer_unix_socket(peer)? {
                continue;
            }
            self.unless_refused::<()>(Err(refuse(
                pid,
                Place::Descriptor(fd),
                "unix socket",
                format!(
                    "is connected to a process that is not in the tree (socket:[{peer}]): close it first, or where that is a socket \
                     for datagrams with a name, as a log daemon's, say --external unix[{peer}]"
                ),
            )))?;
        }
        Ok(())
    }

    /// Notes a socket of somebody else's to which datagrams go by its name. Whether it is one.
    fn outer_unix_socket(&mut self, inode: u32) -> Result<bool, DumpError> {
        /// CRIU's USK_EXTERN.
        const EXTERN: u32 = 1;
        if self.unix.outside.contains(&inode) {
            return Ok(true);
        }
        let told = self.diagnose(inode)?;
        let Some(name) = told.name.filter(|_| i32::from(told.kind) == libc::SOCK_DGRAM) else {
            return Ok(false);
        };
        let id = self.next_id();
        let socket = UnixSkEntry {
            id,
            ino: inode,
            r#type: libc::SOCK_DGRAM as u32,
            state: u32::from(LISTEN),
            uflags: EXTERN,
            name,
            ..UnixSkEntry::default()
        };
        let entry =
            FileEntry { r#type: FdTypes::Unixsk as i32, id, usk: Some(socket), ..FileEntry::default() };
        self.out.files.push(entry);
        self.unix.outside.push(inode);
        Ok(true)
    }
}

/// `files` so that CRIU finds each peer: it looks for it when it meets a socket, and then only among those that it has met, unless the
/// peer is connected back.
pub(in super::super) fn peers_first(files: Vec<FileEntry>) -> Vec<FileEntry> {
    let peers: HashMap<u32, u32> =
        files.iter().filter_map(|entry| entry.usk.as_ref()).map(|socket| (socket.ino, socket.peer)).collect();
    let is_connected = |entry: &FileEntry| entry.usk.as_ref().is_some_and(|socket| socket.peer != 0);
    let (mut rest, mut ordered): (Vec<FileEntry>, Vec<FileEntry>) = files.into_iter().partition(is_connected);
    let inodes = ordered.iter().filter_map(|entry| entry.usk.as_ref()).map(|socket| socket.ino);
    let mut met: HashSet<u32> = inodes.collect();
    loop {
        let (ready, waiting): (Vec<_>, Vec<_>) = rest.into_iter().partition(|entry| {
            let socket = entry.usk.as_ref().map_or((0, 0), |socket| (socket.ino, socket.peer));
            met.contains(&socket.1) || peers.get(&socket.1) == Some(&socket.0)
        });
        met.extend(ready.iter().filter_map(|entry| entry.usk.as_ref()).map(|socket| socket.ino));
        let is_done = ready.is_empty();
        ordered.extend(ready);
        rest = waiting;
        if is_done {
            ordered.extend(rest);
            return ordered;
        }
    }
}

/// Owner and mode of the file that a socket is bound to.
fn permissions(found: &Descriptor, name: &[u8]) -> Result<Option<FilePermsEntry>, DumpError> {
    let Some(path) =
        name.strip_suffix(&[0]).or(Some(name)).filter(|name| name.first().is_some_and(|b| *b != 0))
    else {
        return Ok(None);
    };
    let refused = |reason: &str| {
        let shown = String::from_utf8_lossy(path);
        refuse_descriptor(found, format!("unix socket {shown}"), reason)
    };
    if path.first() != Some(&b'/') {
        return Err(refused(
            "is bound to a relative path, which cannot be found again: bind it to an absolute one",
        ));
    }
    match nix::sys::stat::stat(path) {
        Ok(stat) if stat.st_mode & libc::S_IFMT == libc::S_IFSOCK => {
            Ok(Some(FilePermsEntry { mode: stat.st_mode, uid: stat.st_uid, gid: stat.st_gid }))
        }
        _ => Err(refused("is bound to a path that leads elsewhere by now: close it first")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_peer_comes_before_who_is_connected_to_it() {
        let socket = |ino, peer| FileEntry {
            usk: Some(UnixSkEntry { ino, peer, ..UnixSkEntry::default() }),
            ..FileEntry::default()
        };
        // 1 to 2 to 3; 4 and 5 to each other; 6 to one that is nowhere; one that is no socket.
        let files = [
            socket(1, 2),
            socket(2, 3),
            FileEntry::default(),
            socket(4, 5),
            socket(5, 4),
            socket(6, 9),
            socket(3, 0),
        ];
        let ordered = peers_first(files.to_vec());
        let inodes: Vec<u32> = ordered.iter().map(|entry| entry.usk.as_ref().map_or(0, |s| s.ino)).collect();
        assert_eq!(inodes, [0, 3, 2, 4, 5, 1, 6]);
    }
}
