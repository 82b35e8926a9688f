//! getsockopt(2) and setsockopt(2).

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

/// The value of an option that is an int, or absent where the socket has no such option.
///
/// # Errors
/// The call fails for another reason.
pub fn int(socket: BorrowedFd<'_>, level: i32, name: i32) -> io::Result<Option<i32>> {
    let mut value = [0; 4];
    Ok(bytes(socket, level, name, &mut value)?.map(|_| i32::from_ne_bytes(value)))
}

/// Two 64-bit words, as struct timeval has them.
///
/// # Errors
/// As [`int`].
pub fn words(socket: BorrowedFd<'_>, level: i32, name: i32) -> io::Result<Option<[u64; 2]>> {
    let mut value = [0; 16];
    let got = bytes(socket, level, name, &mut value)?;
    let word = |at: usize| value[at..at + 8].try_into().map_or(0, u64::from_ne_bytes);
    Ok(got.map(|_| [word(0), word(8)]))
}

/// The classic BPF filter that is attached (SO_GET_FILTER, Linux 3.8); empty without one.
///
/// # Errors
/// EACCES: the filter is an eBPF program, which does not tell its instructions.
pub fn filter(socket: BorrowedFd<'_>) -> io::Result<Vec<libc::sock_filter>> {
    /// include/uapi/asm-generic/socket.h
    const SO_GET_FILTER: i32 = 26;
    let mut program: Vec<libc::sock_filter> = Vec::new();
    loop {
        // Lengths count instructions here; with none given, the kernel tells how many there are (sk_get_filter in net/core/filter.c).
        let mut count = program.len() as libc::socklen_t;
        // SAFETY: the kernel writes at most `count` instructions to `program`, which has as many, and their number to `count`.
        let rc = unsafe {
            libc::getsockopt(
                socket.as_raw_fd(),
                libc::SOL_SOCKET,
                SO_GET_FILTER,
                program.as_mut_ptr().cast(),
                &raw mut count,
            )
        };
        if rc < 0 {
            return Err(io::Error::last_os_error());
        }
        if count as usize == program.len() {
            return Ok(program);
        }
        program.resize(count as usize, libc::sock_filter { code: 0, jt: 0, jf: 0, k: 0 });
    }
}

/// Reads an option into `value`; how many bytes it has.
///
/// # Errors
/// As [`int`].
pub fn bytes(socket: BorrowedFd<'_>, level: i32, name: i32, value: &mut [u8]) -> io::Result<Option<usize>> {
    let mut len = value.len() as libc::socklen_t;
    // SAFETY: the kernel writes at most `len` bytes to `value`, and the length to `len`.
    let rc =
        unsafe { libc::getsockopt(socket.as_raw_fd(), level, name, value.as_mut_ptr().cast(), &raw mut len) };
    if rc == 0 {
        return Ok(Some(len as usize));
    }
    let error = io::Error::last_os_error();
    match error.raw_os_error() {
        Some(libc::ENOPROTOOPT | libc::EOPNOTSUPP) => Ok(None),
        _ => Err(error),
    }
}

/// Sets an option that is an int.
///
/// # Errors
/// The call fails.
pub fn set_int(socket: BorrowedFd<'_>, level: i32, name: i32, value: i32) -> io::Result<()> {
    set(socket, level, name, &value.to_ne_bytes())
}

/// Sets an option to `value`.
///
/// # Errors
/// The call fails.
pub fn set(socket: BorrowedFd<'_>, level: i32, name: i32, value: &[u8]) -> io::Result<()> {
    let len = value.len() as libc::socklen_t;
    // SAFETY: the kernel reads `len` bytes.
    let rc = unsafe { libc::setsockopt(socket.as_raw_fd(), level, name, value.as_ptr().cast(), len) };
    if rc < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Attaches a classic BPF filter (SO_ATTACH_FILTER).
///
/// # Errors
/// It is not valid.
pub fn set_filter(socket: BorrowedFd<'_>, program: &[libc::sock_filter]) -> io::Result<()> {
    let attached =
        libc::sock_fprog { len: program.len() as libc::c_ushort, filter: program.as_ptr().cast_mut() };
    // SAFETY: the structure and the program live across the call, which reads them.
    let rc = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_ATTACH_FILTER,
            (&raw const attached).cast(),
            size_of_val(&attached) as libc::socklen_t,
        )
    };
    if rc < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use std::net::UdpSocket;
    use std::os::fd::AsFd as _;

    use super::*;

    #[test]
    fn options_and_filters_are_read() {
        let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
        let fd = socket.as_fd();
        assert_eq!(int(fd, libc::SOL_SOCKET, libc::SO_TYPE).unwrap(), Some(libc::SOCK_DGRAM));
        assert_eq!(int(fd, libc::SOL_SOCKET, 9999).unwrap(), None);
        assert!(filter(fd).unwrap().is_empty());
        // Two instructions: load the length, return it.
        let program = [(0x80, 0), (0x16, 0)].map(|(code, k)| libc::sock_filter { code, jt: 0, jf: 0, k });
        set_filter(fd, &program).unwrap();
        let read: Vec<u16> = filter(fd).unwrap().iter().map(|i| i.code).collect();
        assert_eq!(read, [0x80, 0x16]);
    }
}
