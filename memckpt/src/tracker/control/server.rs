//! The session's end of the socket: accepts, checks who calls, and hands calls over one by one.

use std::io;

use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinHandle;

use super::wire::{self, Call, Reply};

/// Clients at a time; more wait in the listen queue.
const CONNECTIONS: usize = 16;

/// What happened on one connection.
#[derive(Debug)]
pub struct Request {
    /// Which connection; never used again.
    pub connection: u64,
    /// What.
    pub kind: RequestKind,
}

/// What happened on a connection.
#[derive(Debug)]
pub enum RequestKind {
    /// A call, and where the answer goes.
    Call(Call, oneshot::Sender<Reply>),
    /// The client went away.
    Closed,
}

/// Accepts connections on a session's socket. Dropping it closes the connections.
#[derive(Debug)]
pub struct ControlServer {
    requests: mpsc::Receiver<Request>,
    accepting: JoinHandle<()>,
}

impl ControlServer {
    /// Serves `listener` (non-blocking), inside a tokio runtime.
    ///
    /// # Errors
    /// The runtime cannot watch the socket.
    pub fn serve(listener: std::os::unix::net::UnixListener) -> io::Result<Self> {
        let listener = UnixListener::from_std(listener)?;
        let (sender, requests) = mpsc::channel(CONNECTIONS);
        let accepting = tokio::spawn(accept(listener, sender));
        Ok(Self { requests, accepting })
    }

    /// The next request; `None` when accepting failed for good.
    pub async fn next(&mut self) -> Option<Request> {
        self.requests.recv().await
    }
}

impl ControlServer {
    /// Closes all connections, and returns when that is done. A client in the middle of a checkpoint holds the target
    /// frozen while it waits for an answer.
    pub async fn close(mut self) {
        self.accepting.abort();
        let _ = (&mut self.accepting).await;
        // The conversations are aborted with it, and dropped when the runtime comes to them.
        tokio::task::yield_now().await;
    }
}

impl Drop for ControlServer {
    fn drop(&mut self) {
        self.accepting.abort();
    }
}

/// Whether a peer of this user may talk to us: root, or our own user.
pub(super) fn is_trusted(uid: u32) -> bool {
    uid == 0 || uid == nix::unistd::geteuid().as_raw()
}

async fn accept(listener: UnixListener, requests: mpsc::Sender<Request>) {
    let mut connections = tokio::task::JoinSet::new();
    for connection in 0.. {
        while connections.len() >= CONNECTIONS {
            connections.join_next().await;
        }
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(e) => {
                // A connection that was gone before it was taken, or no descriptor free: others may still come.
                tracing::warn!("control socket: accept: {e}");
                tokio::time::sleep(std::time::Duration::from_millis(50)).await;
                continue;
            }
        };
        match stream.peer_cred() {
            Ok(peer) if is_trusted(peer.uid()) => {
                connections.spawn(converse(connection, stream, requests.clone()));
            }
            Ok(peer) => tracing::warn!(uid = peer.uid(), "control socket: refused"),
            Err(e) => tracing::warn!("control socket: SO_PEERCRED: {e}"),
        }
    }
}

async fn converse(connection: u64, mut stream: UnixStream, requests: mpsc::Sender<Request>) {
    while let Ok(Some(frame)) = wire::read_frame_async(&mut stream).await {
        let reply = match wire::decode::<Call>(&frame) {
            Ok(call) => {
                let (answer, answered) = oneshot::channel();
                let request = Request { connection, kind: RequestKind::Call(call, answer) };
                if requests.send(request).await.is_err() {
                    break;
                }
                match answered.await {
                    Ok(reply) => reply,
                    Err(_) => break,
                }
            }
            Err(e) => Reply::Refused { reason: format!("unreadable call: {e}") },
        };
        let Ok(frame) = wire::encode(&reply) else { break };
        if wire::write_frame_async(&mut stream, &frame).await.is_err() {
            break;
        }
    }
    let _ = requests.send(Request { connection, kind: RequestKind::Closed }).await;
}
