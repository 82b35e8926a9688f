//! Sockets, by their family.

use crate::dump::error::DumpError;
use crate::image::proto::FileEntry;
use crate::kernel::descriptor::Descriptor;

use super::collector::Collector;
use super::refusal::refuse_descriptor;

mod inet;
mod options;
mod unix;

pub(super) use unix::{UnixEnds, peers_first};

impl Collector<'_> {
    pub(super) fn socket(&mut self, found: &Descriptor, id: u32) -> Result<FileEntry, DumpError> {
        if found.info.flags & libc::O_PATH as u32 != 0 {
            return Err(refuse_descriptor(
                found,
                "socket opened with O_PATH",
                "cannot be made again: close it first",
            ));
        }
        match options::general(found, libc::SO_DOMAIN)? as i32 {
            libc::AF_UNIX => self.unix_socket(found, id),
            libc::AF_INET | libc::AF_INET6 => self.inet_socket(found, id),
            family => Err(refuse_descriptor(
                found,
                format!("{} socket", family_name(family)),
                "is of a family that memckpt does not capture: close it first",
            )),
        }
    }
}

/// What users call a family.
fn family_name(family: i32) -> String {
    match family {
        libc::AF_NETLINK => "netlink".to_owned(),
        libc::AF_PACKET => "packet".to_owned(),
        libc::AF_VSOCK => "vsock".to_owned(),
        libc::AF_ALG => "kernel crypto".to_owned(),
        other => format!("AF {other}"),
    }
}
