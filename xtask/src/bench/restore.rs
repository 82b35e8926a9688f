//! `cargo xtask bench restore`: restoring 1 GiB takes no more than 1.3 times as long as a program that maps as much, faults it in, and
//! reads the same pages from the same file. Measured of memory that has asked for huge pages and of memory that has refused them: faults of
//! the one cost many times what faults of the other do, so both sides have the same. On this machine, as time is what counts: a guest counts
//! instructions, of which a checksum has many and a wait for memory none, on one processor.

use std::fs::File;
use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::time::Instant;

use anyhow::{Context as _, Result, ensure};
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::Pid;

use super::place::Place;
use super::{by_turns, median, scratch, word};
use crate::process::{Memckpt, Partner};
use crate::table;

const MIB: usize = 1024;
const PAGE: usize = 4096;
/// Pairs of measurements, by turns; odd.
const PAIRS: usize = 9;
/// How much the plain program reads at once.
const PIECE: usize = 1 << 20;

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Be the program that is compared with, reading this file.
    #[arg(long, hide = true)]
    plainly: Option<PathBuf>,
    /// What its memory has.
    #[arg(long, hide = true, default_value = "small")]
    pages: Pages,
}

/// What the kernel is to back memory with.
#[derive(Clone, Copy, Debug, clap::ValueEnum)]
enum Pages {
    Small,
    Huge,
}

impl Pages {
    fn advice(self) -> libc::c_int {
        match self {
            Self::Small => libc::MADV_NOHUGEPAGE,
            Self::Huge => libc::MADV_HUGEPAGE,
        }
    }

    /// As on the command line.
    fn name(self) -> &'static str {
        match self {
            Self::Small => "small",
            Self::Huge => "huge",
        }
    }

    /// The process that is restored.
    fn resident(self) -> Vec<String> {
        let mib = MIB.to_string();
        match self {
            Self::Small => vec![mib],
            Self::Huge => vec![mib, "huge".to_owned()],
        }
    }
}

/// `cargo xtask bench restore`.
pub(crate) fn run(args: &Args) -> Result<ExitCode> {
    if let Some(file) = &args.plainly {
        println!("{}", read_plainly(file, args.pages)?);
        return Ok(ExitCode::SUCCESS);
    }
    Place::here().run("restore", "", &["memckpt-resident"], measure)
}

/// Maps as much as the file has, faults it in, and reads the file: the microseconds that it takes.
fn read_plainly(file: &Path, pages: Pages) -> Result<u64> {
    let begun = Instant::now();
    let mut file = File::open(file)?;
    let len = usize::try_from(file.metadata()?.len())?;
    let (prot, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
    // SAFETY: a new mapping, which is used as bytes only below.
    let memory = unsafe {
        let at = libc::mmap(std::ptr::null_mut(), len, prot, flags, -1, 0);
        ensure!(at != libc::MAP_FAILED, "mmap: {}", std::io::Error::last_os_error());
        ensure!(libc::madvise(at, len, pages.advice()) == 0, "madvise: {}", std::io::Error::last_os_error());
        std::slice::from_raw_parts_mut(at.cast::<u8>(), len)
    };
    for page in memory.chunks_mut(PAGE) {
        page[0] = 1;
    }
    for piece in memory.chunks_mut(PIECE) {
        file.read_exact(piece)?;
    }
    Ok(u64::try_from(begun.elapsed().as_micros())?)
}

fn measure(programs: &Path) -> Result<bool> {
    let small = compare(programs, Pages::Small)?;
    let huge = compare(programs, Pages::Huge)?;
    Ok(small && huge)
}

/// Whether memory with such pages comes back soon enough.
fn compare(programs: &Path, pages: Pages) -> Result<bool> {
    let memckpt = Memckpt::new(programs.join("memckpt"));
    let scratch = scratch()?;
    let images = scratch.path().to_str().context("a path that is no text")?;
    let args = pages.resident();
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    // Not to a console, as a guest has, which no checkpoint holds.
    let process = Partner::start(&programs.join("memckpt-resident"), &args, Stdio::null())?;
    let pid: i32 = process.pid().parse()?;
    let huge_kib = huge_kib(pid)?;
    memckpt.run(&["dump", "--shell-job", "-t", &process.pid(), "-D", images])?;
    drop(process);
    let file = scratch.path().join("pages-1.img");

    let mut rows = vec![["pair", "plain ms", "restore ms", "restore/plain"].map(str::to_owned).to_vec()];
    let mut ratios = Vec::new();
    // The first warms up.
    for pair in 0..=PAIRS {
        let (plain, restored) = by_turns(pair, || plain(&file, pages), || restore(&memckpt, images, pid))?;
        if pair > 0 {
            let ratio = restored * 1000 / plain.max(1);
            let shown = format!("{}.{:02}", ratio / 1000, ratio % 1000 / 10);
            rows.push(vec![pair.to_string(), millis(plain), millis(restored), shown]);
            ratios.push(ratio);
        }
    }
    println!("{}", table::format(&rows));
    let ratio = median(ratios);
    let passed = ratio <= 1300;
    println!(
        "{}: 1 GiB, of which {} MiB in huge pages, is restored in {}.{:02} times the time that it takes to map, fault in and read it \
         (at most 1.3)",
        word(passed),
        huge_kib / 1024,
        ratio / 1000,
        ratio % 1000 / 10
    );
    Ok(passed)
}

/// Anonymous memory of a process in huge pages.
fn huge_kib(pid: i32) -> Result<u64> {
    let path = format!("/proc/{pid}/smaps_rollup");
    let text = std::fs::read_to_string(&path).with_context(|| format!("read {path}"))?;
    let line = text.lines().find_map(|line| line.strip_prefix("AnonHugePages:"));
    let kib = line.and_then(|line| line.trim().strip_suffix(" kB")?.parse().ok());
    kib.with_context(|| format!("{path} tells no AnonHugePages"))
}

/// Microseconds of the program that is compared with, without its start and its end.
fn plain(file: &Path, pages: Pages) -> Result<u64> {
    let mut command = Command::new(std::env::current_exe()?);
    command.args(["bench", "restore", "--pages", pages.name(), "--plainly"]).arg(file);
    let output = command.output()?;
    ensure!(output.status.success(), "the plain program fails ({})", output.status);
    let text = String::from_utf8_lossy(&output.stdout);
    text.trim().parse().with_context(|| format!("the plain program says {text:?}"))
}

/// Microseconds of a restore, with the start and the end of memckpt. What comes back finds nobody at its pipes any more, and ends in order.
fn restore(memckpt: &Memckpt, images: &str, pid: i32) -> Result<u64> {
    let mut command = memckpt.command(&["restore", "--shell-job", "-d", "-S", "-D", images]);
    command.stdin(Stdio::null());
    let begun = Instant::now();
    let status = command.status()?;
    let took = begun.elapsed();
    ensure!(status.success(), "memckpt restore fails ({status})");
    let ended = waitpid(Pid::from_raw(pid), None).context("wait for the restored process")?;
    ensure!(matches!(ended, WaitStatus::Exited(_, 0)), "the restored process ends so: {ended:?}");
    Ok(u64::try_from(took.as_micros())?)
}

fn millis(micros: u64) -> String {
    format!("{}.{}", micros / 1000, micros % 1000 / 100)
}
