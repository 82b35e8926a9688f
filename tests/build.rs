//! Compiles the victims, each from `victims/NAME.c` and what there is in `victims/NAME/`; `MEMCKPT_VICTIMS` is the directory that
//! they are in.

use std::path::PathBuf;
use std::process::Command;
use std::{env, fs};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo::rerun-if-changed=victims");
    let out = PathBuf::from(env::var("OUT_DIR")?);
    for entry in fs::read_dir("victims")? {
        let source = entry?.path();
        if source.extension().is_none_or(|e| e != "c") {
            continue;
        }
        let mut cc = Command::new(env::var_os("CC").unwrap_or_else(|| "cc".into()));
        cc.args(["-O1", "-g", "-Wall", "-pthread", "-mno-avx512f", "-o"]);
        cc.arg(out.join(source.file_stem().ok_or("a file without a name")?)).arg(&source);
        for part in fs::read_dir(source.with_extension("")).into_iter().flatten() {
            let part = part?.path();
            if part.extension().is_some_and(|e| e == "c") {
                cc.arg(part);
            }
        }
        let output = cc.output()?;
        if !output.status.success() {
            return Err(format!("{cc:?}: {}", String::from_utf8_lossy(&output.stderr)).into());
        }
    }
    println!("cargo::rustc-env=MEMCKPT_VICTIMS={}", out.display());
    Ok(())
}
