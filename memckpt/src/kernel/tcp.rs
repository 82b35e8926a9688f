//! TCP connections seen from outside: their state, and with TCP_REPAIR (Linux 3.5, CONFIG_CHECKPOINT_RESTORE) what waits in
//! their queues. net/ipv4/tcp.c has the facts; no manual page does.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use super::socket_options::{self, bytes, int, set_int};

mod rebuild;

pub use rebuild::{go_on, rebuild};

/// include/uapi/linux/tcp.h
pub const TCP_REPAIR: i32 = 19;
const TCP_REPAIR_QUEUE: i32 = 20;
const TCP_QUEUE_SEQ: i32 = 21;
const TCP_TIMESTAMP: i32 = 24;
const TCP_REPAIR_WINDOW: i32 = 29;
/// Values of TCP_REPAIR.
pub const REPAIR_ON: i32 = 1;
/// Off, without a probe that the peer would see: Linux 4.19.
pub const REPAIR_OFF_NO_WP: i32 = -1;
/// Values of TCP_REPAIR_QUEUE.
const NO_QUEUE: i32 = 0;
const RECV_QUEUE: i32 = 1;
const SEND_QUEUE: i32 = 2;
/// include/uapi/linux/sockios.h: bytes that the peer has not acknowledged, and those of them that were not sent.
const SIOCOUTQ: u64 = 0x5411;
const SIOCOUTQNSD: u64 = 0x894b;
/// TCPI_OPT_TIMESTAMPS, _SACK and _WSCALE.
const OPT_TIMESTAMPS: u8 = 1;
const OPTIONS: u8 = 7;

/// What TCP_INFO says of a socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Info {
    /// Of include/net/tcp_states.h.
    pub state: u8,
    /// TCPI_OPT_TIMESTAMPS, TCPI_OPT_SACK and TCPI_OPT_WSCALE, as agreed with the peer.
    pub options: u8,
    /// By how many bits the windows that the peer tells are shifted, and ours.
    pub window_scales: (u8, u8),
    /// Of a listening socket: how many wait to be accepted.
    pub pending: u32,
    /// Of a listening socket: how many may.
    pub backlog: u32,
}

/// A connection, all of it that makes it go on elsewhere.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Stream {
    /// What was received and not read yet.
    pub received: Vec<u8>,
    /// The sequence number behind it.
    pub received_seq: u32,
    /// What was written, and not acknowledged by the peer yet.
    pub written: Vec<u8>,
    /// The sequence number behind it.
    pub written_seq: u32,
    /// How much of it, at its end, was not sent.
    pub unsent: u32,
    /// As in [`Info`].
    pub options: u8,
    /// As in [`Info`].
    pub window_scales: (u8, u8),
    /// The greatest segment that the peer takes, in bytes.
    pub mss_clamp: u32,
    /// The clock of the timestamps; absent if there are none.
    pub timestamp: Option<u32>,
    /// struct tcp_repair_window: snd_wl1, snd_wnd, max_window, rcv_wnd, rcv_wup.
    pub window: [u32; 5],
}

/// What TCP_INFO says.
///
/// # Errors
/// It is no TCP socket.
pub fn info(socket: BorrowedFd<'_>) -> io::Result<Info> {
    // struct tcp_info: bytes, then words from offset 8. Where an established connection has its unacknowledged and its sacked
    // segments, a listening one has how many wait to be accepted, and how many may (tcp_get_info in net/ipv4/tcp.c).
    let mut info = [0; 32];
    bytes(socket, libc::IPPROTO_TCP, libc::TCP_INFO, &mut info)?.ok_or(io::ErrorKind::Unsupported)?;
    let word = |at: usize| info[at..at + 4].try_into().map_or(0, u32::from_ne_bytes);
    Ok(Info {
        state: info[0],
        options: info[5] & OPTIONS,
        window_scales: (info[6] & 15, info[6] >> 4),
        pending: word(24),
        backlog: word(28),
    })
}

/// Reads a connection that is in repair mode; it stays so, with no queue chosen.
///
/// # Errors
/// It is not in repair mode, or is no connection. EAGAIN: the two ends talked meanwhile.
pub fn read(socket: BorrowedFd<'_>) -> io::Result<Stream> {
    let info = info(socket)?;
    let unacknowledged = queued(socket, SIOCOUTQ)?;
    let (received, received_seq) = queue(socket, RECV_QUEUE, super::descriptor::waiting(socket)?)?;
    let (written, written_seq) = queue(socket, SEND_QUEUE, unacknowledged as usize)?;
    set_int(socket, libc::IPPROTO_TCP, TCP_REPAIR_QUEUE, NO_QUEUE)?;
    let mut window = [0; 20];
    bytes(socket, libc::IPPROTO_TCP, TCP_REPAIR_WINDOW, &mut window)?.ok_or(io::ErrorKind::Unsupported)?;
    let mut words = window.chunks_exact(4).map(|w| w.try_into().map_or(0, u32::from_ne_bytes));
    let option = |name| Ok::<_, io::Error>(int(socket, libc::IPPROTO_TCP, name)?.unwrap_or(0) as u32);
    Ok(Stream {
        received,
        received_seq,
        written,
        written_seq,
        unsent: queued(socket, SIOCOUTQNSD)?,
        options: info.options,
        window_scales: info.window_scales,
        mss_clamp: option(libc::TCP_MAXSEG)?,
        timestamp: match info.options & OPT_TIMESTAMPS {
            0 => None,
            _ => Some(option(TCP_TIMESTAMP)?),
        },
        window: std::array::from_fn(|_| words.next().unwrap_or(0)),
    })
}

/// The content of a queue, which has `len` bytes, and the sequence number behind it.
fn queue(socket: BorrowedFd<'_>, which: i32, len: usize) -> io::Result<(Vec<u8>, u32)> {
    set_int(socket, libc::IPPROTO_TCP, TCP_REPAIR_QUEUE, which)?;
    let end = || int(socket, libc::IPPROTO_TCP, TCP_QUEUE_SEQ).map(|seq| seq.unwrap_or(0) as u32);
    let seq = end()?;
    // One byte more than there should be, to see what came meanwhile.
    let mut bytes = vec![0; len + 1];
    let got = match len {
        // An empty queue of the sender's has nothing to peek at.
        0 => 0,
        _ => nix::sys::socket::recv(
            socket.as_raw_fd(),
            &mut bytes,
            nix::sys::socket::MsgFlags::MSG_PEEK | nix::sys::socket::MsgFlags::MSG_DONTWAIT,
        )?,
    };
    if got != len || end()? != seq {
        return Err(io::Error::from_raw_os_error(libc::EAGAIN));
    }
    bytes.truncate(len);
    Ok((bytes, seq))
}

fn queued(socket: BorrowedFd<'_>, request: u64) -> io::Result<u32> {
    let mut bytes: libc::c_int = 0;
    // SAFETY: both requests write one int.
    let rc = unsafe { libc::ioctl(socket.as_raw_fd(), request, &raw mut bytes) };
    if rc < 0 { Err(io::Error::last_os_error()) } else { Ok(bytes as u32) }
}

/// A connection in repair mode: its end puts it back. A memckpt that is killed meanwhile leaves it so: where the owner may do
/// it itself, it is to be asked instead.
#[derive(Debug)]
pub struct Repaired<'a> {
    socket: BorrowedFd<'a>,
    reuse: i32,
}

impl<'a> Repaired<'a> {
    /// Enters repair mode.
    ///
    /// # Errors
    /// EPERM: CAP_NET_ADMIN is needed.
    pub fn enter(socket: BorrowedFd<'a>) -> io::Result<Self> {
        let reuse = reuse_address(socket)?;
        set_int(socket, libc::IPPROTO_TCP, TCP_REPAIR, REPAIR_ON)?;
        Ok(Self { socket, reuse })
    }
}

impl Drop for Repaired<'_> {
    fn drop(&mut self) {
        let off = set_int(self.socket, libc::IPPROTO_TCP, TCP_REPAIR, REPAIR_OFF_NO_WP)
            // Which leaving resets (do_tcp_setsockopt).
            .and_then(|()| set_int(self.socket, libc::SOL_SOCKET, libc::SO_REUSEADDR, self.reuse));
        if let Err(error) = off {
            tracing::warn!(%error, "a TCP connection stays in repair mode");
        }
    }
}

/// SO_REUSEADDR.
///
/// # Errors
/// The call fails.
pub fn reuse_address(socket: BorrowedFd<'_>) -> io::Result<i32> {
    Ok(socket_options::int(socket, libc::SOL_SOCKET, libc::SO_REUSEADDR)?.unwrap_or(0))
}

/// Whether it is in repair mode.
///
/// # Errors
/// It is no TCP socket.
pub fn is_under_repair(socket: BorrowedFd<'_>) -> io::Result<bool> {
    Ok(int(socket, libc::IPPROTO_TCP, TCP_REPAIR)?.unwrap_or(0) != 0)
}

/// From now on the connection ends without a word to the peer when its last descriptor is closed.
///
/// # Errors
/// EPERM: CAP_NET_ADMIN is needed.
pub fn end_silently(socket: BorrowedFd<'_>) -> io::Result<()> {
    // tcp_close(): a socket under repair is just disconnected.
    set_int(socket, libc::IPPROTO_TCP, TCP_REPAIR, REPAIR_ON)
}

#[cfg(test)]
mod tests {
    use std::io::{Read as _, Write as _};
    use std::net::{TcpListener, TcpStream};
    use std::os::fd::AsFd as _;

    use super::*;

    /// A listener, the end that has connected to it, and the other.
    pub(super) fn connected() -> (TcpListener, TcpStream, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let server = listener.accept().unwrap().0;
        (listener, client, server)
    }

    #[test]
    fn a_connection_is_read_and_goes_on() {
        if !nix::unistd::geteuid().is_root() {
            return;
        }
        let (listener, mut client, mut server) = connected();
        client.write_all(b"question").unwrap();
        server.peek(&mut [0; 8]).unwrap();
        let reuse = reuse_address(server.as_fd()).unwrap();
        let (stream, other) = {
            let _repaired = Repaired::enter(server.as_fd()).unwrap();
            let _other = Repaired::enter(client.as_fd()).unwrap();
            (read(server.as_fd()).unwrap(), read(client.as_fd()).unwrap())
        };
        assert_eq!((&*stream.received, &*stream.written, stream.unsent), (&b"question"[..], &b""[..], 0));
        assert_eq!((stream.received_seq, stream.written_seq), (other.written_seq, other.received_seq));
        assert_eq!((stream.options, stream.window_scales.0), (7, other.window_scales.1));
        assert!(stream.mss_clamp > 1000 && stream.timestamp.is_some() && stream.window[1] > 0, "{stream:?}");
        assert_eq!(reuse_address(server.as_fd()).unwrap(), reuse);
        let mut heard = [0; 8];
        server.read_exact(&mut heard).unwrap();
        server.write_all(b"answer").unwrap();
        client.read_exact(&mut heard[..6]).unwrap();
        assert_eq!(&heard[..6], b"answer");
        assert_eq!(info(listener.as_fd()).unwrap().state, 10);
        assert!(read(server.as_fd()).is_err(), "not in repair mode");
    }

    #[test]
    fn it_ends_without_a_word() {
        if !nix::unistd::geteuid().is_root() {
            return;
        }
        let (_listener, mut client, server) = connected();
        end_silently(server.as_fd()).unwrap();
        drop(server);
        client.set_read_timeout(Some(std::time::Duration::from_millis(100))).unwrap();
        let heard = client.read(&mut [0; 1]);
        assert_eq!(heard.unwrap_err().kind(), io::ErrorKind::WouldBlock);
    }
}
