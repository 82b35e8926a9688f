//! CRIU's own tool decodes every CRIU-format image that we write.

use std::process::Command;

use anyhow::{Context, Result, ensure};
use memckpt_tests::{Scratch, Victim, memckpt, skip};
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
        let mut seen = Vec::new();
        for entry in std::fs::read_dir(directory)? {
            let entry = entry?;
            let name = entry.file_name().to_string_lossy().into_owned();
            // Pages have no header; our own file is called what CRIU never looks at.
            if !name.ends_with(".img") || name.starts_with("pages-") {
                continue;
            }
            let output = Command::new("crit").arg("show").arg(entry.path()).output()?;
            let said = String::from_utf8_lossy(&output.stderr);
            ensure!(output.status.success(), "crit show {name} ({}):\n{said}", output.status);
            let decoded: Value = serde_json::from_slice(&output.stdout)
                .with_context(|| format!("crit show {name}: {said}"))?;
            ensure!(decoded["magic"].is_string(), "{name}: {decoded}");
            seen.push(name);
        }
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
