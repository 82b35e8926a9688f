//! A process with so many MiB of resident memory, for benchmarks: `memckpt-resident MIB [huge]`. Prints `ready`; then
//! `dirty SEED PAGES CHUNKS` on standard input writes to PAGES random pages inside CHUNKS random chunks of 2 MiB, answer `ok`.
//!
//! Its addresses are not randomized: which libraries share a chunk with something that is written to would differ from
//! run to run, and with it the entries read.
#![allow(clippy::print_stdout, reason = "its report")]

use std::io::BufRead as _;
use std::os::unix::process::CommandExt as _;
use std::process::{Command, ExitCode};

use memckpt_tests::memory::{PAGE, Pages, Random};
use nix::sys::personality::{self, Persona};

const CHUNK_PAGES: usize = (2 << 20) / PAGE;

fn main() -> ExitCode {
    if let Err(error) = without_randomization() {
        println!("error {error}");
        return ExitCode::FAILURE;
    }
    let args: Vec<String> = std::env::args().skip(1).collect();
    let (mib, map): (_, fn(usize) -> std::io::Result<Pages>) = match args.as_slice() {
        [mib] => (mib.parse::<usize>().ok(), Pages::map),
        [mib, huge] if huge == "huge" => (mib.parse().ok(), Pages::map_huge),
        _ => (None, Pages::map),
    };
    let Some(mut pages) = mib.and_then(|mib| map((mib << 20) / PAGE).ok()) else {
        println!("usage: memckpt-resident MIB [huge]");
        return ExitCode::from(2);
    };
    for index in 0..pages.count() {
        pages.page_mut(index)[0] = index as u64 + 1;
    }
    // Made once: an allocation whose size depends on MIB would touch more of malloc's own memory for some sizes.
    let mut places: Vec<usize> = (0..pages.count() / CHUNK_PAGES).collect();
    println!("ready");
    for line in std::io::stdin().lock().lines().map_while(Result::ok) {
        let numbers: Vec<usize> =
            line.split_ascii_whitespace().skip(1).filter_map(|n| n.parse().ok()).collect();
        let &[seed, count, chunks] = numbers.as_slice() else {
            println!("error usage: dirty SEED PAGES CHUNKS");
            continue;
        };
        dirty(&mut pages, &mut places, &mut Random(seed as u64), count, chunks);
        println!("ok");
    }
    ExitCode::SUCCESS
}

/// Starts this program anew, if its addresses are randomized.
fn without_randomization() -> std::io::Result<()> {
    let persona = personality::get()?;
    if persona.contains(Persona::ADDR_NO_RANDOMIZE) {
        return Ok(());
    }
    personality::set(persona | Persona::ADDR_NO_RANDOMIZE)?;
    Err(Command::new("/proc/self/exe").args(std::env::args_os().skip(1)).exec())
}

/// Exactly `count` different pages, spread evenly over `chunks` different chunks.
fn dirty(pages: &mut Pages, places: &mut [usize], random: &mut Random, count: usize, chunks: usize) {
    for at in 0..chunks.min(places.len()) {
        let other = at + random.below(places.len() - at);
        places.swap(at, other);
    }
    for written in 0..count {
        let chunk = places[written % chunks];
        // The next page of this chunk each time it is its turn, by an odd stride: all different.
        let page = (written / chunks * 37 + 11) % CHUNK_PAGES;
        pages.page_mut(chunk * CHUNK_PAGES + page)[7] = random.word();
    }
}
