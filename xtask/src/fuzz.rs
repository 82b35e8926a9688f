//! `cargo xtask fuzz`: the readers of images, against a fuzzer that begins with real checkpoints.

use std::fs;
use std::path::Path;
use std::process::{Command, ExitCode};

use anyhow::{Context, Result, ensure};

use crate::{packages, tools, workspace};

const CARGO_FUZZ: &str = "0.13.2";
/// What an input may cost: it has some hundred KiB.
const LIMITS: [&str; 3] = ["-timeout=10", "-malloc_limit_mb=16", "-rss_limit_mb=512"];
const PAGE: u64 = 4096;
/// The number that target `image` knows a kind of image by.
const KINDS: [(&str, u8); 21] = [
    ("inventory", 0),
    ("pstree", 1),
    ("core-", 2),
    ("mm-", 3),
    ("pagemap-", 4),
    ("ids-", 5),
    ("files", 6),
    ("fdinfo-", 7),
    ("fs-", 8),
    ("pipes-data", 9),
    ("fifo-data", 9),
    ("sk-queues", 10),
    ("ghost-file-", 11),
    ("remap-fpath", 12),
    ("memfd", 13),
    ("tty-info", 14),
    ("filelocks", 15),
    ("tcp-stream-", 16),
    ("stats-dump", 18),
    ("memckpt.json", 19),
    ("memckpt-checksums", 20),
];

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// What is fuzzed, one after the other.
    #[arg(value_parser = ["checkpoint", "image", "maps"], default_values = ["checkpoint", "image", "maps"])]
    targets: Vec<String>,
    /// How long each.
    #[arg(long, default_value_t = 60)]
    seconds: u64,
}

/// `cargo xtask fuzz`.
pub(crate) fn run(args: &Args) -> Result<ExitCode> {
    packages::install(packages::TEST)?;
    packages::install(packages::FUZZ)?;
    tools::install("cargo-fuzz", CARGO_FUZZ, |_| {})?;
    let package = workspace::root().join("memckpt");
    corpus(&package.join("fuzz/corpus"))?;
    let mut path = tools::directory()?.join("cargo-fuzz/bin").into_os_string();
    path.push(":");
    path.push(std::env::var_os("PATH").unwrap_or_default());
    for target in &args.targets {
        println!("== {target}, {} s", args.seconds);
        let mut cargo = Command::new("cargo");
        cargo.current_dir(&package).args(["fuzz", "run", target, "--"]).args(LIMITS);
        cargo.arg(format!("-max_total_time={}", args.seconds)).arg("-print_final_stats=1");
        // Sanitizers of a stable compiler.
        tools::must(cargo.env("RUSTC_BOOTSTRAP", "1").env("PATH", &path))?;
    }
    Ok(ExitCode::SUCCESS)
}

/// Real checkpoints, as the targets take them: those that `damaged_images` damages.
fn corpus(corpus: &Path) -> Result<()> {
    let memckpt = workspace::build_bin("memckpt", "memckpt", false)?;
    let tests =
        workspace::build(&["test", "--package", "memckpt-tests", "--test", "damaged_images", "--no-run"])?;
    let test = tests.iter().find(|test| test.name == "damaged_images").context("no damaged_images")?;
    let kept = tempfile::Builder::new().prefix("memckpt-corpus-").tempdir()?;
    let mut dump = Command::new(&test.path);
    dump.current_dir(&test.package_dir).arg("--test-threads=1");
    dump.env("MEMCKPT_BIN", memckpt).env("MEMCKPT_DAMAGE_SECONDS", "0").env("MEMCKPT_KEEP", kept.path());
    tools::must(&mut dump)?;
    for target in ["checkpoint", "image", "maps"] {
        fs::create_dir_all(corpus.join(target))?;
    }
    let mut checkpoints = 0;
    for checkpoint in fs::read_dir(kept.path())? {
        let checkpoint = checkpoint?;
        let name = checkpoint.file_name().into_string().ok().context("a name that is no text")?;
        let mut all = Vec::new();
        for file in fs::read_dir(checkpoint.path())? {
            let path = file?.path();
            let file = path.file_name().and_then(|name| name.to_str()).context("a name that is no text")?;
            let content = if file.starts_with("pages-") {
                let pages = u32::try_from(path.metadata()?.len() / PAGE)?;
                pages.to_le_bytes().to_vec()
            } else {
                fs::read(&path)?
            };
            all.push(u8::try_from(file.len())?);
            all.extend_from_slice(file.as_bytes());
            all.extend_from_slice(&u32::try_from(content.len())?.to_le_bytes());
            all.extend_from_slice(&content);
            if let Some((_, kind)) = KINDS.iter().find(|(prefix, _)| file.starts_with(prefix)) {
                fs::write(
                    corpus.join("image").join(format!("{name}-{file}")),
                    [&[*kind], &*content].concat(),
                )?;
            }
        }
        fs::write(corpus.join("checkpoint").join(&name), all)?;
        checkpoints += 1;
    }
    ensure!(checkpoints > 0, "no checkpoint was taken: it takes root");
    fs::copy("/proc/self/maps", corpus.join("maps/xtask"))?;
    Ok(())
}
