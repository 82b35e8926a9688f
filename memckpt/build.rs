//! Builds the parasite with the compiler that builds memckpt, and checks that the result can run anywhere.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Where the parameters start in `parasite/src/layout.rs`.
const CODE_LEN: usize = 0x3000;
/// Relocations that stay right wherever the code lies (psABI x86-64): PC32, PLT32, and the relaxed GOTPCREL forms.
const POSITION_INDEPENDENT: [u64; 4] = [2, 4, 41, 42];

type Fallible<T> = Result<T, Box<dyn std::error::Error>>;

fn main() -> Fallible<()> {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-changed=parasite");
    let out = PathBuf::from(env::var("OUT_DIR")?);
    let object = out.join("parasite.o");
    let elf = out.join("parasite.elf");
    run(Command::new(env::var("RUSTC")?)
        .args(["--crate-name=parasite", "--crate-type=lib", "--edition=2024", "--emit=obj"])
        .arg(format!("--target={}", env::var("TARGET")?))
        .args(["-Copt-level=2", "-Ccodegen-units=1", "-Cpanic=abort", "-Cforce-unwind-tables=no"])
        .args(["-Crelocation-model=pic", "-Cdebuginfo=0", "-Cdebug-assertions=off", "-Coverflow-checks=off"])
        .arg("-o")
        .args([object.as_path(), Path::new("parasite/src/lib.rs")]))?;
    // Linked alone: a reference to anything outside, a panic for one, ends the build here.
    run(Command::new(env::var_os("CC").unwrap_or_else(|| "cc".into()))
        .args(["-nostdlib", "-nostartfiles", "-static", "-no-pie", "-Wl,--emit-relocs,--gc-sections"])
        .args(["-Wl,--build-id=none", "-Wl,-z,noexecstack", "-Wl,-T,parasite/link.ld", "-o"])
        .args([elf.as_path(), object.as_path()]))?;
    fs::write(out.join("parasite.bin"), flat(&fs::read(elf)?)?)?;
    Ok(())
}

fn run(command: &mut Command) -> Fallible<()> {
    let output = command.output().map_err(|e| format!("{command:?}: {e}"))?;
    if !output.status.success() {
        return Err(
            format!("{command:?}: {}\n{}", output.status, String::from_utf8_lossy(&output.stderr)).into()
        );
    }
    Ok(())
}

/// The bytes of the one allocated section; an error where the ELF file holds more than position-independent code.
fn flat(elf: &[u8]) -> Fallible<Vec<u8>> {
    let word = |at: usize, len: usize| -> Fallible<u64> {
        let mut bytes = [0; 8];
        bytes[..len].copy_from_slice(elf.get(at..at + len).ok_or("parasite: truncated ELF file")?);
        Ok(u64::from_le_bytes(bytes))
    };
    let (table, entry, count) = (word(0x28, 8)? as usize, word(0x3a, 2)? as usize, word(0x3c, 2)? as usize);
    let mut code = None;
    for section in (0..count).map(|n| table + n * entry) {
        let (kind, flags, address) = (word(section + 4, 4)?, word(section + 8, 8)?, word(section + 16, 8)?);
        let (offset, size) = (word(section + 24, 8)? as usize, word(section + 32, 8)? as usize);
        let (allocated, writable) = (flags & 2 != 0, flags & 1 != 0);
        if kind == 4 {
            for at in (offset..offset + size).step_by(24) {
                let relocation = word(at + 8, 8)? & 0xffff_ffff;
                if relocation != 0 && !POSITION_INDEPENDENT.contains(&relocation) {
                    return Err(
                        format!("parasite: relocation type {relocation} depends on the address").into()
                    );
                }
            }
        } else if allocated && size > 0 {
            if kind != 1 || writable || address != 0 || code.is_some() {
                return Err("parasite: more than one section, or writable data".into());
            }
            code = Some(elf.get(offset..offset + size).ok_or("parasite: truncated ELF file")?.to_vec());
        }
    }
    let code = code.ok_or("parasite: no code")?;
    if word(0x18, 8)? != 0 || code.len() > CODE_LEN {
        return Err(format!("parasite: entry point not first, or {} bytes are too many", code.len()).into());
    }
    Ok(code)
}
