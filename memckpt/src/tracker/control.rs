//! The control socket of a session: one per target, in `/run/memckpt`, for root and the session's own user.
//!
//! Messages are JSON behind a 32-bit little-endian length; a connection carries one call at a time. A client that goes
//! away between collect and commit ends its transaction (see [`crate::tracker::session`]).

mod background;
mod client;
mod seat;
mod server;
mod wire;

use std::io;
use std::path::PathBuf;
use std::time::Duration;

pub use background::{BackgroundOptions, announce_failure, announce_ready, start_background};
pub use client::SessionClient;
pub use seat::Seat;
pub use server::{ControlServer, Request, RequestKind};
pub use wire::{Call, Reply};

/// Why talking to a session, or becoming one, failed.
#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    /// Another session watches the target.
    #[error("process {target} is already watched{}", .session.map_or(String::new(), |pid| format!(" by process {pid}")))]
    Taken {
        /// The target.
        target: i32,
        /// The session's process, where it has said so already.
        session: Option<i32>,
    },
    /// A file of the rendezvous directory cannot be used.
    #[error("{path}: {call}: {source}", path = .path.display())]
    Files {
        /// The call that failed.
        call: &'static str,
        /// On what.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The rendezvous directory can be written by others.
    #[error("{path}: not a directory that only its owner, root or this user, can write to", path = .path.display())]
    Unsafe {
        /// The directory.
        path: PathBuf,
    },
    /// The peer's user is neither root nor this user.
    #[error("the other end of the control socket belongs to user {uid}")]
    Peer {
        /// The user.
        uid: u32,
    },
    /// The session did not answer in time.
    #[error("the session of process {target} did not answer within {timeout:?}")]
    Timeout {
        /// The target.
        target: i32,
        /// How long was waited.
        timeout: Duration,
    },
    /// The connection broke.
    #[error("control socket of process {target}: {source}")]
    Connection {
        /// The target.
        target: i32,
        /// Why.
        source: io::Error,
    },
    /// The session refused.
    #[error("the session of process {target} refused: {reason}")]
    Refused {
        /// The target.
        target: i32,
        /// Why.
        reason: String,
    },
    /// The two ends are of different versions of memckpt.
    #[error(
        "the session speaks control protocol {theirs}, this memckpt {ours}; stop it with `memckpt watch --stop`"
    )]
    Version {
        /// The other end's.
        theirs: u32,
        /// Ours.
        ours: u32,
    },
    /// A background session could not be started.
    #[error("starting a background session of process {target}: {reason}")]
    Start {
        /// The target.
        target: i32,
        /// Why: the session's own words where it had any.
        reason: String,
    },
}
