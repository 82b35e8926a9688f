//! UDP and TCP: sockets that are bound, listen, or are one end of a connection.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::{AsFd as _, AsRawFd as _, OwnedFd};

use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, SockFlag, SockProtocol, SockType, SockaddrStorage, bind, connect, listen, socket,
};

use crate::image::chain::Member;
use crate::image::proto::{InetSkEntry, TcpStreamEntry};
use crate::image::{ImageKind, magic};
use crate::kernel::nftables::{self, Block, Connection};
use crate::kernel::sock_diag::state::{CLOSE, ESTABLISHED, LISTEN};
use crate::kernel::tcp::{self, Stream};
use crate::kernel::{SyscallError, socket_options};
use crate::restore::checkpoint::Checkpoint;
use crate::restore::error::{Refusal, RestoreError};

use super::super::{copy, set_flags};
use super::options::{self, settle};

/// The connections of a tree, whose peers hear nothing of them until they go on.
#[derive(Debug, Default)]
pub(in crate::restore) struct Connections {
    made: Vec<(OwnedFd, InetSkEntry, Stream)>,
    /// Holds back their packets.
    block: Option<Block>,
}

impl Connections {
    /// Has the packets of all connections held back from now on.
    pub(in crate::restore::files) fn block<'a>(
        entries: impl Iterator<Item = &'a InetSkEntry>,
    ) -> Result<Self, RestoreError> {
        let mut connections = Vec::new();
        for entry in entries.filter(|entry| is_connection(entry)) {
            connections.push(Connection { local: local(entry)?, remote: remote(entry)? });
        }
        let block = match connections.is_empty() {
            true => None,
            false => Some(Block::new(&format!("memckpt-{}", std::process::id()), &connections)?),
        };
        Ok(Self { made: Vec::new(), block })
    }

    /// Lets them go on: the last thing before the tree does.
    pub(in crate::restore) fn go_on(mut self, checkpoint: &Checkpoint) -> Result<(), RestoreError> {
        if self.made.is_empty() {
            return Ok(());
        }
        // The dump has left a table that holds back the packets: by its name since CRIU 4.1, by the root's PID before.
        let name = &checkpoint.member().inventory().dump_criu_run_id;
        let tables = [name.clone().unwrap_or_default(), checkpoint.root().pid.to_string()];
        for table in tables.iter().filter(|table| !table.is_empty()) {
            match nftables::unblock(&format!("CRIU-{table}")) {
                Err(error) if error.errno() == Some(libc::ENOENT) => {}
                other => other?,
            }
        }
        drop(self.block.take());
        for (socket, entry, stream) in &self.made {
            tcp::go_on(socket, stream).map_err(|e| SyscallError::new("TCP_REPAIR", shown(entry), e))?;
            settle_all(socket, entry)?;
        }
        Ok(())
    }

    /// Makes a socket of IPv4 or IPv6.
    pub(in crate::restore::files) fn open(
        &mut self,
        pid: i32,
        entry: &InetSkEntry,
        member: &Member,
    ) -> Result<OwnedFd, RestoreError> {
        let made = new(pid, entry)?;
        let connects = entry.dst_port != 0;
        match (entry.proto as i32, entry.state as u8) {
            (libc::IPPROTO_TCP, ESTABLISHED) => {
                self.connection(&made, entry, member)?;
                return Ok(made);
            }
            (libc::IPPROTO_TCP, LISTEN) => {
                bind_to_address(&made, entry)?;
                listen(&made, options::backlog(entry.backlog)).map_err(|e| failed("listen", entry, e))?;
            }
            (libc::IPPROTO_TCP, CLOSE) | (libc::IPPROTO_UDP, _) => {
                if entry.src_port != 0 {
                    bind_to_address(&made, entry)?;
                }
                if connects {
                    connect(made.as_raw_fd(), &SockaddrStorage::from(remote(entry)?))
                        .map_err(|e| failed("connect", entry, e))?;
                }
            }
            (protocol, state) => {
                let what = format!("{} (protocol {protocol}, state {state})", shown(entry));
                let reason = "is of a kind that memckpt does not restore".to_owned();
                return Err(Refusal::File { pid, what, reason }.into());
            }
        }
        settle_all(&made, entry)?;
        Ok(made)
    }

    fn connection(
        &mut self,
        socket: &OwnedFd,
        entry: &InetSkEntry,
        member: &Member,
    ) -> Result<(), RestoreError> {
        let name = magic::tcp_stream_name(entry.ino);
        let content = member.with_bytes(&name, ImageKind::TcpStream, |stream: &TcpStreamEntry| {
            u64::from(stream.inq_len) + u64::from(stream.outq_len)
        })?;
        let Some((stream, bytes)) = content.into_iter().next() else {
            return Err(RestoreError::Missing { path: member.path().to_owned(), file: name, hint: "" });
        };
        let stream = of_image(&stream, &bytes);
        tcp::rebuild(socket.as_fd(), local(entry)?, remote(entry)?, &stream).map_err(|e| {
            match e.raw_os_error() {
                Some(libc::EADDRNOTAVAIL | libc::EADDRINUSE) => {
                    let what =
                        format!("{}: its address is not one of this machine, or is in use", shown(entry));
                    Refusal::Checkpoint(what).into()
                }
                _ => RestoreError::from(SyscallError::new("TCP_REPAIR", shown(entry), e)),
            }
        })?;
        self.made.push((copy(socket)?, entry.clone(), stream));
        Ok(())
    }
}

/// Whether it is one end of a connection.
pub(in crate::restore::files) fn is_connection(entry: &InetSkEntry) -> bool {
    entry.proto as i32 == libc::IPPROTO_TCP && entry.state == u32::from(ESTABLISHED)
}

/// What stands between kernel and image, as `tcp_stream` of the dump writes it.
fn of_image(entry: &TcpStreamEntry, bytes: &[u8]) -> Stream {
    let (received, written) = bytes.split_at(bytes.len().min(entry.inq_len as usize));
    Stream {
        received: received.to_vec(),
        received_seq: entry.inq_seq,
        written: written.to_vec(),
        written_seq: entry.outq_seq,
        unsent: entry.unsq_len.unwrap_or(0).min(entry.outq_len),
        options: entry.opt_mask as u8,
        window_scales: (entry.snd_wscale as u8, entry.rcv_wscale.unwrap_or(0) as u8),
        mss_clamp: entry.mss_clamp,
        timestamp: entry.timestamp,
        window: [entry.snd_wl1, entry.snd_wnd, entry.max_window, entry.rcv_wnd, entry.rcv_wup]
            .map(|word| word.unwrap_or(0)),
    }
}

fn new(pid: i32, entry: &InetSkEntry) -> Result<OwnedFd, RestoreError> {
    let kind = match (entry.proto as i32, entry.r#type as i32) {
        (libc::IPPROTO_TCP, libc::SOCK_STREAM) => (SockType::Stream, SockProtocol::Tcp),
        (libc::IPPROTO_UDP, libc::SOCK_DGRAM) => (SockType::Datagram, SockProtocol::Udp),
        (protocol, kind) => {
            let what = format!("internet socket of type {kind}, protocol {protocol}");
            let reason = "is of a kind that memckpt does not restore".to_owned();
            return Err(Refusal::File { pid, what, reason }.into());
        }
    };
    let family = if is_v6(entry) { AddressFamily::Inet6 } else { AddressFamily::Inet };
    let made =
        socket(family, kind.0, SockFlag::SOCK_CLOEXEC, kind.1).map_err(|e| failed("socket", entry, e))?;
    // What matters when it gets its address. Ports of connections that have just ended are not free otherwise.
    options::bind_to_device(&made, &entry.opts)?;
    let set = |level, name, value: bool| -> Result<(), SyscallError> {
        socket_options::set_int(made.as_fd(), level, name, value.into())
            .map_err(|e| SyscallError::new("setsockopt", shown(entry), e))
    };
    set(libc::SOL_SOCKET, libc::SO_REUSEADDR, true)?;
    set(libc::SOL_SOCKET, libc::SO_REUSEPORT, entry.opts.so_reuseport.unwrap_or(false))?;
    let ip = entry.ip_opts.as_ref();
    let freebind = ip.and_then(|ip| ip.freebind).unwrap_or(false);
    if is_v6(entry) {
        set(libc::IPPROTO_IPV6, libc::IPV6_V6ONLY, entry.v6only.unwrap_or(false))?;
        set(libc::IPPROTO_IPV6, libc::IPV6_FREEBIND, freebind)?;
    } else {
        set(libc::IPPROTO_IP, libc::IP_FREEBIND, freebind)?;
    }
    Ok(made)
}

/// All that does not matter to how it comes about, or stands in its way.
fn settle_all(socket: &OwnedFd, entry: &InetSkEntry) -> Result<(), RestoreError> {
    if let Some(ip) = &entry.ip_opts {
        let (level, pktinfo) = match is_v6(entry) {
            true => (libc::IPPROTO_IPV6, libc::IPV6_RECVPKTINFO),
            false => (libc::IPPROTO_IP, libc::IP_PKTINFO),
        };
        settle(socket, level, pktinfo, ip.pktinfo.map(u32::from))?;
        // Which changes the priority.
        settle(socket, libc::IPPROTO_IP, libc::IP_TOS, ip.tos)?;
        settle(socket, libc::IPPROTO_IP, libc::IP_TTL, ip.ttl)?;
    }
    options::set(socket, &entry.opts)?;
    if entry.proto as i32 == libc::IPPROTO_TCP {
        let tcp = entry.tcp_opts.clone().unwrap_or_default();
        let opts = &entry.opts;
        for (name, value) in [
            (libc::TCP_KEEPCNT, tcp.keepcnt.or(opts.tcp_keepcnt)),
            (libc::TCP_KEEPIDLE, tcp.keepidle.or(opts.tcp_keepidle)),
            (libc::TCP_KEEPINTVL, tcp.keepintvl.or(opts.tcp_keepintvl)),
            (libc::TCP_NODELAY, tcp.nodelay.map(u32::from)),
            (libc::TCP_CORK, tcp.cork.map(u32::from)),
        ] {
            settle(socket, libc::IPPROTO_TCP, name, value)?;
        }
    }
    Ok(set_flags(socket, entry.flags)?)
}

fn bind_to_address(socket: &OwnedFd, entry: &InetSkEntry) -> Result<(), RestoreError> {
    match bind(socket.as_raw_fd(), &SockaddrStorage::from(local(entry)?)) {
        Ok(()) => Ok(()),
        Err(Errno::EADDRINUSE) => {
            let what = format!("{}: its port is in use: end its user first", shown(entry));
            Err(Refusal::Checkpoint(what).into())
        }
        Err(e) => Err(failed("bind", entry, e).into()),
    }
}

fn is_v6(entry: &InetSkEntry) -> bool {
    entry.family as i32 == libc::AF_INET6
}

fn local(entry: &InetSkEntry) -> Result<SocketAddr, RestoreError> {
    address(entry, &entry.src_addr, entry.src_port)
}

fn remote(entry: &InetSkEntry) -> Result<SocketAddr, RestoreError> {
    address(entry, &entry.dst_addr, entry.dst_port)
}

/// An address of an image: words in the order of the network.
fn address(entry: &InetSkEntry, words: &[u32], port: u32) -> Result<SocketAddr, RestoreError> {
    let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_ne_bytes()).collect();
    let ip = match (is_v6(entry), <[u8; 4]>::try_from(&*bytes), <[u8; 16]>::try_from(&*bytes)) {
        (false, Ok(v4), _) => IpAddr::V4(Ipv4Addr::from(v4)),
        (true, _, Ok(v6)) => IpAddr::V6(Ipv6Addr::from(v6)),
        _ => {
            let what = format!("internet socket {} has an address of {} words", entry.id, words.len());
            return Err(Refusal::Checkpoint(what).into());
        }
    };
    match u16::try_from(port) {
        Ok(port) => Ok(SocketAddr::new(ip, port)),
        Err(_) => Err(Refusal::Checkpoint(format!("internet socket {} has port {port}", entry.id)).into()),
    }
}

/// What users know it by.
fn shown(entry: &InetSkEntry) -> String {
    let protocol = if entry.proto as i32 == libc::IPPROTO_TCP { "TCP" } else { "UDP" };
    match (local(entry), remote(entry)) {
        (Ok(local), Ok(remote)) if entry.dst_port != 0 => format!("{protocol} socket {local} to {remote}"),
        (Ok(local), _) => format!("{protocol} socket {local}"),
        _ => format!("{protocol} socket:[{}]", entry.ino),
    }
}

fn failed(call: &'static str, entry: &InetSkEntry, error: impl Into<io::Error>) -> SyscallError {
    SyscallError::new(call, shown(entry), error)
}
