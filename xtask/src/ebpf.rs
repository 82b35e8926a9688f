//! `cargo xtask ebpf`: rebuilds `memckpt-ebpf/memckpt.bpf.o` and the hash of what it is built from.
//!
//! The BPF target has no prebuilt core, so the compiler's own library sources are needed. Debian packages them with a
//! recent rustc (`rustc-web`), which is used beside rustup's for this one purpose.

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use anyhow::{Context, Result, bail, ensure};
use sha2::{Digest, Sha256};

use crate::tools::{self, must};

const RUSTC: &str = "/usr/bin/rustc";
const CARGO: &str = "/usr/bin/cargo";
const PACKAGES: [&str; 3] = ["rustc-web", "cargo-web", "rust-web-src"];
const BPF_LINKER: &str = "0.13.0";

/// Arguments of `cargo xtask ebpf`.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Build nothing: fail if the committed object was built from other sources.
    #[arg(long)]
    check: bool,
}

/// Builds the object, or checks it.
pub(crate) fn run(args: &Args) -> Result<ExitCode> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().context("xtask lies in no workspace")?;
    let package = root.join("memckpt-ebpf");
    let hash = sources_hash(&package)?;
    let hash_file = package.join("memckpt.bpf.sources.sha256");
    if args.check {
        let recorded = fs::read_to_string(&hash_file).unwrap_or_default();
        ensure!(
            recorded.trim() == hash,
            "memckpt.bpf.o was built from other sources: run `cargo xtask ebpf`"
        );
        return Ok(ExitCode::SUCCESS);
    }
    let llvm = compiler()?;
    let linker = bpf_linker(&llvm)?;
    let target = root.join("target/bpf");
    let mut path = OsString::from(linker.parent().context("bpf-linker lies nowhere")?);
    path.push(":");
    path.push(std::env::var_os("PATH").unwrap_or_default());
    let mut cargo = Command::new(CARGO);
    cargo
        .current_dir(root)
        .args(["--config", "memckpt-ebpf/bpf-cargo.toml", "build", "--release", "--locked"])
        .args(["-p", "memckpt-ebpf", "--bin", "memckpt-bpf", "--features", "bpf"])
        .env("PATH", path)
        // -Zbuild-std on a stable compiler; rustup's shim must not take over, nor flags meant for the host.
        .envs([("RUSTC_BOOTSTRAP", "1"), ("RUSTC", RUSTC)])
        .env("CARGO_TARGET_DIR", &target);
    for variable in ["RUSTUP_TOOLCHAIN", "RUSTFLAGS", "CARGO_ENCODED_RUSTFLAGS", "RUSTC_WRAPPER", "RUSTDOC"] {
        cargo.env_remove(variable);
    }
    must(&mut cargo)?;
    let built = target.join("bpfel-unknown-none/release/memckpt-bpf");
    let object =
        without_debug_info(&fs::read(&built).with_context(|| format!("reading {}", built.display()))?)?;
    write(&package.join("memckpt.bpf.o"), &object)?;
    write(&hash_file, format!("{hash}\n").as_bytes())?;
    Ok(ExitCode::SUCCESS)
}

fn write(path: &Path, content: &[u8]) -> Result<()> {
    fs::write(path, content).with_context(|| format!("writing {}", path.display()))?;
    println!("wrote {} ({} bytes)", path.display(), content.len());
    Ok(())
}

/// SHA-256 over name, length and content of each source in order. A test of memckpt computes the same.
fn sources_hash(package: &Path) -> Result<String> {
    let mut files = vec!["Cargo.toml".to_string(), "bpf-cargo.toml".to_string()];
    for entry in
        fs::read_dir(package.join("src")).with_context(|| format!("listing {}", package.display()))?
    {
        let name = entry?.file_name().into_string().ok().context("a source with a strange name")?;
        files.push(format!("src/{name}"));
    }
    files.sort();
    let mut hash = Sha256::new();
    for file in files {
        let content = fs::read(package.join(&file)).with_context(|| format!("reading {file}"))?;
        hash.update(format!("{file} {}\n", content.len()));
        hash.update(content);
    }
    Ok(hash.finalize().iter().map(|b| format!("{b:02x}")).collect())
}

/// Makes sure of a compiler with its library's sources; gives the version of its LLVM.
fn compiler() -> Result<String> {
    let complete = || {
        let sysroot = output(Command::new(RUSTC).args(["--print", "sysroot"]))?;
        let core = Path::new(sysroot.trim()).join("lib/rustlib/src/rust/library/core/Cargo.toml");
        ensure!(core.exists(), "{} is missing", core.display());
        ensure!(Path::new(CARGO).exists(), "{CARGO} is missing");
        let version = output(Command::new(RUSTC).arg("-vV"))?;
        let llvm = version
            .lines()
            .find_map(|l| l.strip_prefix("LLVM version: "))
            .context("rustc -vV names no LLVM")?;
        Ok(llvm.to_string())
    };
    if let Ok(llvm) = complete() {
        return Ok(llvm);
    }
    install(&PACKAGES)?;
    complete()
}

fn install(packages: &[&str]) -> Result<()> {
    let list = packages.join(" ");
    if !nix::unistd::geteuid().is_root() {
        bail!("{list} must be installed first: sudo apt-get install -y --no-install-recommends {list}");
    }
    println!("installing {list} with apt-get");
    must(Command::new("apt-get").args(["update", "-qq"]))?;
    must(Command::new("apt-get").args(["install", "-y", "-qq", "--no-install-recommends"]).args(packages))
}

/// Makes sure of a bpf-linker against the compiler's own LLVM, of version `llvm`.
fn bpf_linker(llvm: &str) -> Result<PathBuf> {
    let (major, rest) = llvm.split_once('.').context("an LLVM version without a dot")?;
    let minor = rest.split('.').next().unwrap_or("0");
    let library = format!("/usr/lib/x86_64-linux-gnu/libLLVM.so.{major}.{minor}");
    ensure!(Path::new(&library).exists(), "{library}, which {RUSTC} should have brought, is missing");
    let llvm_prefix = tools::directory()?.join(format!("llvm-{major}"));
    let link = llvm_prefix.join("lib/libLLVM.so");
    fs::create_dir_all(llvm_prefix.join("lib"))
        .with_context(|| format!("creating {}", llvm_prefix.display()))?;
    let _ = fs::remove_file(&link);
    std::os::unix::fs::symlink(&library, &link).with_context(|| format!("linking {}", link.display()))?;
    tools::install("bpf-linker", BPF_LINKER, |cargo| {
        cargo
            .args(["--no-default-features", "--features", &format!("llvm-{major}")])
            .env("LLVM_PREFIX", &llvm_prefix);
    })
}

/// The object without DWARF. BTF stays: the loader and the verifier's log use it.
fn without_debug_info(object: &[u8]) -> Result<Vec<u8>> {
    let mut builder = object::build::elf::Builder::read(object).context("reading the built object")?;
    for section in &mut builder.sections {
        let name = section.name.to_string();
        let name = name.strip_prefix(".rel").unwrap_or(&name);
        section.delete = name.starts_with(".debug_") || name == ".llvm_addrsig";
    }
    // LLVM keeps the names of sections and of symbols in one table; the writer wants two.
    if !builder.sections.iter().any(|s| matches!(s.data, object::build::elf::SectionData::SectionString)) {
        let names = builder.sections.add();
        names.name = ".shstrtab".into();
        names.sh_type = object::elf::SHT_STRTAB;
        names.sh_addralign = 1;
        names.data = object::build::elf::SectionData::SectionString;
    }
    builder.delete_orphans();
    let mut stripped = Vec::new();
    builder.write(&mut stripped).context("writing the stripped object")?;
    Ok(stripped)
}

fn output(command: &mut Command) -> Result<String> {
    let output = command.output().with_context(|| format!("running {command:?}"))?;
    ensure!(output.status.success(), "{command:?}: {}", output.status);
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}
