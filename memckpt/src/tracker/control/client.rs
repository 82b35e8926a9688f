//! The blocking client that pre-dump and dump use.

use std::io;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use nix::sys::socket::{getsockopt, sockopt::PeerCredentials};

use super::seat::socket_of;
use super::wire::{self, Call, Reply, Unreadable, VERSION};
use super::{ControlError, server};
use crate::addr::AddrRange;
use crate::kernel::maps::Vma;
use crate::kernel::process::TargetId;
use crate::tracker::epoch::{CheckpointId, Epoch};
use crate::tracker::session::{Collected, SessionInfo};

/// How long a call may take unless told otherwise: as long as a freeze may.
const TIMEOUT: Duration = Duration::from_secs(10);

/// A connection to the session of a target. Every call is bounded in time, so that a stuck session cannot keep the
/// target frozen; after an error the connection is closed and every later call fails.
#[derive(Debug)]
pub struct SessionClient {
    target: i32,
    stream: UnixStream,
    timeout: Duration,
    dead: bool,
}

impl SessionClient {
    /// The session of `target`, if there is one: of this very process, not of an earlier one with its PID.
    ///
    /// # Errors
    /// There is a session, but it cannot be talked to.
    pub fn connect(target: i32) -> Result<Option<Self>, ControlError> {
        let path = socket_of(target);
        let stream = match UnixStream::connect(&path) {
            Ok(stream) => stream,
            // ENOTDIR, ENOENT: never was; ECONNREFUSED: killed.
            Err(e) if matches!(e.raw_os_error(), Some(libc::ENOENT | libc::ENOTDIR | libc::ECONNREFUSED)) => {
                return Ok(None);
            }
            Err(source) => return Err(ControlError::Files { call: "connect", path, source }),
        };
        let peer = getsockopt(&stream, PeerCredentials)
            .map_err(|e| ControlError::Connection { target, source: e.into() })?;
        if !server::is_trusted(peer.uid()) {
            return Err(ControlError::Peer { uid: peer.uid() });
        }
        let mut client = Self { target, stream, timeout: TIMEOUT, dead: false };
        match client.hello() {
            Ok(info) => Ok((TargetId::of(target).ok().as_ref() == Some(&info.target)).then_some(client)),
            // It went away between accepting and answering.
            Err(ControlError::Connection { .. }) => Ok(None),
            Err(e) => Err(e),
        }
    }

    /// Bounds every later call.
    pub fn set_timeout(&mut self, timeout: Duration) {
        self.timeout = timeout;
    }

    /// Who the session is and where it stands.
    ///
    /// # Errors
    /// As any call: the session is gone, slow, or refuses.
    pub fn hello(&mut self) -> Result<SessionInfo, ControlError> {
        match self.call(&Call::Hello)? {
            Reply::Hello(info) => Ok(*info),
            _ => Err(self.confused()),
        }
    }

    /// The layout now, and a generation that names it; for use before the freeze.
    ///
    /// # Errors
    /// As any call.
    pub fn layout(&mut self) -> Result<(u64, Vec<Vma>), ControlError> {
        match self.call(&Call::Layout)? {
            Reply::Layout { generation, vmas } => Ok((generation, vmas)),
            _ => Err(self.confused()),
        }
    }

    /// Begins the transaction of a checkpoint; the caller has frozen the target, all of it, and keeps it so until
    /// [`Self::commit`] or [`Self::abort`].
    ///
    /// # Errors
    /// As any call.
    pub fn collect(&mut self, generation: u64) -> Result<Collected, ControlError> {
        match self.call(&Call::Collect { generation })? {
            Reply::Collected(collected) => Ok(*collected),
            _ => Err(self.confused()),
        }
    }

    /// Whether pages of the target may be pinned, or have been at any time before.
    ///
    /// # Errors
    /// As any call.
    pub fn may_be_pinned(&mut self) -> Result<bool, ControlError> {
        match self.call(&Call::Pins)? {
            Reply::Pins(may_be) => Ok(may_be),
            _ => Err(self.confused()),
        }
    }

    /// The caller has cleared the dirty state for `checkpoint`, the target is still frozen: the next epoch begins.
    /// `carry`: chunks that hold dirty pages even after the clear (pinned pages).
    ///
    /// # Errors
    /// As any call. After one, whether the epoch began is unknown here; the next checkpoint learns it from
    /// [`SessionInfo::epoch_checkpoint`].
    pub fn commit(&mut self, checkpoint: CheckpointId, carry: &[AddrRange]) -> Result<Epoch, ControlError> {
        match self.call(&Call::Commit { checkpoint, carry: carry.to_vec() })? {
            Reply::Committed(epoch) => Ok(epoch),
            _ => Err(self.confused()),
        }
    }

    /// No checkpoint came of the transaction. `cleared`: clearing the dirty state had begun, and so the epoch is
    /// broken; else it goes on as if nothing had been. Going away without a word counts as the former, unless the
    /// session can prove that nothing was cleared.
    ///
    /// # Errors
    /// As any call.
    pub fn abort(&mut self, cleared: bool) -> Result<(), ControlError> {
        self.done(&Call::Abort { cleared })
    }

    /// Ends the session and waits until its files are gone.
    ///
    /// # Errors
    /// As any call.
    pub fn stop(mut self) -> Result<(), ControlError> {
        match self.call(&Call::Stop) {
            // It answers by going away.
            Err(ControlError::Connection { source, .. }) if is_end(&source) => Ok(()),
            Err(e) => Err(e),
            Ok(_) => Err(self.confused()),
        }
    }

    fn done(&mut self, call: &Call) -> Result<(), ControlError> {
        match self.call(call)? {
            Reply::Done => Ok(()),
            _ => Err(self.confused()),
        }
    }

    fn call(&mut self, call: &Call) -> Result<Reply, ControlError> {
        if self.dead {
            return Err(self.broken(io::ErrorKind::NotConnected.into()));
        }
        let deadline = Instant::now() + self.timeout;
        let exchange = || {
            let mut bounded = Bounded { stream: &self.stream, deadline };
            wire::write_frame(&mut bounded, &wire::encode(call)?)?;
            wire::read_frame(&mut bounded)
        };
        let frame = exchange().map_err(|source| {
            let timeout = is_timeout(&source);
            let error = self.broken(source);
            if timeout { ControlError::Timeout { target: self.target, timeout: self.timeout } } else { error }
        })?;
        match wire::decode(&frame) {
            Ok(Reply::Refused { reason }) => Err(ControlError::Refused { target: self.target, reason }),
            Ok(reply) => Ok(reply),
            Err(Unreadable::Version(theirs)) => Err(ControlError::Version { theirs, ours: VERSION }),
            Err(Unreadable::Json(e)) => Err(self.broken(e.into())),
        }
    }

    /// The stream may hold half an answer: nobody may read it again.
    fn broken(&mut self, source: io::Error) -> ControlError {
        self.dead = true;
        let _ = self.stream.shutdown(std::net::Shutdown::Both);
        ControlError::Connection { target: self.target, source }
    }

    fn confused(&mut self) -> ControlError {
        self.broken(io::Error::new(io::ErrorKind::InvalidData, "an answer to another question"))
    }
}

fn is_timeout(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut)
}

fn is_end(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::UnexpectedEof | io::ErrorKind::ConnectionReset)
}

/// A stream whose reads and writes together end at a deadline.
struct Bounded<'a> {
    stream: &'a UnixStream,
    deadline: Instant,
}

impl Bounded<'_> {
    fn left(&self) -> io::Result<Option<Duration>> {
        let left = self.deadline.saturating_duration_since(Instant::now());
        // A zero timeout would mean none.
        if left.is_zero() { Err(io::ErrorKind::TimedOut.into()) } else { Ok(Some(left)) }
    }
}

impl io::Read for Bounded<'_> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        self.stream.set_read_timeout(self.left()?)?;
        self.stream.read(buf)
    }
}

impl io::Write for Bounded<'_> {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        self.stream.set_write_timeout(self.left()?)?;
        self.stream.write(buf)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
