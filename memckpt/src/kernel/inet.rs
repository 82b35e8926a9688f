//! Addresses of internet sockets: getsockname(2), getpeername(2).

use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsRawFd as _, BorrowedFd};

use nix::sys::socket::{SockaddrStorage, getpeername, getsockname};

/// What the socket is bound to; all zeroes if nothing.
///
/// # Errors
/// EAFNOSUPPORT: it is of another family.
pub fn local(socket: BorrowedFd<'_>) -> io::Result<SocketAddr> {
    internet(&getsockname(socket.as_raw_fd())?)
}

/// What the socket is connected to, if it is.
///
/// # Errors
/// As [`local`].
pub fn remote(socket: BorrowedFd<'_>) -> io::Result<Option<SocketAddr>> {
    match getpeername(socket.as_raw_fd()) {
        Ok(address) => internet(&address).map(Some),
        Err(nix::Error::ENOTCONN) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

fn internet(address: &SockaddrStorage) -> io::Result<SocketAddr> {
    let v4 = address.as_sockaddr_in().map(|a| SocketAddr::from((a.ip(), a.port())));
    let v6 = || address.as_sockaddr_in6().map(|a| SocketAddr::from((a.ip(), a.port())));
    v4.or_else(v6).ok_or_else(|| io::Error::from_raw_os_error(libc::EAFNOSUPPORT))
}
