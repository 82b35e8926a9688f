//! Making a connection again, under repair: its peer hears nothing of it. The steps and their order are those of
//! do_tcp_setsockopt(), tcp_v4_connect() and tcp_sendmsg_locked() in net/ipv4.

use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

use nix::sys::socket::{MsgFlags, SockaddrStorage, bind, connect, send};

use crate::kernel::socket_options::{set, set_int};

use super::{
    NO_QUEUE, OPT_TIMESTAMPS, RECV_QUEUE, REPAIR_ON, SEND_QUEUE, Stream, TCP_QUEUE_SEQ, TCP_REPAIR,
    TCP_REPAIR_QUEUE, TCP_REPAIR_WINDOW, TCP_TIMESTAMP,
};

/// include/uapi/linux/tcp.h
const TCP_REPAIR_OPTIONS: i32 = 22;
/// Value of TCP_REPAIR: off, with a probe that has the peer tell where it stands.
const REPAIR_OFF: i32 = 0;
/// TCPI_OPT_SACK and TCPI_OPT_WSCALE.
const OPT_SACK: u8 = 2;
const OPT_WSCALE: u8 = 4;
/// Options of the header (include/net/tcp.h), as TCP_REPAIR_OPTIONS takes them.
const MSS: u32 = 2;
const WINDOW: u32 = 3;
const SACK_PERMITTED: u32 = 4;
const TIMESTAMP: u32 = 8;
/// How much is put into a queue at once. What is received has each time one buffer, of contiguous memory.
const PIECE: usize = 32 << 10;
/// What a buffer takes more than its bytes, at most.
const OVERHEAD: usize = 4;

/// Makes `socket`, a new one for TCP, the end `local` of a connection with `remote`. It stays under repair.
///
/// # Errors
/// EPERM: CAP_NET_ADMIN is needed. EADDRNOTAVAIL: `local` is not an address of this machine, or there is such a connection.
pub fn rebuild(
    socket: BorrowedFd<'_>,
    local: SocketAddr,
    remote: SocketAddr,
    stream: &Stream,
) -> io::Result<()> {
    let tcp = |name, value: i32| set_int(socket, libc::IPPROTO_TCP, name, value);
    tcp(TCP_REPAIR, REPAIR_ON)?;
    for (queue, end, bytes) in [
        (RECV_QUEUE, stream.received_seq, stream.received.len()),
        (SEND_QUEUE, stream.written_seq, stream.written.len()),
    ] {
        tcp(TCP_REPAIR_QUEUE, queue)?;
        tcp(TCP_QUEUE_SEQ, end.wrapping_sub(bytes as u32).cast_signed())?;
    }
    bind(socket.as_raw_fd(), &SockaddrStorage::from(local))?;
    connect(socket.as_raw_fd(), &SockaddrStorage::from(remote))?;
    set(socket, libc::IPPROTO_TCP, TCP_REPAIR_OPTIONS, &agreed(stream))?;
    if let Some(timestamp) = stream.timestamp {
        tcp(TCP_TIMESTAMP, timestamp.cast_signed())?;
    }
    for (option, len) in
        [(libc::SO_RCVBUFFORCE, stream.received.len()), (libc::SO_SNDBUFFORCE, stream.written.len())]
    {
        let room = i32::try_from((len + PIECE) * OVERHEAD).unwrap_or(i32::MAX);
        set_int(socket, libc::SOL_SOCKET, option, room)?;
    }
    tcp(TCP_REPAIR_QUEUE, RECV_QUEUE)?;
    put(socket, &stream.received)?;
    tcp(TCP_REPAIR_QUEUE, SEND_QUEUE)?;
    put(socket, &stream.written[..stream.written.len().saturating_sub(stream.unsent as usize)])?;
    tcp(TCP_REPAIR_QUEUE, NO_QUEUE)?;
    let window: Vec<u8> = stream.window.iter().flat_map(|word| word.to_ne_bytes()).collect();
    set(socket, libc::IPPROTO_TCP, TCP_REPAIR_WINDOW, &window)
}

/// Ends the repair of a connection made by [`rebuild`], tells the peer where it stands, and sends what was not sent yet.
///
/// # Errors
/// A call fails.
pub fn go_on(socket: impl AsFd, stream: &Stream) -> io::Result<()> {
    let socket = socket.as_fd();
    set_int(socket, libc::IPPROTO_TCP, TCP_REPAIR, REPAIR_OFF)?;
    put(socket, &stream.written[stream.written.len().saturating_sub(stream.unsent as usize)..])
}

/// What the two ends agreed on: struct tcp_repair_opt, two words each.
fn agreed(stream: &Stream) -> Vec<u8> {
    let mut options = vec![[MSS, stream.mss_clamp]];
    if stream.options & OPT_WSCALE != 0 {
        let (theirs, ours) = stream.window_scales;
        options.push([WINDOW, u32::from(theirs) | u32::from(ours) << 16]);
    }
    if stream.options & OPT_SACK != 0 {
        options.push([SACK_PERMITTED, 0]);
    }
    if stream.options & OPT_TIMESTAMPS != 0 {
        options.push([TIMESTAMP, 0]);
    }
    options.iter().flatten().flat_map(|word| word.to_ne_bytes()).collect()
}

fn put(socket: BorrowedFd<'_>, mut bytes: &[u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        let piece = &bytes[..PIECE.min(bytes.len())];
        let done = send(socket.as_raw_fd(), piece, MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL)?;
        bytes = &bytes[done..];
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::io::{Read as _, Write as _};
    use std::net::TcpStream;

    use nix::sys::socket::{AddressFamily, SockFlag, SockType, recv, socket};

    use super::*;
    use crate::kernel::tcp::{self, tests::connected};

    /// Under repair an end is closed without a word, and made again; what waited in both its queues is there.
    #[test]
    fn the_peer_notices_nothing() {
        if !nix::unistd::geteuid().is_root() {
            return;
        }
        let (_listener, mut client, server) = connected();
        let question = vec![7; 40_000];
        client.write_all(&question).unwrap();
        let mut seen = vec![0; question.len()];
        let peek = MsgFlags::MSG_PEEK | MsgFlags::MSG_WAITALL;
        assert_eq!(recv(server.as_raw_fd(), &mut seen, peek).unwrap(), question.len());
        let (local, remote) = (server.local_addr().unwrap(), server.peer_addr().unwrap());
        tcp::end_silently(server.as_fd()).unwrap();
        let stream = tcp::read(server.as_fd()).unwrap();
        drop(server);
        let again = socket(AddressFamily::Inet, SockType::Stream, SockFlag::SOCK_CLOEXEC, None).unwrap();
        rebuild(again.as_fd(), local, remote, &stream).unwrap();
        go_on(&again, &stream).unwrap();
        let mut server = TcpStream::from(again);
        let mut heard = vec![0; question.len()];
        server.read_exact(&mut heard).unwrap();
        assert_eq!(heard, question);
        server.write_all(b"answer").unwrap();
        client.read_exact(&mut heard[..6]).unwrap();
        assert_eq!(&heard[..6], b"answer");
        drop(server);
        assert_eq!(client.read(&mut heard).unwrap(), 0);
    }
}
