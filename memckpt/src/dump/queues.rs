//! Messages that wait in unix sockets, with their bounds and the descriptors that come with them.
//!
//! Only SO_PEEK_OFF (Linux 3.4) shows more than the first one without taking it. It is a setting of the target's socket: the
//! parasite has it put back, also if we die.

use std::collections::{HashMap, HashSet};
use std::io::{self, IoSliceMut};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg};

use crate::kernel::descriptor::{self, Descriptor};
use crate::kernel::{SyscallError, socket_options};
use crate::target::{Calls, Frozen, Infected};

use super::error::DumpError;
use super::process::CapturedProcess;
use super::request::{Kind, Request};

/// include/uapi/asm-generic/socket.h
const SO_PEEK_OFF: i32 = 42;
/// The longest message that is expected; longer ones are peeked at again.
const ROOM: usize = 1 << 18;
/// How many sockets are set at once: the parasite has a list of limited length.
const AT_ONCE: usize = 200;

/// A message, or a part of a stream.
#[derive(Debug)]
pub(super) struct Message {
    pub(super) bytes: Vec<u8>,
    /// Copies of the descriptors that come with it.
    pub(super) rights: Vec<OwnedFd>,
}

/// What waits in the unix sockets of a tree, by their inodes. Without sockets whose process cannot be helped by a parasite, where
/// they hold more than the bytes of a stream.
#[derive(Debug, Default)]
pub(super) struct Queues(HashMap<u64, Vec<Message>>);

impl Queues {
    /// Looks at those of the frozen processes. Nothing is taken from them.
    pub(super) fn take(
        processes: &mut [CapturedProcess],
        tree: &mut [Frozen],
        request: &Request,
    ) -> Result<Self, DumpError> {
        let mut queues = Self::default();
        if request.kind != Kind::Dump {
            return Ok(queues);
        }
        let mut seen = HashSet::new();
        for (process, frozen) in processes.iter_mut().zip(tree) {
            let sockets = queues.read_streams(frozen.pid(), &mut seen)?;
            if sockets.is_empty() {
                continue;
            }
            if let Some(mut parasite) = process.infect(frozen)? {
                for sockets in sockets.chunks(AT_ONCE) {
                    queues.read(&mut parasite, sockets)?;
                }
                parasite.cure()?;
            }
        }
        Ok(queues)
    }

    /// What waits in the socket with this inode.
    pub(super) fn of(&self, inode: u64) -> Option<&[Message]> {
        self.0.get(&inode).map(Vec::as_slice)
    }

    /// Reads the streams of process `pid` that hold nothing but bytes; the unix sockets that hold more. None whose inode was
    /// `seen`.
    fn read_streams(&mut self, pid: i32, seen: &mut HashSet<u64>) -> Result<Vec<Descriptor>, DumpError> {
        let mut others = Vec::new();
        for socket in descriptor::sockets(pid)? {
            let inode = socket.stat.st_ino;
            if !seen.insert(inode) || !may_hold_messages(&socket)? {
                continue;
            }
            match plain_stream(&socket)? {
                Some(bytes) if bytes.is_empty() => {}
                Some(bytes) => drop(self.0.insert(inode, vec![Message { bytes, rights: Vec::new() }])),
                None => others.push(socket),
            }
        }
        Ok(others)
    }

    fn read(&mut self, parasite: &mut Infected<'_>, sockets: &[Descriptor]) -> Result<(), DumpError> {
        let (mut undo, mut before) = (Calls::new(), Vec::with_capacity(sockets.len()));
        for socket in sockets {
            before.push(option(socket, SO_PEEK_OFF)?);
            let was = undo.buffer(&before[before.len() - 1].to_ne_bytes());
            undo.set_socket_option(socket.fd, libc::SOL_SOCKET, SO_PEEK_OFF, was);
        }
        if !parasite.undo_with(&undo)? {
            return Ok(());
        }
        for socket in sockets {
            let messages = peek_all(socket)?;
            self.0.insert(socket.stat.st_ino, messages);
        }
        parasite.undo()?;
        for (socket, before) in sockets.iter().zip(before) {
            if option(socket, SO_PEEK_OFF)? != before {
                let error = io::Error::other("it is not what it was");
                return Err(SyscallError::new("setsockopt(SO_PEEK_OFF)", socket.name(), error).into());
            }
        }
        Ok(())
    }
}

/// What waits in a stream that holds nothing but bytes. `None`: there is more, or it is none.
pub(super) fn plain_stream(socket: &Descriptor) -> Result<Option<Vec<u8>>, SyscallError> {
    if option(socket, libc::SO_TYPE)? != libc::SOCK_STREAM {
        return Ok(None);
    }
    let waiting = socket.waiting()?;
    if waiting == 0 {
        return Ok(Some(Vec::new()));
    }
    // It breaks off where descriptors begin or end to come with it.
    let first = peek(socket, waiting)?.map(|(message, _)| message);
    Ok(first.filter(|all| all.rights.is_empty() && all.bytes.len() == waiting).map(|all| all.bytes))
}

/// Whether a socket is a unix socket that has something to read, or is at its end.
fn may_hold_messages(socket: &Descriptor) -> Result<bool, SyscallError> {
    Ok(option(socket, libc::SO_DOMAIN)? == libc::AF_UNIX
        && option(socket, libc::SO_ACCEPTCONN)? == 0
        && is_ready(socket, PollFlags::POLLIN)?)
}

fn is_ready(socket: &Descriptor, events: PollFlags) -> Result<bool, SyscallError> {
    let mut polled = [PollFd::new(socket.as_fd(), events)];
    poll(&mut polled, PollTimeout::ZERO).map_err(|e| SyscallError::new("poll", socket.name(), e))?;
    Ok(polled[0].any() == Some(true))
}

fn option(socket: &Descriptor, name: i32) -> Result<i32, SyscallError> {
    Ok(socket.option(libc::SOL_SOCKET, name)?.unwrap_or(-1))
}

/// All that waits, from the first on.
fn peek_all(socket: &Descriptor) -> Result<Vec<Message>, SyscallError> {
    let seek = |offset: usize| {
        socket_options::set_int(socket.as_fd(), libc::SOL_SOCKET, SO_PEEK_OFF, offset as i32)
            .map_err(|e| SyscallError::new("setsockopt(SO_PEEK_OFF)", socket.name(), e))
    };
    let (mut messages, mut offset, mut room) = (Vec::new(), 0, ROOM);
    seek(offset)?;
    // An empty message that somebody has peeked at before is not shown (__skb_try_recv_from_queue in net/core/datagram.c).
    while let Some((message, is_whole)) = peek(socket, room)? {
        if is_whole {
            offset += message.bytes.len();
            messages.push(message);
        } else {
            room *= 2;
            seek(offset)?;
        }
    }
    Ok(messages)
}

/// The message that is next to be shown, or as much as there is room for; and whether it is whole. `None`: there is none.
fn peek(socket: &Descriptor, room: usize) -> Result<Option<(Message, bool)>, SyscallError> {
    let failed = |e| SyscallError::new("recvmsg(MSG_PEEK)", socket.name(), e);
    let mut bytes = vec![0; room];
    // SCM_MAX_FD descriptors, credentials, a security context and a pidfd.
    let mut control = nix::cmsg_space!([i32; 253], libc::ucred, [u8; 1024], i32);
    let mut vectors = [IoSliceMut::new(&mut bytes)];
    let flags = MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_CMSG_CLOEXEC;
    let got = match recvmsg::<()>(socket.as_raw_fd(), &mut vectors, Some(&mut control), flags) {
        Ok(got) => got,
        // Nothing there; or one that is not connected, which has no queue.
        Err(nix::Error::EAGAIN | nix::Error::EINVAL | nix::Error::ENOTCONN) => return Ok(None),
        Err(error) => return Err(failed(error)),
    };
    if got.flags.contains(MsgFlags::MSG_CTRUNC) {
        return Err(failed(nix::Error::EMSGSIZE));
    }
    let mut rights = Vec::new();
    for message in got.cmsgs().map_err(failed)? {
        if let ControlMessageOwned::ScmRights(copies) = message {
            // SAFETY: the kernel has just made these copies for us, and nobody else knows of them.
            rights.extend(copies.into_iter().map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }));
        }
    }
    let (len, is_whole) = (got.bytes, !got.flags.contains(MsgFlags::MSG_TRUNC));
    let is_end = len == 0 && is_at_its_end(socket)?;
    bytes.truncate(len);
    Ok((!is_end).then_some((Message { bytes, rights }, is_whole)))
}

/// Whether nothing read from `socket` means that nothing will ever come, and not an empty message.
fn is_at_its_end(socket: &Descriptor) -> Result<bool, SyscallError> {
    Ok(match option(socket, libc::SO_TYPE)? {
        libc::SOCK_STREAM => true,
        libc::SOCK_SEQPACKET => is_ready(socket, PollFlags::from_bits_retain(libc::POLLRDHUP))?,
        _ => false,
    })
}
