//! CRIU's own tool decodes every CRIU-format image that we write.

use std::collections::BTreeSet;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use memckpt_tests::peer::Peer;
use memckpt_tests::program::Program;
use memckpt_tests::{Scratch, Victim, is_root, memckpt, skip};
use serde_json::Value;

#[test]
fn crit_decodes_every_image() -> Result<()> {
    if Command::new("crit").arg("--help").output().is_err() {
        skip("crit_decodes_every_image", "no crit: apt-get install criu");
        return Ok(());
    }
    let scratch = Scratch::new()?;
    let mut victim = Victim::start("memory", ["heap,stacks,file".as_ref(), scratch.path().as_os_str()])?;
    let pid = victim.pid();
    let first = scratch.directory("1")?;
    memckpt(["pre-dump", "-t", &pid.to_string(), "-D"]).arg(&first).ok()?;
    victim.ask("dirty 3 50")?;
    let second = scratch.directory("2")?;
    memckpt([
        "dump",
        "-t",
        &pid.to_string(),
        "--leave-running",
        "--track-mem",
        "--prev-images-dir",
        "../1",
        "-D",
    ])
    .arg(&second)
    .ok()?;

    for directory in [&first, &second] {
        let seen = decoded(directory, |_| true)?;
        for needed in ["inventory.img".to_owned(), format!("pagemap-{pid}.img")] {
            ensure!(seen.contains(&needed), "no {needed} in {}", directory.display());
        }
        if directory == &second {
            for needed in ["pstree.img".to_owned(), format!("core-{pid}.img"), format!("mm-{pid}.img")] {
                ensure!(seen.contains(&needed), "no {needed} in {}", directory.display());
            }
            let cores = seen.iter().filter(|name| name.starts_with("core-")).count();
            ensure!(cores == 9, "a core for each of nine threads, and not {cores}");
        }
        ensure!(
            seen.iter().any(|name| name == "stats-dump") || directory.join("stats-dump").exists(),
            "no stats-dump"
        );
    }
    Ok(())
}

/// The images in `directory` that are `wanted`, each of which crit shows.
fn decoded(directory: &Path, mut wanted: impl FnMut(&str) -> bool) -> Result<Vec<String>> {
    let mut seen = Vec::new();
    for entry in std::fs::read_dir(directory)? {
        let entry = entry?;
        let name = entry.file_name().to_string_lossy().into_owned();
        // Pages have no header; our own file is called what CRIU never looks at.
        if !name.ends_with(".img") || name.starts_with("pages-") || !wanted(&name) {
            continue;
        }
        let output = Command::new("crit").arg("show").arg(entry.path()).output()?;
        let said = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "crit show {name} ({}):\n{said}", output.status);
        let decoded: Value =
            serde_json::from_slice(&output.stdout).with_context(|| format!("crit show {name}: {said}"))?;
        ensure!(decoded["magic"].is_string(), "{name}: {decoded}");
        seen.push(name);
    }
    Ok(seen)
}

/// Every kind of image that a dump of open files has.
#[test]
fn crit_decodes_the_images_of_open_files() -> Result<()> {
    const NAME: &str = "crit_decodes_the_images_of_open_files";
    if Command::new("crit").arg("--help").output().is_err() || !is_root() {
        skip(NAME, "no crit: apt-get install criu; or not root");
        return Ok(());
    }
    let mut seen = BTreeSet::new();
    for what in ["descriptors", "connected", "terminals"] {
        let scratch = Scratch::new()?;
        let output = scratch.path().join("output");
        std::fs::write(&output, "")?;
        let mut command = match what {
            "terminals" => {
                let mut command = Command::new("/usr/bin/python3");
                command.arg("-c").arg(include_str!("../victims/terminals.py"));
                command
            }
            victim => Command::new(memckpt_tests::victim::program(victim)),
        };
        command.arg(&output);
        if what != "connected" {
            command.arg(scratch.path());
        }
        let program = Program::start(command, output)?;
        let peers = match what {
            "connected" => vec![Peer::connect(&program.output, false)?],
            _ => Vec::new(),
        };
        // Such programs are dumped while they rest.
        if what != "connected" {
            program.come_to_rest(scratch.path()).context(what)?;
        }
        let images = scratch.directory("images")?;
        let flags = ["dump", "--leave-running", "--file-locks", "--tcp-established", "-t"];
        memckpt(flags).args(&[&program.pid.to_string(), "-D"]).arg(&images).ok()?;
        let notes: Value = serde_json::from_slice(&std::fs::read(images.join("memckpt.json"))?)?;
        ensure!(!notes["notes"].to_string().contains("cannot be restored"), "{what}: {}", notes["notes"]);
        // By kind, without the number at the end, and one of each: crit takes its time.
        decoded(&images, |name| {
            let stem = name.trim_end_matches(".img");
            let kind = stem.trim_end_matches(|c: char| c.is_ascii_hexdigit());
            let numbered = kind.ends_with('-');
            seen.insert(if numbered { kind.to_owned() } else { name.to_owned() })
        })?;
        drop(peers);
    }
    for needed in [
        "core-",
        "files.img",
        "fdinfo-",
        "fs-",
        "ids-",
        "mm-",
        "pagemap-",
        "pagemap-shmem-",
        "ghost-file-",
        "tcp-stream-",
        "memfd.img",
        "remap-fpath.img",
        "tty-info.img",
        "filelocks.img",
        "pipes-data.img",
        "fifo-data.img",
        "sk-queues.img",
        "pstree.img",
        "inventory.img",
    ] {
        ensure!(seen.contains(needed), "no {needed} among {seen:?}");
    }
    Ok(())
}
