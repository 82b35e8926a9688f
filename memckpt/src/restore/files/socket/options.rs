//! The options that all families have, set last: buffers must be large, and credentials need not come along, while queues are filled.

use std::os::fd::{AsFd as _, AsRawFd as _, OwnedFd};

use nix::sys::socket::Backlog;

use crate::image::proto::SkOptsEntry;
use crate::kernel::SyscallError;
use crate::kernel::socket_options;

/// include/uapi/asm-generic/socket.h, Linux 5.14.
const SO_BUF_LOCK: i32 = 72;
/// The largest buffer that the kernel gives (sk_setsockopt in net/core/sock.c: half of INT_MAX).
const LARGEST: u32 = i32::MAX as u32 / 2;

/// Sets option `name` of `level` to `value`, if it is another: some families refuse what others have.
pub(super) fn settle(
    socket: &OwnedFd,
    level: i32,
    name: i32,
    value: Option<u32>,
) -> Result<(), SyscallError> {
    let Some(value) = value.map(u32::cast_signed) else { return Ok(()) };
    let failed = |call, error| SyscallError::new(call, format!("option {name} of level {level}"), error);
    let now = socket_options::int(socket.as_fd(), level, name).map_err(|e| failed("getsockopt", e))?;
    if now.is_none_or(|now| now == value) {
        return Ok(());
    }
    socket_options::set_int(socket.as_fd(), level, name, value).map_err(|e| failed("setsockopt", e))
}

/// Sets the options of SOL_SOCKET.
pub(super) fn set(socket: &OwnedFd, options: &SkOptsEntry) -> Result<(), SyscallError> {
    let general = |name, value| settle(socket, libc::SOL_SOCKET, name, value);
    let flag = |name, value: Option<bool>| general(name, value.map(u32::from));
    let bytes = |name, value: &[u8]| {
        socket_options::set(socket.as_fd(), libc::SOL_SOCKET, name, value).map_err(|e| {
            SyscallError::new("setsockopt", format!("option {name} of descriptor {}", socket.as_raw_fd()), e)
        })
    };
    // The kernel doubles what it is given.
    for (name, force, value) in [
        (libc::SO_SNDBUF, libc::SO_SNDBUFFORCE, options.so_sndbuf),
        (libc::SO_RCVBUF, libc::SO_RCVBUFFORCE, options.so_rcvbuf),
    ] {
        let now = socket_options::int(socket.as_fd(), libc::SOL_SOCKET, name)
            .map_err(|e| SyscallError::new("getsockopt", "the size of a buffer", e))?;
        if now != Some(value.cast_signed()) {
            bytes(force, &(value / 2).min(LARGEST).to_ne_bytes())?;
        }
    }
    general(SO_BUF_LOCK, options.so_buf_lock)?;
    for (name, seconds, micros) in [
        (libc::SO_SNDTIMEO, options.so_snd_tmo_sec, options.so_snd_tmo_usec),
        (libc::SO_RCVTIMEO, options.so_rcv_tmo_sec, options.so_rcv_tmo_usec),
    ] {
        if (seconds, micros) != (0, 0) {
            bytes(name, &[seconds.to_ne_bytes(), micros.to_ne_bytes()].concat())?;
        }
    }
    flag(libc::SO_REUSEADDR, options.reuseaddr)?;
    flag(libc::SO_REUSEPORT, options.so_reuseport)?;
    general(libc::SO_PRIORITY, options.so_priority)?;
    general(libc::SO_RCVLOWAT, options.so_rcvlowat)?;
    general(libc::SO_MARK, options.so_mark)?;
    flag(libc::SO_PASSCRED, options.so_passcred)?;
    flag(libc::SO_PASSSEC, options.so_passsec)?;
    flag(libc::SO_DONTROUTE, options.so_dontroute)?;
    flag(libc::SO_NO_CHECK, options.so_no_check)?;
    flag(libc::SO_BROADCAST, options.so_broadcast)?;
    flag(libc::SO_KEEPALIVE, options.so_keepalive)?;
    general(libc::SO_OOBINLINE, options.so_oobinline)?;
    if let Some(seconds) = options.so_linger {
        bytes(libc::SO_LINGER, &[1, seconds].map(u32::to_ne_bytes).concat())?;
    }
    filter(socket, &options.so_filter)
}

/// How many connections may wait to be accepted.
pub(super) fn backlog(count: u32) -> Backlog {
    i32::try_from(count).ok().and_then(|n| Backlog::new(n).ok()).unwrap_or(Backlog::MAXCONN)
}

/// Binds it to its interface: before it gets an address.
pub(super) fn bind_to_device(socket: &OwnedFd, options: &SkOptsEntry) -> Result<(), SyscallError> {
    let Some(device) = options.so_bound_dev.as_deref().filter(|device| !device.is_empty()) else {
        return Ok(());
    };
    socket_options::set(socket.as_fd(), libc::SOL_SOCKET, libc::SO_BINDTODEVICE, device.as_bytes())
        .map_err(|e| SyscallError::new("setsockopt(SO_BINDTODEVICE)", format!("interface {device}"), e))
}

fn filter(socket: &OwnedFd, program: &[u64]) -> Result<(), SyscallError> {
    if program.is_empty() {
        return Ok(());
    }
    let instruction = |word: &u64| libc::sock_filter {
        code: (word >> 48) as u16,
        jt: (word >> 40) as u8,
        jf: (word >> 32) as u8,
        k: *word as u32,
    };
    let program: Vec<_> = program.iter().map(instruction).collect();
    socket_options::set_filter(socket.as_fd(), &program)
        .map_err(|e| SyscallError::new("setsockopt(SO_ATTACH_FILTER)", "a socket", e))
}
