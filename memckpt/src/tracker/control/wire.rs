//! Calls, replies, and how they cross the socket.

use std::io::{self, Read, Write};

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::addr::AddrRange;
use crate::kernel::maps::Vma;
use crate::tracker::epoch::{CheckpointId, Epoch};
use crate::tracker::session::{Collected, SessionInfo};

/// Moves with every change of [`Call`], [`Reply`] or what they hold.
pub(super) const VERSION: u32 = 2;
/// A layout of 100,000 VMAs with long names takes a third of this.
const MAX_FRAME: usize = 64 << 20;

/// What a client asks.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Call {
    /// Who are you.
    Hello,
    /// The layout as it is now, the target running.
    Layout,
    /// Begin a transaction: the target is frozen by the client.
    Collect {
        /// The generation that the client has from [`Call::Layout`].
        generation: u64,
    },
    /// The dirty state was cleared: may pages have been left out because they are pinned?
    Pins,
    /// The dirty state was cleared, the target still frozen: the next epoch.
    Commit {
        /// The checkpoint that was taken.
        checkpoint: CheckpointId,
        /// Chunks that still hold dirty pages.
        carry: Vec<AddrRange>,
    },
    /// No checkpoint came of it.
    Abort {
        /// Whether clearing had begun.
        cleared: bool,
    },
    /// End the session: the answer is the end of the connection.
    Stop,
}

/// What a session answers.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Reply {
    /// To [`Call::Hello`].
    Hello(Box<SessionInfo>),
    /// To [`Call::Layout`].
    Layout {
        /// Names this layout.
        generation: u64,
        /// The layout.
        vmas: Vec<Vma>,
    },
    /// To [`Call::Collect`].
    Collected(Box<Collected>),
    /// To [`Call::Pins`].
    Pins(bool),
    /// To [`Call::Commit`].
    Committed(Epoch),
    /// To [`Call::Abort`].
    Done,
    /// To any call.
    Refused {
        /// Why.
        reason: String,
    },
}

#[derive(Serialize, Deserialize)]
struct Envelope<T> {
    version: u32,
    body: T,
}

/// A frame that is not for us.
#[derive(Debug, thiserror::Error)]
pub(super) enum Unreadable {
    #[error("protocol version {0}")]
    Version(u32),
    #[error(transparent)]
    Json(#[from] serde_json::Error),
}

fn too_long(len: usize) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("a message of {len} bytes"))
}

/// `body` in its envelope, the length before it.
pub(super) fn encode<T: Serialize>(body: &T) -> io::Result<Vec<u8>> {
    let mut frame = vec![0; 4];
    serde_json::to_writer(&mut frame, &Envelope { version: VERSION, body })?;
    let len = frame.len() - 4;
    let prefix = u32::try_from(len).ok().filter(|_| len <= MAX_FRAME).ok_or_else(|| too_long(len))?;
    frame[..4].copy_from_slice(&prefix.to_le_bytes());
    Ok(frame)
}

/// The body in `frame` (without its length).
pub(super) fn decode<T: DeserializeOwned>(frame: &[u8]) -> Result<T, Unreadable> {
    #[derive(Deserialize)]
    struct Version {
        version: u32,
    }
    // The version first: the body of another one need not parse.
    let Version { version } = serde_json::from_slice(frame)?;
    if version != VERSION {
        return Err(Unreadable::Version(version));
    }
    Ok(serde_json::from_slice::<Envelope<T>>(frame)?.body)
}

fn length(prefix: [u8; 4]) -> io::Result<usize> {
    let len = u32::from_le_bytes(prefix) as usize;
    if len > MAX_FRAME { Err(too_long(len)) } else { Ok(len) }
}

/// Reads one frame.
pub(super) fn read_frame(from: &mut impl Read) -> io::Result<Vec<u8>> {
    let mut prefix = [0; 4];
    from.read_exact(&mut prefix)?;
    let mut frame = vec![0; length(prefix)?];
    from.read_exact(&mut frame)?;
    Ok(frame)
}

/// Writes one frame.
pub(super) fn write_frame(to: &mut impl Write, frame: &[u8]) -> io::Result<()> {
    to.write_all(frame)?;
    to.flush()
}

/// Reads one frame; `None` at the end of the stream.
pub(super) async fn read_frame_async(from: &mut (impl AsyncReadExt + Unpin)) -> io::Result<Option<Vec<u8>>> {
    let mut prefix = [0; 4];
    match from.read_exact(&mut prefix).await {
        Ok(_) => {}
        Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
        Err(e) => return Err(e),
    }
    let mut frame = vec![0; length(prefix)?];
    from.read_exact(&mut frame).await?;
    Ok(Some(frame))
}

/// Writes one frame.
pub(super) async fn write_frame_async(to: &mut (impl AsyncWriteExt + Unpin), frame: &[u8]) -> io::Result<()> {
    to.write_all(frame).await?;
    to.flush().await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_call_survives_the_wire() {
        let call = Call::Abort { cleared: true };
        let frame = encode(&call).unwrap_or_default();
        let read = read_frame(&mut frame.as_slice()).unwrap_or_default();
        assert!(matches!(decode(&read), Ok(Call::Abort { cleared: true })));
        assert!(read_frame(&mut &frame[..frame.len() - 1]).is_err());
    }

    #[test]
    fn another_version_or_an_absurd_length_is_refused() {
        let other = br#"{"version":77,"body":{"from-the-future":1}}"#;
        assert!(matches!(decode::<Call>(other), Err(Unreadable::Version(77))));
        assert!(matches!(decode::<Call>(b"x"), Err(Unreadable::Json(_))));
        assert!(read_frame(&mut [0xff_u8; 8].as_slice()).is_err());
    }
}
