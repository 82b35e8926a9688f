//! UDP and TCP.

use std::net::SocketAddr;
use std::os::fd::AsFd as _;

use crate::dump::error::DumpError;
use crate::image::proto::{FdTypes, FileEntry, InetSkEntry, IpOptsEntry, TcpOptsEntry, TcpStreamEntry};
use crate::kernel::SyscallError;
use crate::kernel::descriptor::Descriptor;
use crate::kernel::inet;
use crate::kernel::sock_diag::state::{CLOSE, ESTABLISHED, LISTEN};
use crate::kernel::socket_options;
use crate::kernel::tcp::{self, Stream};

use super::super::collector::{Collector, owner};
use super::super::refusal::refuse_descriptor;
use super::options::{self, flag, general, number};

impl Collector<'_> {
    pub(super) fn inet_socket(&mut self, found: &Descriptor, id: u32) -> Result<FileEntry, DumpError> {
        let kind = general(found, libc::SO_TYPE)? as i32;
        let protocol = general(found, libc::SO_PROTOCOL)? as i32;
        let failed = |e| SyscallError::new("getsockname", found.name(), e);
        let ours = Some(inet::local(found.as_fd()).map_err(failed)?);
        let theirs = inet::remote(found.as_fd()).map_err(failed)?;
        let (state, backlog) = match protocol {
            libc::IPPROTO_TCP => self.tcp_state(found)?,
            libc::IPPROTO_UDP => {
                self.note_datagrams(found)?;
                (if theirs.is_some() { ESTABLISHED } else { CLOSE }, 0)
            }
            _ => {
                return Err(refuse_descriptor(
                    found,
                    format!("internet socket of protocol {protocol}"),
                    "is of a kind that memckpt does not capture: close it first",
                ));
            }
        };
        let family = general(found, libc::SO_DOMAIN)?;
        let tcp = protocol == libc::IPPROTO_TCP;
        let mut opts = options::of(found)?;
        let tcp_opts = tcp.then(|| tcp_options(found)).transpose()?;
        if let Some(tcp) = &tcp_opts {
            (opts.tcp_keepcnt, opts.tcp_keepidle, opts.tcp_keepintvl) =
                (tcp.keepcnt, tcp.keepidle, tcp.keepintvl);
        }
        let port = |address: &Option<SocketAddr>| address.as_ref().map_or(0, |a| u32::from(a.port()));
        let words = |address: &Option<SocketAddr>| words(address.as_ref(), family as i32);
        let socket = InetSkEntry {
            id,
            ino: found.stat.st_ino as u32,
            family,
            r#type: kind as u32,
            proto: protocol as u32,
            state: u32::from(state),
            src_port: port(&ours),
            dst_port: port(&theirs),
            flags: found.info.file_flags(),
            backlog,
            src_addr: words(&ours),
            dst_addr: words(&theirs),
            fown: owner(found)?,
            opts,
            v6only: match family as i32 {
                libc::AF_INET6 => number(found, libc::IPPROTO_IPV6, libc::IPV6_V6ONLY)?.map(|only| only != 0),
                _ => None,
            },
            ip_opts: Some(ip_options(found, family as i32)?),
            ifname: None,
            ns_id: None,
            shutdown: None,
            tcp_opts,
        };
        Ok(FileEntry { r#type: FdTypes::Inetsk as i32, id, isk: Some(socket), ..FileEntry::default() })
    }

    /// The state of a TCP socket, and the backlog of one that listens.
    fn tcp_state(&mut self, found: &Descriptor) -> Result<(u8, u32), DumpError> {
        let info = tcp::info(found.as_fd())
            .map_err(|e| SyscallError::new("getsockopt(TCP_INFO)", found.name(), e))?;
        match info.state {
            LISTEN if info.pending > 0 => {
                self.passing(refuse_descriptor(
                    found,
                    "listening TCP socket",
                    "has connections that wait to be accepted: try again when they are",
                ))?;
                Ok((LISTEN, info.backlog))
            }
            LISTEN => Ok((LISTEN, info.backlog)),
            CLOSE => Ok((CLOSE, 0)),
            ESTABLISHED if self.options.tcp_established => self.stream(found),
            ESTABLISHED => {
                Err(refuse_descriptor(found, "TCP connection", "is captured with --tcp-established only"))
            }
            _ => {
                self.passing(half_a_connection(found))?;
                Ok((info.state, 0))
            }
        }
    }

    /// An established connection, as it was read.
    fn stream(&mut self, found: &Descriptor) -> Result<(u8, u32), DumpError> {
        let mut layer = [0; 16];
        let len = socket_options::bytes(found.as_fd(), libc::IPPROTO_TCP, libc::TCP_ULP, &mut layer)
            .map_err(|e| SyscallError::new("getsockopt(TCP_ULP)", found.name(), e))?;
        if len.is_some_and(|len| len > 0) {
            let name = String::from_utf8_lossy(&layer).trim_end_matches('\0').to_owned();
            let reason =
                format!("has {name} on top of it in the kernel, whose state cannot be read: close it first");
            return Err(refuse_descriptor(found, "TCP connection", reason));
        }
        let inode = found.stat.st_ino;
        match self.sockets.and_then(|(streams, _)| streams.get(&inode)) {
            Some(stream) => {
                let bytes = [&*stream.received, &*stream.written].concat();
                self.out.streams.push((inode as u32, tcp_stream(stream), bytes));
            }
            None => self.passing(half_a_connection(found))?,
        }
        Ok((ESTABLISHED, 0))
    }

    /// CRIU's format has no place for datagrams of UDP, which may be lost at any time.
    fn note_datagrams(&mut self, found: &Descriptor) -> Result<(), DumpError> {
        if found.waiting()? > 0 {
            self.notes.push(format!(
                "process {}, descriptor {}: datagrams that wait to be received are not in the checkpoint",
                found.pid, found.fd
            ));
        }
        Ok(())
    }
}

/// A connection that its two ends do not both have.
fn half_a_connection(found: &Descriptor) -> DumpError {
    let reason = "is being made, or was closed by one of its ends: try again later, or close it first";
    refuse_descriptor(found, "TCP connection", reason)
}

fn tcp_stream(stream: &Stream) -> TcpStreamEntry {
    let [snd_wl1, snd_wnd, max_window, rcv_wnd, rcv_wup] = stream.window.map(Some);
    TcpStreamEntry {
        inq_len: stream.received.len() as u32,
        inq_seq: stream.received_seq,
        outq_len: stream.written.len() as u32,
        outq_seq: stream.written_seq,
        opt_mask: stream.options.into(),
        snd_wscale: stream.window_scales.0.into(),
        mss_clamp: stream.mss_clamp,
        rcv_wscale: Some(stream.window_scales.1.into()),
        timestamp: stream.timestamp,
        cork: None,
        nodelay: None,
        unsq_len: Some(stream.unsent),
        snd_wl1,
        snd_wnd,
        max_window,
        rcv_wnd,
        rcv_wup,
    }
}

/// An address as the image has it: words in the order of the network.
fn words(address: Option<&SocketAddr>, family: i32) -> Vec<u32> {
    let of = |bytes: &[u8]| {
        bytes.chunks_exact(4).map(|word| word.try_into().map_or(0, u32::from_ne_bytes)).collect()
    };
    match address {
        Some(SocketAddr::V4(address)) => of(&address.ip().octets()),
        Some(SocketAddr::V6(address)) => of(&address.ip().octets()),
        None if family == libc::AF_INET6 => vec![0; 4],
        None => vec![0],
    }
}

fn tcp_options(found: &Descriptor) -> Result<TcpOptsEntry, DumpError> {
    let number = |name| number(found, libc::IPPROTO_TCP, name);
    let flag = |name| Ok::<_, DumpError>(flag(found, libc::IPPROTO_TCP, name)?.filter(|set| *set));
    Ok(TcpOptsEntry {
        cork: flag(libc::TCP_CORK)?,
        nodelay: flag(libc::TCP_NODELAY)?,
        keepcnt: number(libc::TCP_KEEPCNT)?,
        keepidle: number(libc::TCP_KEEPIDLE)?,
        keepintvl: number(libc::TCP_KEEPINTVL)?,
    })
}

fn ip_options(found: &Descriptor, family: i32) -> Result<IpOptsEntry, DumpError> {
    let v6 = family == libc::AF_INET6;
    let (level, pktinfo) =
        if v6 { (libc::IPPROTO_IPV6, libc::IPV6_RECVPKTINFO) } else { (libc::IPPROTO_IP, libc::IP_PKTINFO) };
    let freebind = if v6 { libc::IPV6_FREEBIND } else { libc::IP_FREEBIND };
    Ok(IpOptsEntry {
        freebind: flag(found, level, freebind)?.filter(|set| *set),
        raw: None,
        pktinfo: flag(found, level, pktinfo)?.filter(|set| *set),
        tos: number(found, libc::IPPROTO_IP, libc::IP_TOS)?.filter(|tos| *tos != 0),
        ttl: None,
    })
}
