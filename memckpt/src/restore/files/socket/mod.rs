//! Sockets, by their family.

mod inet;
mod options;
mod rooted;
mod unix;

pub(super) use inet::{Connections, is_connection};
pub(super) use unix::UnixSockets;
