//! `cargo xtask run`: memckpt's main job on a demo process, or any `memckpt` command.

use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::{Command, ExitCode, Stdio};

use anyhow::{Context, Result, ensure};

use crate::process::{Memckpt, Meta, Partner, milliseconds};
use crate::service::Service;
use crate::{table, workspace};

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Arguments for `memckpt` (default: show the main job on a bundled demo process).
    #[arg(last = true)]
    args: Vec<String>,
}

/// `cargo xtask run`.
pub(crate) fn run(args: &Args) -> Result<ExitCode> {
    let mut memckpt = Memckpt::new(workspace::build_bin("memckpt", "memckpt", true)?);
    if !args.args.is_empty() {
        // Only comes back when it cannot.
        return Err(memckpt.command(&args.args).exec()).context("cannot start memckpt");
    }
    let demo = workspace::build_bin("memckpt-tests", "memckpt-demo", true)?;
    memckpt.verbose = true;
    // Here nothing may fail but what the machine lacks; that is what check says, and why.
    memckpt.run(&["check"])?;
    let memory = Path::new("/dev/shm");
    let memory = if memory.is_dir() { memory } else { Path::new("/tmp") };
    let scratch = tempfile::Builder::new().prefix("memckpt-run-").tempdir_in(memory)?;
    let rows = checkpoints(&memckpt, &demo, scratch.path())?;
    there_and_back(&memckpt, &demo, scratch.path())?;
    println!("\n{}", table::format(&rows));
    // Images belong to root where sudo made them.
    if !nix::unistd::geteuid().is_root() {
        let remove = Command::new("sudo").arg("rm").arg("-rf").arg(scratch.path()).status();
        remove.context("sudo rm")?;
    }
    println!(
        "main job done: the checkpoint equals the process's memory, and the process runs on, right; another one was ended, restored, and runs on, right"
    );
    Ok(ExitCode::SUCCESS)
}

/// A directory of images in `scratch`.
fn images(scratch: &Path, step: u32) -> Result<String> {
    let path = scratch.join(step.to_string());
    std::fs::create_dir_all(&path)?;
    Ok(path.display().to_string())
}

/// Checkpoints of a process that runs on, and how they went, a row each.
fn checkpoints(memckpt: &Memckpt, demo: &Path, scratch: &Path) -> Result<Vec<Vec<String>>> {
    println!("\n$ memckpt-demo &");
    let demo = Partner::start(demo, &[], Stdio::inherit())?;
    let pid = demo.pid();
    let first = demo.line()?;
    println!("demo {pid}: 256 MiB, 4 threads, {first}");

    memckpt.run(&["watch", &pid, "--background"])?;
    memckpt.run(&["pre-dump", "-t", &pid, "-D", &images(scratch, 1)?])?;
    goes_on(&demo)?;
    memckpt.run(&["pre-dump", "-t", &pid, "-D", &images(scratch, 2)?, "--prev-images-dir", "../1"])?;
    goes_on(&demo)?;
    let last = images(scratch, 3)?;
    // Running on, as a checkpoint of a live service would; then once more, stopped, so that there is something to compare.
    memckpt.run(&[
        "dump",
        "-t",
        &pid,
        "-D",
        &last,
        "--prev-images-dir",
        "../2",
        "--track-mem",
        "--leave-running",
    ])?;
    goes_on(&demo)?;
    let stopped = images(scratch, 4)?;
    memckpt.run(&[
        "dump",
        "-t",
        &pid,
        "-D",
        &stopped,
        "--prev-images-dir",
        "../3",
        "--track-mem",
        "--leave-stopped",
    ])?;
    memckpt.run(&["show", &stopped, "--compare", &pid])?;
    println!("\n$ kill -CONT {pid}");
    demo.resume()?;
    println!("demo {pid}: {}", goes_on(&demo)?);
    memckpt.run(&["watch", &pid, "--stop"])?;
    println!("demo {pid}: {}", goes_on(&demo)?);

    let mut rows = vec![
        [
            "checkpoint",
            "kind",
            "tracker",
            "hints",
            "pages by",
            "entries read",
            "scanned",
            "written",
            "inherited",
            "frozen ms",
            "clear ms",
        ]
        .map(str::to_owned)
        .to_vec(),
    ];
    for step in 1..=4 {
        rows.push(row(step, &memckpt.meta(&scratch.join(step.to_string()))?));
    }
    Ok(rows)
}

/// A process is dumped, and so ended, and comes back.
fn there_and_back(memckpt: &Memckpt, demo: &Path, scratch: &Path) -> Result<()> {
    let mut service = Service::start(demo, scratch)?;
    let pid = service.pid().to_string();
    println!(
        "\n$ setsid memckpt-demo < fifo > log 2>&1 &\ndemo {pid}: 256 MiB, 4 threads, {}",
        service.goes_on()?
    );
    let images = images(scratch, 5)?;
    memckpt.run(&["dump", "-t", &pid, "-D", &images])?;
    service.has_ended()?;
    println!("demo {pid} has ended");
    memckpt.run(&["restore", "-D", &images, "--restore-detached"])?;
    service.is_back();
    println!("demo {pid}: {}", service.goes_on()?);
    Ok(())
}

/// Waits until all of the demo's threads have checked all their memory after now.
fn goes_on(demo: &Partner) -> Result<String> {
    let before = demo.pending_lines();
    // The round that was under way began before now.
    let lines = [demo.line()?, demo.line()?];
    for line in before.iter().chain(&lines) {
        ensure!(line.starts_with("verified"), "the demo says: {line}");
    }
    Ok(lines[1].clone())
}

fn row(step: u32, meta: &Meta) -> Vec<String> {
    let none = || "none".to_owned();
    vec![
        step.to_string(),
        meta.kind.clone(),
        meta.tracker.clone().unwrap_or_else(none),
        meta.hint_mode.clone().unwrap_or_else(none),
        meta.page_mode.clone(),
        meta.counters.entries_read.to_string(),
        meta.counters.pages_scanned.to_string(),
        meta.counters.pages_written.to_string(),
        meta.counters.pages_inherited.to_string(),
        milliseconds(meta.timings.frozen_us),
        milliseconds(meta.timings.clear_us),
    ]
}
