//! Established TCP connections: what waits in their queues, and where they stand. With TCP_REPAIR, which the process itself
//! switches on and off again where it may: the parasite does it, and undoes it if we die.
//!
//! A connection of a tree that is ended must meet nobody until it is restored: the peer would be told that there is no such
//! connection. So its packets are dropped, in the freeze by a table of nf_tables that goes with us:
//!
//! ```text
//! memckpt                          the tree            the peer
//! block (table of ours)            stands still        sends again what is not acknowledged
//! read, write the checkpoint
//! kill                             ends; our copies of
//!                                  its sockets stay
//! repair mode on in our copies
//! block for good (CRIU's table)                        still sends again
//! close our copies: no FIN, no RST
//! restore deletes CRIU's table     goes on             is answered
//! ```
//!
//! Killed before the kill, we leave the tree running and its connections going: the table is gone with us. Killed right after it, we
//! leave a checkpoint that is whole, and connections that their peers may find closed.

use std::collections::hash_map::Entry;
use std::collections::{HashMap, HashSet};
use std::io;
use std::os::fd::AsFd;

use crate::kernel::descriptor::{self, Descriptor};
use crate::kernel::nftables::{self, Block, Connection};
use crate::kernel::sock_diag::state;
use crate::kernel::tcp::{self, Stream};
use crate::kernel::{SyscallError, inet, status};
use crate::target::{Calls, Frozen, Infected};

use super::error::DumpError;
use super::files::refuse_descriptor;
use super::process::CapturedProcess;
use super::refuse::Refusal;
use super::request::{Afterwards, CriuVersion, Kind, Request};

/// CAP_NET_ADMIN
const NET_ADMIN: u64 = 1 << 12;
/// How many connections are under repair at once: the parasite has a list of limited length to undo it by.
const AT_ONCE: usize = 100;
/// How often a connection is read whose peer goes on sending, if the tree is to run on: it takes some microseconds each time.
const ATTEMPTS: usize = 1000;

/// What was read, by the sockets' inodes.
pub(super) type Streams = HashMap<u64, Stream>;

/// The established connections of a tree.
#[derive(Debug, Default)]
pub(super) struct Connections {
    streams: Streams,
    /// Of a tree that is to be ended: a copy of each socket.
    sockets: Vec<Descriptor>,
    connections: Vec<Connection>,
    block: Option<Block>,
}

impl Connections {
    /// Reads those of the frozen processes; they and their peers notice nothing.
    pub(super) fn take(
        processes: &mut [CapturedProcess],
        tree: &mut [Frozen],
        request: &Request,
    ) -> Result<Self, DumpError> {
        let mut taken = Self::default();
        if request.kind != Kind::Dump || !request.files.tcp_established {
            return Ok(taken);
        }
        let mut seen = HashSet::new();
        let mut found: Vec<Vec<Descriptor>> = Vec::new();
        for frozen in tree.iter() {
            found.push(established(frozen.pid(), &mut seen)?);
        }
        if request.afterwards == Afterwards::Ended {
            for socket in found.iter().flatten() {
                taken.connections.extend(connection(socket)?);
            }
            if !taken.connections.is_empty() {
                let block = Block::new(&format!("memckpt-{}", request.pid), &taken.connections);
                taken.block = Some(block.map_err(Refusal::CannotBlock)?);
            }
        }
        for ((process, frozen), sockets) in processes.iter_mut().zip(tree.iter_mut()).zip(found) {
            read_all(process, frozen, &sockets, &mut taken.streams)?;
            if taken.block.is_some() {
                taken.sockets.extend(sockets);
            }
        }
        Ok(taken)
    }

    pub(super) const fn streams(&self) -> &Streams {
        &self.streams
    }

    /// Whether their packets are held back until the restore.
    pub(super) const fn are_blocked(&self) -> bool {
        self.block.is_some()
    }

    /// The tree has ended: its connections stay as they are until somebody restores them. `checkpoint` is the dump's name.
    pub(super) fn end(self, checkpoint: &str, request: &Request) {
        let Some(block) = self.block else { return };
        for socket in &self.sockets {
            if let Err(error) = tcp::end_silently(socket.as_fd()) {
                tracing::warn!(socket = socket.name(), %error, "the peer is told that the connection ends");
            }
        }
        let table = table(checkpoint, request);
        if let Err(error) = nftables::block_for_good(&table, &self.connections) {
            tracing::warn!(%error, "peers that send something will find their connections closed");
        }
        drop(block);
    }
}

/// The table that `criu restore` deletes: by the dump's name since CRIU 4.1, by the root's PID before.
fn table(checkpoint: &str, request: &Request) -> String {
    match request.files.criu_version {
        CriuVersion::V3_17 => format!("CRIU-{}", request.pid),
        CriuVersion::V4_2 => format!("CRIU-{checkpoint}"),
    }
}

/// The sockets of process `pid` that are established connections, each once, without those with inodes that were `seen`.
fn established(pid: i32, seen: &mut HashSet<u64>) -> Result<Vec<Descriptor>, DumpError> {
    let mut found: Vec<Descriptor> = Vec::new();
    for socket in descriptor::sockets(pid)? {
        if seen.insert(socket.stat.st_ino) && is_connection(&socket)? {
            found.push(socket);
        }
    }
    Ok(found)
}

fn is_connection(socket: &Descriptor) -> Result<bool, DumpError> {
    let option = |name| socket.option(libc::SOL_SOCKET, name);
    if !matches!(option(libc::SO_DOMAIN)?, Some(libc::AF_INET | libc::AF_INET6))
        || option(libc::SO_PROTOCOL)? != Some(libc::IPPROTO_TCP)
    {
        return Ok(false);
    }
    let info =
        tcp::info(socket.as_fd()).map_err(|e| SyscallError::new("getsockopt(TCP_INFO)", socket.name(), e))?;
    Ok(info.state == state::ESTABLISHED)
}

/// The two ends of an established connection, if it still is.
fn connection(socket: &Descriptor) -> Result<Option<Connection>, DumpError> {
    let failed = |e| SyscallError::new("getpeername", socket.name(), e);
    let local = inet::local(socket.as_fd()).map_err(failed)?;
    let remote = inet::remote(socket.as_fd()).map_err(failed)?;
    Ok(remote.map(|remote| Connection { local, remote }))
}

/// Reads the connections of one process.
fn read_all(
    process: &mut CapturedProcess,
    frozen: &mut Frozen,
    sockets: &[Descriptor],
    streams: &mut Streams,
) -> Result<(), DumpError> {
    if sockets.is_empty() {
        return Ok(());
    }
    let mut by_itself = false;
    if status::status(frozen.pid())?.cap_effective & NET_ADMIN != 0 {
        by_itself = match process.infect(frozen)? {
            Some(mut parasite) => {
                let all = repaired_by_itself(&mut parasite, sockets, streams)?;
                parasite.cure()?;
                all
            }
            None => false,
        };
    }
    if !by_itself {
        tracing::info!(
            pid = frozen.pid(),
            "its connections are read without its help: it may not repair them itself"
        );
    }
    for socket in sockets {
        if let Entry::Vacant(entry) = streams.entry(socket.stat.st_ino) {
            let _repaired = tcp::Repaired::enter(socket.as_fd()).map_err(|e| failed(socket, e))?;
            entry.insert(read(socket)?);
        }
        if tcp::is_under_repair(socket.as_fd()).map_err(|e| failed(socket, e))? {
            let error = io::Error::other("it is still under repair");
            return Err(failed(socket, error).into());
        }
    }
    Ok(())
}

/// Reads connections that their process repairs meanwhile. Whether it could; then all were read.
fn repaired_by_itself(
    parasite: &mut Infected<'_>,
    sockets: &[Descriptor],
    streams: &mut Streams,
) -> Result<bool, DumpError> {
    for sockets in sockets.chunks(AT_ONCE) {
        let (mut on, mut undo) = (Calls::new(), Calls::new());
        let enter = on.buffer(&tcp::REPAIR_ON.to_ne_bytes());
        let leave = undo.buffer(&tcp::REPAIR_OFF_NO_WP.to_ne_bytes());
        let reuse = [0_i32, 1].map(|value| undo.buffer(&value.to_ne_bytes()));
        let mut entered = Vec::new();
        for socket in sockets {
            entered.push(on.set_socket_option(socket.fd, libc::IPPROTO_TCP, tcp::TCP_REPAIR, enter));
            undo.set_socket_option(socket.fd, libc::IPPROTO_TCP, tcp::TCP_REPAIR, leave);
            // Which leaving resets (do_tcp_setsockopt).
            let was = tcp::reuse_address(socket.as_fd()).map_err(|e| failed(socket, e))?;
            let reuse = reuse[usize::from(was != 0)];
            undo.set_socket_option(socket.fd, libc::SOL_SOCKET, libc::SO_REUSEADDR, reuse);
        }
        if !parasite.undo_with(&undo)? {
            return Ok(false);
        }
        let answers = parasite.run(on)?;
        let able = entered.into_iter().all(|call| answers.result(call).is_ok());
        if able {
            for socket in sockets {
                streams.insert(socket.stat.st_ino, read(socket)?);
            }
        }
        parasite.undo()?;
        if !able {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Reads a connection under repair.
fn read(socket: &Descriptor) -> Result<Stream, DumpError> {
    for _ in 0..ATTEMPTS {
        match tcp::read(socket.as_fd()) {
            Err(error) if error.raw_os_error() == Some(libc::EAGAIN) => {}
            other => return other.map_err(|e| failed(socket, e).into()),
        }
    }
    Err(refuse_descriptor(
        socket,
        "TCP connection",
        "never stands still, as its peer goes on sending: try again later",
    ))
}

fn failed(socket: &Descriptor, error: io::Error) -> SyscallError {
    SyscallError::new("TCP_REPAIR", socket.name(), error)
}
