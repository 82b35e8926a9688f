//! `cargo xtask bench scan`: what an incremental pre-dump in a session with complete hints reads and costs.
//!
//! 1. Of 1 GiB resident with 1 % of its pages dirtied inside 2 % of its chunks, at most 3 % of the entries of a full scan.
//! 2. From 128 MiB to 2 GiB of clean memory, neither entries read nor frozen time less `clear_ms` differ by more than 10 %.

use std::path::Path;
use std::process::{ExitCode, Stdio};

use anyhow::{Result, ensure};

use super::place::Place;
use super::{median, scratch, word};
use crate::process::{Memckpt, Meta, Partner, milliseconds};
use crate::table;

/// Sizes of clean memory, MiB.
const SIZES: [usize; 5] = [128, 256, 512, 1024, 2048];
/// Checkpoints of each size of which the median counts; odd, and a multiple of how many sizes there are.
const REPETITIONS: usize = 45;
const PAGES_PER_MIB: usize = 256;

/// `cargo xtask bench scan`.
pub(crate) fn run(place: &Place) -> Result<ExitCode> {
    // 4 GiB of victims and as much of their images.
    place.run("scan", "12G", &["memckpt-resident"], measure)
}

/// One process, its session and its chain of pre-dumps.
struct Chain<'a> {
    memckpt: &'a Memckpt,
    process: Partner,
    scratch: tempfile::TempDir,
    length: usize,
}

impl<'a> Chain<'a> {
    fn start(memckpt: &'a Memckpt, programs: &Path, mib: usize) -> Result<Self> {
        let process =
            Partner::start(&programs.join("memckpt-resident"), &[&mib.to_string()], Stdio::inherit())?;
        memckpt.run(&["watch", &process.pid(), "--background"])?;
        Ok(Self { memckpt, process, scratch: scratch()?, length: 0 })
    }

    fn dirty(&mut self, pages: usize, chunks: usize) -> Result<()> {
        let answer = self.process.ask(&format!("dirty {} {pages} {chunks}", self.length + 1))?;
        ensure!(answer == "ok", "{answer}");
        Ok(())
    }

    fn pre_dump(&mut self) -> Result<Meta> {
        self.length += 1;
        let images = self.scratch.path().join(self.length.to_string());
        std::fs::create_dir(&images)?;
        let (pid, parent) = (self.process.pid(), format!("../{}", self.length - 1));
        let images_text = images.display().to_string();
        let mut args = vec!["pre-dump", "-t", &pid, "-D", &images_text];
        if self.length > 1 {
            args.extend(["--prev-images-dir", &parent]);
        }
        self.memckpt.run(&args)?;
        self.memckpt.meta(&images)
    }
}

fn measure(programs: &Path) -> Result<bool> {
    let memckpt = Memckpt::new(programs.join("memckpt"));
    let narrowed = narrowed(&memckpt, programs)?;
    let flat = flat(&memckpt, programs)?;
    Ok(narrowed && flat)
}

/// Criterion 1.
fn narrowed(memckpt: &Memckpt, programs: &Path) -> Result<bool> {
    let mib = 1024;
    let (pages, chunks) = (mib * PAGES_PER_MIB / 100, (mib / 2).div_ceil(50));
    let mut chain = Chain::start(memckpt, programs, mib)?;
    let full = chain.pre_dump()?;
    // The first changes what is carried over; the second is like any later one.
    chain.dirty(pages, chunks)?;
    chain.pre_dump()?;
    chain.dirty(pages, chunks)?;
    let increment = chain.pre_dump()?;

    let mut rows = vec![
        ["1 GiB resident", "entries read", "written", "inherited", "hints", "losses"]
            .map(str::to_owned)
            .to_vec(),
    ];
    for (name, meta) in [("full scan", &full), ("1 % of pages in 2 % of chunks", &increment)] {
        rows.push(vec![
            name.to_owned(),
            meta.counters.entries_read.to_string(),
            meta.counters.pages_written.to_string(),
            meta.counters.pages_inherited.to_string(),
            meta.hint_mode.clone().unwrap_or_else(|| "none".to_owned()),
            meta.counters.losses.to_string(),
        ]);
    }
    println!("{}", table::format(&rows));
    let written_at_least = pages as u64;
    ensure!(increment.counters.pages_written >= written_at_least, "dirty pages were not written");
    let (read, all) = (increment.counters.entries_read, full.counters.entries_read.max(1));
    let verdict = read * 100 <= all * 3;
    // Hundredths of a per cent.
    let share = read * 10_000 / all;
    println!(
        "{}: {}.{:02} % of the entries of a full scan were read (at most 3 %)\n",
        word(verdict),
        share / 100,
        share % 100
    );
    for note in &increment.notes {
        println!("note: {note}");
    }
    Ok(verdict)
}

/// Criterion 2.
fn flat(memckpt: &Memckpt, programs: &Path) -> Result<bool> {
    let mut rows = vec![
        ["clean MiB", "entries read", "frozen less clear ms", "clear ms", "written"]
            .map(str::to_owned)
            .to_vec(),
    ];
    let mut chains = Vec::new();
    for mib in SIZES {
        let mut chain = Chain::start(memckpt, programs, mib)?;
        chain.pre_dump()?;
        chains.push((mib, chain, Vec::new()));
    }
    // One of each size in turn, so that a slow moment of the machine meets all alike; each begins a round as often as any other,
    // since what comes behind 2 GiB finds little in the caches. The first round warms up.
    for round in 0..=REPETITIONS {
        for at in 0..SIZES.len() {
            let (_, chain, metas) = &mut chains[(at + round) % SIZES.len()];
            chain.dirty(256, 2)?;
            let meta = chain.pre_dump()?;
            if round > 0 {
                metas.push(meta);
            }
        }
    }
    let (mut entries, mut frozen) = (Vec::new(), Vec::new());
    for (mib, _, metas) in &chains {
        let of = |value: &dyn Fn(&Meta) -> u64| median(metas.iter().map(value).collect());
        let read = of(&|meta| meta.counters.entries_read);
        let still = of(&|meta| meta.timings.frozen_us.saturating_sub(meta.timings.clear_us));
        rows.push(vec![
            mib.to_string(),
            read.to_string(),
            milliseconds(still),
            milliseconds(of(&|meta| meta.timings.clear_us)),
            of(&|meta| meta.counters.pages_written).to_string(),
        ]);
        entries.push(read);
        frozen.push(still);
    }
    println!("{}", table::format(&rows));
    let mut passed = true;
    for (what, values) in [("entries read", entries), ("frozen time less clear_ms", frozen)] {
        let (least, most) =
            (values.iter().min().copied().unwrap_or(0).max(1), values.iter().max().copied().unwrap_or(0));
        let verdict = most * 10 <= least * 11;
        let spread = (most - least) * 1000 / least;
        println!(
            "{}: {what} differs by {}.{} % from 128 MiB to 2 GiB (at most 10 %)",
            word(verdict),
            spread / 10,
            spread % 10
        );
        passed &= verdict;
    }
    Ok(passed)
}
