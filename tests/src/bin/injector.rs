//! Freezes, infects and cures a process over and over, to be killed meanwhile: `injector PID ADDRESS LENGTH ROUNDS`.
//!
//! Writes one byte to its standard output before the first round. Everything happens on the main thread.

use std::fs::File;
use std::io::{self, Read, Write};
use std::time::Duration;

use anyhow::{Context, Result};
use memckpt::addr::{Addr, AddrRange};
use memckpt::target::{Frozen, Injection};

fn main() -> Result<()> {
    let mut args = std::env::args().skip(1).map(|a| a.parse::<u64>());
    let mut next = || args.next().context("injector PID ADDRESS LENGTH ROUNDS")?.context("not a number");
    let pid = next()? as i32;
    let range = AddrRange::with_len(Addr(next()?), next()?);
    let rounds = next()?;
    io::stdout().write_all(b"x")?;
    io::stdout().flush()?;
    (0..rounds).try_for_each(|_| round(pid, range))
}

fn round(pid: i32, range: AddrRange) -> Result<()> {
    let injection = Injection::prepare(pid)?;
    let mut frozen = Frozen::freeze(pid, Duration::from_secs(10))?;
    let mut infected = frozen.infect(injection)?;
    infected.grab(&[range], &mut |pipe, len| {
        let mut pipe = File::from(pipe.try_clone_to_owned()?);
        io::copy(&mut (&mut pipe).take(len), &mut io::sink()).map(drop)
    })?;
    infected.userfaultfd()?;
    infected.cure()?;
    frozen.thaw();
    Ok(())
}
