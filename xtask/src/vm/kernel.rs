//! Debian's kernel packages: resolved from a meta package, downloaded, unpacked to a cache, never installed.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};
use clap::ValueEnum;

use super::{modules, vmlinux};
use crate::packages;

/// A stock Debian kernel to test on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Kernel {
    /// Soft-dirty, PAGEMAP_SCAN, async write-protection, fentry.
    #[value(name = "6.12")]
    V6_12,
    /// Soft-dirty and fentry; no PAGEMAP_SCAN.
    #[value(name = "6.1")]
    V6_1,
}

impl Kernel {
    /// All of them.
    pub(crate) const ALL: [Self; 2] = [Self::V6_12, Self::V6_1];

    /// The series, e.g. `6.12`.
    pub(crate) fn series(self) -> &'static str {
        match self {
            Self::V6_12 => "6.12",
            Self::V6_1 => "6.1",
        }
    }

    fn meta_package(self) -> &'static str {
        match self {
            Self::V6_12 => "linux-image-6.12-amd64",
            Self::V6_1 => "linux-image-amd64",
        }
    }

    /// Makes sure that the newest kernel of this series is in the cache.
    pub(crate) fn fetch(self) -> Result<Image> {
        let cache = cache_directory()?;
        let newest = cache.join(self.meta_package());
        let package = match resolve(self.meta_package()) {
            Some(package) => package,
            None => {
                packages::update()?;
                match resolve(self.meta_package()) {
                    Some(package) => package,
                    // Without a network, the one used last will do.
                    None if newest.exists() => return Ok(Image { directory: newest }),
                    None => bail!(
                        "apt knows no {}: add Debian 12's security suite (bookworm-security main), then apt-get update",
                        self.meta_package()
                    ),
                }
            }
        };
        // Another set of modules is another image.
        let image = format!("{package}-{:016x}", modules::fingerprint());
        let directory = cache.join(&image);
        if !directory.join("vmlinux").exists() {
            eprintln!("xtask: fetching kernel {package} (unpacked to {}, not installed)", cache.display());
            let scratch = tempfile::Builder::new().prefix(".unpack-").tempdir_in(&cache)?;
            unpack(&package, scratch.path())?;
            publish(&scratch.path().join("image"), &directory)?;
        }
        let link = tempfile::Builder::new().prefix(".link-").tempdir_in(&cache)?;
        std::os::unix::fs::symlink(&image, link.path().join("l"))?;
        fs::rename(link.path().join("l"), &newest)
            .with_context(|| format!("rename to {}", newest.display()))?;
        Ok(Image { directory })
    }
}

/// An unpacked kernel in the cache.
#[derive(Debug, Clone)]
pub(crate) struct Image {
    directory: PathBuf,
}

impl Image {
    /// The kernel, as ELF.
    pub(crate) fn vmlinux(&self) -> PathBuf {
        self.directory.join("vmlinux")
    }

    /// Modules in load order: (file name, content).
    pub(crate) fn modules(&self) -> Result<Vec<(String, Vec<u8>)>> {
        let directory = self.directory.join("modules");
        let mut modules = Vec::new();
        for entry in fs::read_dir(&directory).with_context(|| format!("read {}", directory.display()))? {
            let entry = entry?;
            modules.push((entry.file_name().to_string_lossy().into_owned(), fs::read(entry.path())?));
        }
        modules.sort();
        Ok(modules)
    }
}

fn cache_directory() -> Result<PathBuf> {
    let base = match std::env::var_os("XDG_CACHE_HOME") {
        Some(directory) if !directory.is_empty() => PathBuf::from(directory),
        _ => PathBuf::from(std::env::var_os("HOME").context("neither XDG_CACHE_HOME nor HOME is set")?)
            .join(".cache"),
    };
    let directory = base.join("memckpt/vm");
    fs::create_dir_all(&directory).with_context(|| format!("create {}", directory.display()))?;
    Ok(directory)
}

/// The package that `meta` depends on now, if apt knows `meta`.
fn resolve(meta: &str) -> Option<String> {
    let output = Command::new("apt-cache").args(["depends", meta]).stderr(Stdio::null()).output().ok()?;
    String::from_utf8_lossy(&output.stdout).lines().find_map(|line| {
        let (relation, package) = line.trim().split_once(": ")?;
        (relation == "Depends" && package.starts_with("linux-image-")).then(|| package.to_owned())
    })
}

/// Downloads `package` and leaves `image/{vmlinux,modules/NN-NAME.ko}` in `scratch`.
fn unpack(package: &str, scratch: &Path) -> Result<()> {
    let download = || checked(Command::new("apt-get").args(["download", "-q", package]).current_dir(scratch));
    if download().is_err() {
        // The lists name a version that the archive has replaced.
        packages::update()?;
        download()?;
    }
    let deb = fs::read_dir(scratch)?
        .filter_map(|entry| Some(entry.ok()?.path()))
        .find(|path| path.extension().is_some_and(|extension| extension == "deb"))
        .with_context(|| format!("apt-get download {package} left no .deb"))?;
    let tree = scratch.join("tree");
    checked(Command::new("dpkg-deb").arg("-x").arg(&deb).arg(&tree))?;

    let image = scratch.join("image");
    fs::create_dir_all(image.join("modules"))?;
    let bzimage = only_entry(&tree.join("boot"), "vmlinuz-")?;
    fs::write(image.join("vmlinux"), vmlinux::extract(&fs::read(bzimage)?)?)?;
    let modules = modules::collect(&only_entry(&tree.join("lib/modules"), "")?)?;
    for (number, (name, content)) in modules.iter().enumerate() {
        fs::write(image.join(format!("modules/{number:02}-{name}.ko")), content)?;
    }
    Ok(())
}

fn only_entry(directory: &Path, prefix: &str) -> Result<PathBuf> {
    fs::read_dir(directory)
        .with_context(|| format!("read {}", directory.display()))?
        .filter_map(|entry| Some(entry.ok()?.path()))
        .find(|path| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with(prefix)))
        .with_context(|| format!("nothing called {prefix}* in {}", directory.display()))
}

/// Renames `from` to `to`; whoever was faster has put the same thing there.
fn publish(from: &Path, to: &Path) -> Result<()> {
    match fs::rename(from, to) {
        Err(_) if to.join("vmlinux").exists() => Ok(()),
        result => result.with_context(|| format!("rename {} to {}", from.display(), to.display())),
    }
}

fn checked(command: &mut Command) -> Result<()> {
    let output =
        command.stdin(Stdio::null()).output().with_context(|| format!("cannot start {command:?}"))?;
    if !output.status.success() {
        bail!("{command:?} failed ({}):\n{}", output.status, String::from_utf8_lossy(&output.stderr));
    }
    Ok(())
}
