//! The options of SOL_SOCKET, which all families have.

use std::os::fd::AsFd as _;

use crate::dump::error::DumpError;
use crate::image::proto::SkOptsEntry;
use crate::kernel::SyscallError;
use crate::kernel::descriptor::Descriptor;
use crate::kernel::socket_options;

/// include/uapi/asm-generic/socket.h, Linux 5.14.
const SO_BUF_LOCK: i32 = 72;

/// An option of `socket` that is a number; absent where the socket has none such.
pub(super) fn number(socket: &Descriptor, level: i32, name: i32) -> Result<Option<u32>, DumpError> {
    Ok(socket.option(level, name)?.map(|value| value as u32))
}

/// An option of SOL_SOCKET.
pub(super) fn general(socket: &Descriptor, name: i32) -> Result<u32, DumpError> {
    Ok(number(socket, libc::SOL_SOCKET, name)?.unwrap_or(0))
}

/// A flag; absent where the socket has none such.
pub(super) fn flag(socket: &Descriptor, level: i32, name: i32) -> Result<Option<bool>, DumpError> {
    Ok(number(socket, level, name)?.map(|value| value != 0))
}

/// The options of SOL_SOCKET.
pub(super) fn of(socket: &Descriptor) -> Result<SkOptsEntry, DumpError> {
    let general = |name| general(socket, name);
    let flag = |name| flag(socket, libc::SOL_SOCKET, name);
    let timeout = |name| -> Result<[u64; 2], DumpError> {
        let value = socket_options::words(socket.as_fd(), libc::SOL_SOCKET, name)
            .map_err(|e| SyscallError::new("getsockopt", socket.name(), e))?;
        Ok(value.unwrap_or_default())
    };
    let [send_seconds, send_micros] = timeout(libc::SO_SNDTIMEO)?;
    let [receive_seconds, receive_micros] = timeout(libc::SO_RCVTIMEO)?;
    let linger = linger(socket)?;
    Ok(SkOptsEntry {
        so_sndbuf: general(libc::SO_SNDBUF)?,
        so_rcvbuf: general(libc::SO_RCVBUF)?,
        so_snd_tmo_sec: send_seconds,
        so_snd_tmo_usec: send_micros,
        so_rcv_tmo_sec: receive_seconds,
        so_rcv_tmo_usec: receive_micros,
        reuseaddr: Some(general(libc::SO_REUSEADDR)? != 0),
        so_priority: Some(general(libc::SO_PRIORITY)?),
        so_rcvlowat: Some(general(libc::SO_RCVLOWAT)?),
        so_mark: Some(general(libc::SO_MARK)?),
        so_passcred: flag(libc::SO_PASSCRED)?,
        so_passsec: flag(libc::SO_PASSSEC)?,
        so_dontroute: flag(libc::SO_DONTROUTE)?,
        so_no_check: flag(libc::SO_NO_CHECK)?,
        so_bound_dev: device(socket)?,
        so_filter: filter(socket)?,
        so_reuseport: flag(libc::SO_REUSEPORT)?,
        so_broadcast: flag(libc::SO_BROADCAST)?,
        so_keepalive: flag(libc::SO_KEEPALIVE)?,
        tcp_keepcnt: None,
        tcp_keepidle: None,
        tcp_keepintvl: None,
        so_oobinline: Some(general(libc::SO_OOBINLINE)?),
        so_linger: linger,
        so_buf_lock: number(socket, libc::SOL_SOCKET, SO_BUF_LOCK)?,
    })
}

/// struct linger: how long, if it lingers.
fn linger(socket: &Descriptor) -> Result<Option<u32>, DumpError> {
    let mut value = [0; 8];
    bytes(socket, libc::SO_LINGER, &mut value)?;
    let [on, seconds] = [0, 4].map(|at| value[at..at + 4].try_into().map_or(0, u32::from_ne_bytes));
    Ok((on != 0).then_some(seconds))
}

/// The interface that it is bound to.
fn device(socket: &Descriptor) -> Result<Option<String>, DumpError> {
    let mut name = [0; libc::IFNAMSIZ];
    let len = bytes(socket, libc::SO_BINDTODEVICE, &mut name)?;
    let name = name[..len].split(|byte| *byte == 0).next().unwrap_or_default();
    Ok((!name.is_empty()).then(|| String::from_utf8_lossy(name).into_owned()))
}

/// The classic BPF filter, an instruction a word: code, both jumps and the operand, from the top.
fn filter(socket: &Descriptor) -> Result<Vec<u64>, DumpError> {
    let program = socket_options::filter(socket.as_fd())
        .map_err(|e| SyscallError::new("getsockopt(SO_GET_FILTER)", socket.name(), e))?;
    let word = |i: &libc::sock_filter| {
        u64::from(i.code) << 48 | u64::from(i.jt) << 40 | u64::from(i.jf) << 32 | u64::from(i.k)
    };
    Ok(program.iter().map(word).collect())
}

fn bytes(socket: &Descriptor, name: i32, value: &mut [u8]) -> Result<usize, DumpError> {
    let got = socket_options::bytes(socket.as_fd(), libc::SOL_SOCKET, name, value)
        .map_err(|e| SyscallError::new("getsockopt", socket.name(), e))?;
    Ok(got.unwrap_or(0))
}
