//! Established TCP connections, with `--tcp-established`: read while the peer goes on sending, and no peer notices.

use std::io::ErrorKind;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use memckpt::kernel::nftables;
use memckpt_tests::peer::Peer;
use memckpt_tests::program::Program;
use memckpt_tests::strike::at_each_moment;
use memckpt_tests::{Scratch, is_root, memckpt, skip, victim};

/// Victim `connected`, and peers over IPv4 and IPv6.
fn start(scratch: &Scratch, more: &[&str]) -> Result<(Program, Vec<Peer>)> {
    let output = scratch.path().join("output");
    std::fs::write(&output, "")?;
    let mut command = Command::new(victim::program("connected"));
    command.arg(&output).args(more);
    let program = Program::start(command, output)?;
    let peers = (0..6).map(|n| Peer::connect(&program.output, n % 2 == 0)).collect::<Result<_>>()?;
    Ok((program, peers))
}

/// A dump of a tree that runs on, whose connections are idle, full and busy.
fn nobody_notices(test: &str, more: &[&str]) -> Result<()> {
    if !is_root() {
        skip(test, "not root");
        return Ok(());
    }
    let scratch = Scratch::new()?;
    let (program, mut peers) = start(&scratch, more)?;
    let pid = program.pid.to_string();
    ensure!(peers[0].fill()? > 100_000, "hardly anything is on its way");
    let mut waiting = 0;
    for round in 0..8 {
        let images = scratch.directory(&round.to_string())?;
        // One that goes on sending meanwhile.
        peers[1].send(1 << 20)?;
        let before = program.lines()?;
        memckpt(["dump", "--leave-running", "--tcp-established", "-t", &pid, "-D"]).arg(&images).ok()?;
        let streams = std::fs::read_dir(&images)?.filter_map(|entry| {
            let entry = entry.ok()?;
            let is_stream = entry.file_name().to_string_lossy().starts_with("tcp-stream-");
            is_stream.then(|| entry.metadata().map_or(0, |m| m.len()))
        });
        let lengths: Vec<u64> = streams.collect();
        ensure!(lengths.len() == peers.len(), "{} streams for {} connections", lengths.len(), peers.len());
        waiting += lengths.iter().sum::<u64>();
        program.wait_for(before + 3)?;
        for (n, peer) in peers.iter_mut().enumerate().skip(1) {
            peer.exchange(1000).with_context(|| format!("round {round}, connection {n}"))?;
        }
    }
    ensure!(waiting > 100_000, "only {waiting} bytes in the queues");
    peers[0].receive()?;
    program.wait_for(program.lines()? + 3)
}

#[test]
fn nobody_notices_a_dump() -> Result<()> {
    nobody_notices("nobody_notices_a_dump", &[])
}

/// Who has no CAP_NET_ADMIN cannot repair its connections itself.
#[test]
fn nobody_notices_a_dump_of_somebody_without_privileges() -> Result<()> {
    nobody_notices("nobody_notices_a_dump_of_somebody_without_privileges", &["nobody"])
}

/// Of a tree that has ended the peers hear nothing until somebody lets packets through again; then there is no such connection.
#[test]
fn a_tree_that_has_ended_is_silent() -> Result<()> {
    const NAME: &str = "a_tree_that_has_ended_is_silent";
    if !is_root() {
        skip(NAME, "not root");
        return Ok(());
    }
    let scratch = Scratch::new()?;
    let (mut program, mut peers) = start(&scratch, &[])?;
    let images = scratch.directory("images")?;
    let pid = program.pid.to_string();
    memckpt(["dump", "--tcp-established", "--criu-version", "3.17", "-t", &pid, "-D"]).arg(&images).ok()?;
    program.ended()?;
    for peer in &mut peers {
        peer.send(100)?;
        ensure!(peer.silence()? == ErrorKind::WouldBlock, "the peer heard something");
    }
    // As `criu restore` does when the connections are there again.
    nftables::unblock(&format!("CRIU-{pid}")).context("the packets are not dropped")?;
    for peer in &mut peers {
        // What was not answered is sent again some time.
        let heard = peer.receive().expect_err("nobody can have answered");
        let heard = heard.root_cause().to_string();
        ensure!(heard.contains("reset"), "{heard}");
    }
    Ok(())
}

/// Without the option, connections are refused.
#[test]
fn a_connection_is_refused_unless_asked_for() -> Result<()> {
    let scratch = Scratch::new()?;
    let (program, mut peers) = start(&scratch, &[])?;
    let images = scratch.directory("images")?;
    memckpt(["dump", "-t", &program.pid.to_string(), "-D"])
        .arg(&images)
        .refused(&["TCP connection", "--tcp-established"])?;
    peers.iter_mut().try_for_each(|peer| peer.exchange(10))?;
    program.wait_for(program.lines()? + 3)
}

/// Killed at any moment at which a connection is under repair, we leave it as it was: the parasite sees to that.
#[test]
fn killed_while_connections_are_under_repair() -> Result<()> {
    const NAME: &str = "killed_while_connections_are_under_repair";
    /// include/uapi/linux/tcp.h: while it is set, the socket is under repair.
    const TCP_REPAIR_QUEUE: u64 = 20;
    if !is_root() {
        skip(NAME, "not root");
        return Ok(());
    }
    let scratch = Scratch::new()?;
    let (program, mut peers) = start(&scratch, &[])?;
    let pid = program.pid.to_string();
    let dump = |moment: u64| {
        let images = scratch.directory(&moment.to_string())?;
        Ok(memckpt(["dump", "--leave-running", "--tcp-established", "-t", &pid, "-D"]).arg(images))
    };
    let sets_it = |regs: &libc::user_regs_struct| {
        regs.orig_rax == libc::SYS_setsockopt as u64
            && (regs.rsi, regs.rdx) == (libc::IPPROTO_TCP as u64, TCP_REPAIR_QUEUE)
    };
    let moments = at_each_moment(dump, sets_it, || {
        // The victim looks whether its connections are under repair, and reusable.
        program.wait_for(program.lines()? + 3)?;
        peers.iter_mut().try_for_each(|peer| peer.exchange(1000))
    })?;
    // Three times each, and each time twice: before and after.
    ensure!(moments >= 6 * peers.len() as u64, "only {moments} moments");
    Ok(())
}
