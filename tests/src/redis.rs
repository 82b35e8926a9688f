//! A client of redis-server.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use crate::program::PATIENCE;

/// A connection to redis-server.
#[derive(Debug)]
pub struct Redis(BufReader<TcpStream>);

impl Redis {
    /// Connects, as soon as the server is up.
    ///
    /// # Errors
    ///
    /// When it does not come up.
    pub fn connect(port: u16) -> Result<Self> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            match TcpStream::connect(("127.0.0.1", port)) {
                Ok(stream) => {
                    stream.set_read_timeout(Some(PATIENCE))?;
                    return Ok(Self(BufReader::new(stream)));
                }
                Err(error) => ensure!(Instant::now() < deadline, "redis-server does not come up: {error}"),
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Sends a command.
    ///
    /// # Errors
    ///
    /// When the connection is closed.
    pub fn send(&mut self, command: &str) -> Result<()> {
        Ok(self.0.get_mut().write_all(format!("{command}\r\n").as_bytes())?)
    }

    /// The next answer, which is one line.
    ///
    /// # Errors
    ///
    /// When it does not come, or is an error.
    pub fn answer(&mut self) -> Result<String> {
        let mut line = String::new();
        self.0.read_line(&mut line).context("redis-server")?;
        ensure!(line.starts_with(['+', ':']), "redis-server says {line:?}");
        Ok(line[1..].trim_end().to_owned())
    }

    /// Sends a command, and gives the answer.
    ///
    /// # Errors
    ///
    /// As [`Redis::send`] and [`Redis::answer`].
    pub fn ask(&mut self, command: &str) -> Result<String> {
        self.send(command)?;
        self.answer()
    }

    /// Sends a command whose answer is one text of several lines, and gives that.
    ///
    /// # Errors
    ///
    /// When it does not come, or is an error.
    pub fn bulk(&mut self, command: &str) -> Result<String> {
        self.send(command)?;
        let mut line = String::new();
        self.0.read_line(&mut line).context("redis-server")?;
        let len: usize = line.trim_end().strip_prefix('$').context("no text")?.parse()?;
        let mut text = vec![0; len + 2];
        self.0.read_exact(&mut text)?;
        Ok(String::from_utf8(text)?)
    }
}
