//! Netlink messages, as bytes: netlink(7), include/uapi/linux/netlink.h.

use std::os::fd::{AsRawFd, OwnedFd};

use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, recv, sendto, socket,
};

/// struct nlmsghdr.
pub(super) const HEADER: usize = 16;
const NLA_F_NESTED: u16 = 1 << 15;

/// A netlink socket.
#[derive(Debug)]
pub(super) struct Netlink(OwnedFd);

impl Netlink {
    pub(super) fn open(protocol: SockProtocol) -> nix::Result<Self> {
        socket(AddressFamily::Netlink, SockType::Raw, SockFlag::SOCK_CLOEXEC, protocol).map(Self)
    }

    /// Sends messages to the kernel.
    pub(super) fn send(&self, messages: &[u8]) -> nix::Result<()> {
        sendto(self.0.as_raw_fd(), messages, &NetlinkAddr::new(0, 0), MsgFlags::empty()).map(drop)
    }

    /// The next answer, of at most `room` bytes.
    pub(super) fn receive(&self, room: usize) -> nix::Result<Vec<u8>> {
        let mut answer = vec![0; room];
        let len = recv(self.0.as_raw_fd(), &mut answer, MsgFlags::empty())?;
        answer.truncate(len);
        Ok(answer)
    }
}

/// A message to the kernel: NLM_F_REQUEST and `flags`.
pub(super) fn message(kind: u16, flags: i32, sequence: u32, parts: &[&[u8]]) -> Vec<u8> {
    let body = parts.concat();
    let mut message = ((HEADER + body.len()) as u32).to_ne_bytes().to_vec();
    message.extend(kind.to_ne_bytes());
    message.extend(((libc::NLM_F_REQUEST | flags) as u16).to_ne_bytes());
    message.extend(sequence.to_ne_bytes());
    // The kernel fills in the port.
    message.extend([0; 4]);
    message.extend(body);
    padded(message)
}

/// An attribute.
pub(super) fn attribute(kind: u16, value: &[u8]) -> Vec<u8> {
    let mut attribute = ((4 + value.len()) as u16).to_ne_bytes().to_vec();
    attribute.extend(kind.to_ne_bytes());
    attribute.extend(value);
    padded(attribute)
}

/// An attribute made of attributes.
pub(super) fn nested(kind: u16, attributes: &[Vec<u8>]) -> Vec<u8> {
    attribute(kind | NLA_F_NESTED, &attributes.concat())
}

/// The error in an answer, as errno; 0 in a mere acknowledgement. None: it is another message.
pub(super) fn error(answer: &[u8]) -> Option<i32> {
    let kind = u16::from_ne_bytes(answer.get(4..6)?.try_into().ok()?);
    if i32::from(kind) != libc::NLMSG_ERROR {
        return None;
    }
    let errno = answer.get(HEADER..HEADER + 4).and_then(|word| word.try_into().ok()).map(i32::from_ne_bytes);
    Some(errno.map_or(libc::EBADMSG, i32::wrapping_neg))
}

fn padded(mut bytes: Vec<u8>) -> Vec<u8> {
    bytes.resize(bytes.len().next_multiple_of(4), 0);
    bytes
}
