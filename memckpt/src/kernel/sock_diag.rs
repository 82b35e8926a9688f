//! sock_diag(7): what only netlink tells of sockets.

use nix::sys::socket::SockProtocol;

use super::SyscallError;
use super::netlink::{self, HEADER, Netlink};

/// linux/sock_diag.h and linux/unix_diag.h.
const SOCK_DIAG_BY_FAMILY: u16 = 20;
const UDIAG_SHOW: u32 = SHOW_NAME | SHOW_PEER | SHOW_ICONS | SHOW_RQLEN;
const SHOW_NAME: u32 = 0x1;
const SHOW_PEER: u32 = 0x4;
const SHOW_ICONS: u32 = 0x8;
const SHOW_RQLEN: u32 = 0x10;
const UNIX_DIAG_NAME: u16 = 0;
const UNIX_DIAG_PEER: u16 = 2;
const UNIX_DIAG_ICONS: u16 = 3;
const UNIX_DIAG_RQLEN: u16 = 4;
const UNIX_DIAG_SHUTDOWN: u16 = 6;

/// struct unix_diag_msg, behind the header.
const UNIX_DIAG_MSG: usize = 16;

/// The states of a socket that matter to a checkpoint (include/net/tcp_states.h; unix sockets and UDP use them too).
pub mod state {
    /// TCP_ESTABLISHED
    pub const ESTABLISHED: u8 = 1;
    /// TCP_CLOSE
    pub const CLOSE: u8 = 7;
    /// TCP_LISTEN
    pub const LISTEN: u8 = 10;
}

/// A unix socket.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct UnixSocket {
    /// SOCK_STREAM, SOCK_DGRAM or SOCK_SEQPACKET.
    pub kind: u8,
    /// One of [`state`].
    pub state: u8,
    /// What it is bound to: a path, or an abstract name, which begins with a zero byte.
    pub name: Option<Vec<u8>>,
    /// The inode of the socket at the other end.
    pub peer: Option<u32>,
    /// How many connections wait to be accepted.
    pub pending: usize,
    /// Bytes that wait to be read.
    pub received: u32,
    /// The backlog of a listening socket; of others, bytes sent and not yet read.
    pub backlog: u32,
    /// Bit 0: shut down for reading; bit 1: for writing.
    pub shutdown: u8,
}

/// A netlink socket for questions about sockets of our network namespace.
#[derive(Debug)]
pub struct SockDiag(Netlink);

impl SockDiag {
    /// Opens one.
    ///
    /// # Errors
    /// The kernel has no sock_diag.
    pub fn open() -> Result<Self, SyscallError> {
        let socket = Netlink::open(SockProtocol::NetlinkSockDiag)
            .map_err(|e| SyscallError::new("socket", "NETLINK_SOCK_DIAG", e))?;
        Ok(Self(socket))
    }

    /// The unix socket with inode `inode`.
    ///
    /// # Errors
    /// ENOENT: there is none, or the kernel is without unix_diag.
    pub fn unix(&self, inode: u32) -> Result<UnixSocket, SyscallError> {
        let object = || format!("unix socket {inode}");
        // struct unix_diag_req: family, protocol, padding, all states, inode, what to show, any cookie.
        let mut body = vec![libc::AF_UNIX as u8, 0, 0, 0];
        for word in [u32::MAX, inode, UDIAG_SHOW, u32::MAX, u32::MAX] {
            body.extend(word.to_ne_bytes());
        }
        let request = netlink::message(SOCK_DIAG_BY_FAMILY, 0, 0, &[&body]);
        self.0.send(&request).map_err(|e| SyscallError::new("sendto", object(), e))?;
        let answer = self.0.receive(8192).map_err(|e| SyscallError::new("recv", object(), e))?;
        parse(&answer).map_err(|errno| {
            SyscallError::new("sock_diag", object(), std::io::Error::from_raw_os_error(errno))
        })
    }
}

/// The socket in an answer, or an errno.
fn parse(answer: &[u8]) -> Result<UnixSocket, i32> {
    if let Some(errno) = netlink::error(answer) {
        return Err(errno);
    }
    let kind = answer.get(4..6).and_then(|b| b.try_into().ok()).map(u16::from_ne_bytes);
    if kind != Some(SOCK_DIAG_BY_FAMILY) {
        return Err(libc::EBADMSG);
    }
    let message = answer.get(HEADER..HEADER + UNIX_DIAG_MSG).ok_or(libc::EBADMSG)?;
    let mut socket = UnixSocket { kind: message[1], state: message[2], ..UnixSocket::default() };
    let mut rest = &answer[HEADER + UNIX_DIAG_MSG..];
    // struct rtattr: length with header, type; padded to four bytes.
    while rest.len() >= 4 {
        let len = usize::from(u16::from_ne_bytes([rest[0], rest[1]]));
        let value = rest.get(4..len).ok_or(libc::EBADMSG)?;
        match u16::from_ne_bytes([rest[2], rest[3]]) {
            UNIX_DIAG_NAME => socket.name = Some(value.to_vec()),
            UNIX_DIAG_PEER => socket.peer = word(value, 0).filter(|peer| *peer != 0),
            UNIX_DIAG_ICONS => socket.pending = value.len() / 4,
            UNIX_DIAG_RQLEN => {
                socket.received = word(value, 0).unwrap_or(0);
                socket.backlog = word(value, 4).unwrap_or(0);
            }
            UNIX_DIAG_SHUTDOWN => socket.shutdown = value.first().copied().unwrap_or(0),
            _ => {}
        }
        rest = rest.get(len.next_multiple_of(4)..).unwrap_or_default();
    }
    Ok(socket)
}

fn word(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;
    use std::os::fd::AsRawFd;
    use std::os::linux::net::SocketAddrExt as _;
    use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};

    use super::*;

    fn inode(socket: &impl AsRawFd) -> u32 {
        let link = std::fs::read_link(format!("/proc/self/fd/{}", socket.as_raw_fd())).unwrap();
        link.to_str().unwrap().trim_matches(|c: char| !c.is_ascii_digit()).parse().unwrap()
    }

    #[test]
    fn pairs_and_listeners_are_told() {
        let diag = SockDiag::open().unwrap();
        let (mut a, b) = UnixStream::pair().unwrap();
        a.write_all(b"seven b").unwrap();
        a.shutdown(std::net::Shutdown::Write).unwrap();
        let (told_a, told_b) = (diag.unix(inode(&a)).unwrap(), diag.unix(inode(&b)).unwrap());
        assert_eq!((told_a.peer, told_b.peer), (Some(inode(&b)), Some(inode(&a))));
        assert_eq!((told_b.kind, told_b.state, told_b.received), (1, 1, 7));
        assert_eq!((told_a.shutdown, told_b.shutdown), (2, 1));
        let name = format!("memckpt-sock-diag-{}", std::process::id());
        let address = SocketAddr::from_abstract_name(&name).unwrap();
        let listener = UnixListener::bind_addr(&address).unwrap();
        let _client = UnixStream::connect_addr(&address).unwrap();
        let told = diag.unix(inode(&listener)).unwrap();
        assert_eq!((told.state, told.pending, told.peer), (10, 1, None));
        assert_eq!(told.name.unwrap(), [&[0], name.as_bytes()].concat());
        assert_eq!(diag.unix(1).unwrap_err().errno(), Some(libc::ENOENT));
    }

    #[test]
    fn bad_answers_are_no_sockets() {
        for bad in [&[][..], &[0; 8], &[36, 0, 0, 0, 20, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1]] {
            assert_eq!(parse(bad), Err(libc::EBADMSG));
        }
        let mut long = vec![0; HEADER + UNIX_DIAG_MSG];
        long[4] = SOCK_DIAG_BY_FAMILY as u8;
        assert!(parse(&long).is_ok());
        long.extend([200, 0, 0, 0]);
        assert_eq!(parse(&long), Err(libc::EBADMSG), "an attribute that breaks off");
    }
}
