//! The other end of the connections of victim `connected`: it sends bytes that follow from their place in the stream, and gets
//! them back.

use std::io::{ErrorKind, Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

/// How long the victim may take to answer.
const PATIENCE: Duration = Duration::from_secs(60);

/// One connection.
#[derive(Debug)]
pub struct Peer {
    stream: TcpStream,
    sent: u64,
    received: u64,
}

/// The byte at this place.
fn byte(at: u64) -> u8 {
    (at.wrapping_mul(31) + (at >> 8)) as u8
}

impl Peer {
    /// Connects to the victim that writes to `output`, over IPv4 or IPv6.
    ///
    /// # Errors
    ///
    /// When it does not come up.
    pub fn connect(output: &Path, v6: bool) -> Result<Self> {
        let port = output
            .with_file_name(format!("{}.port", output.file_name().context("no name")?.to_string_lossy()));
        let deadline = Instant::now() + PATIENCE;
        let port: u16 = loop {
            match std::fs::read_to_string(&port).unwrap_or_default().strip_suffix('\n') {
                Some(text) => break text.parse()?,
                None => ensure!(Instant::now() < deadline, "the victim does not listen"),
            }
            std::thread::sleep(Duration::from_millis(5));
        };
        let address = match v6 {
            true => SocketAddr::from(([0, 0, 0, 0, 0, 0, 0, 1], port)),
            false => SocketAddr::from(([127, 0, 0, 1], port)),
        };
        let mut peer = Self { stream: TcpStream::connect(address)?, sent: 0, received: 0 };
        // Accepted.
        peer.exchange(1)?;
        Ok(peer)
    }

    /// Sends `count` bytes more, as far as there is room.
    ///
    /// # Errors
    ///
    /// When the connection is closed.
    pub fn send(&mut self, count: u64) -> Result<()> {
        let bytes: Vec<u8> = (self.sent..self.sent + count).map(byte).collect();
        self.stream.set_nonblocking(true)?;
        match self.stream.write(&bytes) {
            Ok(written) => self.sent += written as u64,
            Err(e) if e.kind() == ErrorKind::WouldBlock => {}
            Err(e) => return Err(e).context("send"),
        }
        Ok(())
    }

    /// Sends until there is no room any more: this end's queues are full, and so are the victim's.
    ///
    /// # Errors
    ///
    /// When the connection is closed.
    pub fn fill(&mut self) -> Result<u64> {
        // Until nothing more goes for a while.
        let mut last = (self.sent, Instant::now());
        while last.1.elapsed() < Duration::from_millis(300) {
            self.send(1 << 16)?;
            if self.sent != last.0 {
                last = (self.sent, Instant::now());
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        Ok(self.sent - self.received)
    }

    /// Receives all that was sent.
    ///
    /// # Errors
    ///
    /// When the connection is closed, something else comes, or nothing does.
    pub fn receive(&mut self) -> Result<()> {
        self.stream.set_nonblocking(false)?;
        self.stream.set_read_timeout(Some(PATIENCE))?;
        let mut buffer = [0; 1 << 16];
        while self.received < self.sent {
            let got = self.stream.read(&mut buffer).context("receive")?;
            ensure!(got > 0, "closed after {} of {} bytes", self.received, self.sent);
            for &read in &buffer[..got] {
                ensure!(read == byte(self.received), "byte {} is {read}", self.received);
                self.received += 1;
            }
        }
        Ok(())
    }

    /// Sends `count` bytes and receives them.
    ///
    /// # Errors
    ///
    /// As [`Peer::send`] and [`Peer::receive`].
    pub fn exchange(&mut self, count: u64) -> Result<()> {
        self.send(count)?;
        self.receive()
    }

    /// What the socket says when there is nothing to receive for a moment.
    ///
    /// # Errors
    ///
    /// When there is something.
    pub fn silence(&mut self) -> Result<ErrorKind> {
        self.stream.set_nonblocking(false)?;
        self.stream.set_read_timeout(Some(Duration::from_millis(200)))?;
        match self.stream.read(&mut [0]) {
            Ok(count) => anyhow::bail!("{count} bytes came"),
            Err(e) => Ok(e.kind()),
        }
    }
}
