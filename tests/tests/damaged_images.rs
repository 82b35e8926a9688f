//! Images that somebody, or a disk, has changed: whatever they say, they are read to an end, with an error or without, soon, and in little
//! memory. Real dumps are damaged at random, from a seed.

use std::fs;
use std::os::unix::process::{CommandExt as _, ExitStatusExt as _};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, Result, ensure};
use memckpt_tests::memory::Random;
use memckpt_tests::program::Program;
use memckpt_tests::{Scratch, command, is_root, memckpt, quick, say, skip};
use nix::sys::resource::{Resource, setrlimit};

/// What reading a checkpoint of some hundred KiB may take at most.
const MEMORY: u64 = 256 << 20;
const TIME: Duration = Duration::from_secs(10);
/// How long each program's images are damaged for, if nobody says otherwise by MEMCKPT_DAMAGE_SECONDS.
const SECONDS: u64 = 8;

/// A file of a checkpoint.
struct Image {
    name: String,
    bytes: Vec<u8>,
}

#[test]
fn of_a_tree() -> Result<()> {
    damaged("of_a_tree", &|scratch| Program::victim("ring", scratch))
}

#[test]
fn of_many_threads() -> Result<()> {
    damaged("of_many_threads", &|scratch| Program::victim("threads", scratch))
}

#[test]
fn of_all_kinds_of_files() -> Result<()> {
    damaged("of_all_kinds_of_files", &|scratch| {
        let output = scratch.path().join("output");
        let mut command = Command::new(memckpt_tests::victim::program("descriptors"));
        command.arg(&output).arg(scratch.path());
        let program = Program::start(command, output)?;
        program.come_to_rest(scratch.path())?;
        Ok(program)
    })
}

/// Damages what a dump of a program has written, one file at a time.
fn damaged(test: &str, start: &dyn Fn(&Scratch) -> Result<Program>) -> Result<()> {
    if !is_root() {
        skip(test, "not root");
        return Ok(());
    }
    let scratch = Scratch::new()?;
    let program = start(&scratch)?;
    let whole = scratch.directory("whole")?;
    let pid = program.pid.to_string();
    memckpt(["dump", "--leave-running", "--file-locks", "-t", &pid, "-D"]).arg(&whole).ok()?;
    drop(program);
    ensure!(read(&whole)?.is_none(), "what is whole cannot be read");
    let images = images(&whole)?;
    if let Some(kept) = std::env::var_os("MEMCKPT_KEEP") {
        keep(&whole, &PathBuf::from(kept).join(test))?;
    }
    let given = |name: &str| std::env::var(name).ok().and_then(|text| text.parse::<u64>().ok());
    let now = SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs();
    let seed = given("MEMCKPT_SEED").unwrap_or(now);
    let seconds = given("MEMCKPT_DAMAGE_SECONDS").unwrap_or(if quick() { 1 } else { SECONDS });
    let mut random = Random(seed);
    let end = Instant::now() + Duration::from_secs(seconds);
    let (mut tried, mut refused) = (0, 0);
    while Instant::now() < end {
        let image = &images[random.below(images.len())];
        let bytes = damage(&image.bytes, &images, &mut random);
        let path = whole.join(&image.name);
        fs::write(&path, &bytes)?;
        let error = read(&whole).with_context(|| {
            // To be looked at: the scratch directory goes.
            let kept =
                std::env::temp_dir().join(format!("memckpt-damaged-{}-{}", image.name, std::process::id()));
            let _ = fs::write(&kept, &bytes);
            format!("MEMCKPT_SEED={seed}, number {tried}: {} (kept as {})", image.name, kept.display())
        })?;
        tried += 1;
        refused += usize::from(error.is_some());
        fs::write(&path, &image.bytes)?;
    }
    say(&format!("{test}: seed {seed}: {tried} times damaged, {refused} times refused"));
    ensure!(tried == 0 && seconds == 0 || refused * 4 > tried, "damage is hardly ever noticed");
    Ok(())
}

/// For the fuzzer to begin with (`cargo xtask fuzz`).
fn keep(whole: &Path, kept: &Path) -> Result<()> {
    fs::create_dir(kept)?;
    for file in fs::read_dir(whole)? {
        let file = file?;
        fs::copy(file.path(), kept.join(file.file_name()))?;
    }
    Ok(())
}

/// All files but pages.
fn images(directory: &Path) -> Result<Vec<Image>> {
    let mut images = Vec::new();
    let mut paths: Vec<PathBuf> =
        fs::read_dir(directory)?.map(|entry| Ok(entry?.path())).collect::<Result<_>>()?;
    paths.sort();
    for path in paths {
        let name =
            path.file_name().and_then(|name| name.to_str()).context("a name that is no text")?.to_owned();
        if path.is_file() && !name.starts_with("pages-") {
            images.push(Image { bytes: fs::read(&path)?, name });
        }
    }
    Ok(images)
}

/// Reads a checkpoint as a restore does; the error, if there is one.
fn read(images: &Path) -> Result<Option<String>> {
    let mut command = Command::new(command::binary());
    command.args(["restore", "--dry-run", "-D"]).arg(images).stdin(Stdio::null()).stdout(Stdio::null());
    command.stderr(Stdio::piped());
    // SAFETY: setrlimit is a plain system call.
    unsafe { command.pre_exec(|| Ok(setrlimit(Resource::RLIMIT_AS, MEMORY, MEMORY)?)) };
    let begun = Instant::now();
    let output = command.output()?;
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    ensure!(begun.elapsed() < TIME, "it took {:?}", begun.elapsed());
    ensure!(output.status.signal().is_none(), "{}: {said}", output.status);
    match output.status.code() {
        Some(0) => Ok(None),
        // An error, told in words.
        Some(1..=9) if said.starts_with("memckpt: ") => Ok(Some(said)),
        _ => anyhow::bail!("{}: {said}", output.status),
    }
}

/// `bytes`, damaged in one or a few ways.
fn damage(bytes: &[u8], all: &[Image], random: &mut Random) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    for _ in 0..=random.below(3) {
        let at = random.below(bytes.len().max(1));
        match random.below(7) {
            0 => bytes.truncate(at),
            1 => bytes.get_mut(at).into_iter().for_each(|byte| *byte ^= 1 << random.below(8)),
            2 => bytes.get_mut(at).into_iter().for_each(|byte| *byte = 0xff),
            3 => {
                let extremes = [0_u64, 1, 0x7fff_ffff, 0xffff_ffff, 1 << 47, u64::MAX >> 1, u64::MAX];
                let value = extremes[random.below(extremes.len())].to_le_bytes();
                for (byte, new) in bytes.iter_mut().skip(at).zip(value) {
                    *byte = new;
                }
            }
            4 => {
                let end = (at + random.below(64)).min(bytes.len());
                bytes.drain(at.min(end)..end);
            }
            5 => {
                let end = (at + random.below(256)).min(bytes.len());
                let again = bytes[at.min(end)..end].to_vec();
                bytes.splice(at.min(end)..at.min(end), again);
            }
            _ => {
                let other = &all[random.below(all.len())].bytes;
                let from = random.below(other.len().max(1));
                let piece = &other[from.min(other.len())..(from + random.below(128)).min(other.len())];
                bytes.splice(at.min(bytes.len())..at.min(bytes.len()), piece.iter().copied());
            }
        }
    }
    bytes
}
