//! The kernel modules that a guest needs, in an order in which insmod takes them.

use std::collections::{HashMap, HashSet};
use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

/// Without these the guest has no root.
const BOOT: &[&str] = &["virtio_pci", "9pnet_virtio", "9p", "overlay"];

/// What CRIU and our tests use. `crc32c_generic` is a softdep that insmod does not follow by itself.
const EXTRA: &[&str] = &[
    "crc32c_generic",
    "unix_diag",
    "inet_diag",
    "tcp_diag",
    "udp_diag",
    "raw_diag",
    "af_packet_diag",
    "netlink_diag",
    "nfnetlink",
    "nf_tables",
    "veth",
    "tun",
    // Swap space, which cannot lie on the guest's file systems.
    "loop",
];

/// Tells sets of modules apart.
pub(crate) fn fingerprint() -> u64 {
    let mut hasher = DefaultHasher::new();
    (BOOT, EXTRA).hash(&mut hasher);
    hasher.finish()
}

/// The modules under `tree` (a `lib/modules/VERSION`) that a guest loads: (name, content), dependencies first.
pub(crate) fn collect(tree: &Path) -> Result<Vec<(String, Vec<u8>)>> {
    let files = index(tree)?;
    let mut order = Order { files: &files, seen: HashSet::new(), modules: Vec::new() };
    for name in BOOT.iter().chain(EXTRA) {
        order.add(name)?;
    }
    // A name that the kernel has no module for is built in; but one of these never is in Debian's kernels.
    if !order.modules.iter().any(|(name, _)| name == "9p") {
        bail!("no 9p module under {}: a cloud kernel?", tree.display());
    }
    Ok(order.modules)
}

struct Order<'a> {
    files: &'a HashMap<String, PathBuf>,
    seen: HashSet<String>,
    modules: Vec<(String, Vec<u8>)>,
}

impl Order<'_> {
    fn add(&mut self, name: &str) -> Result<()> {
        if !self.seen.insert(name.to_owned()) {
            return Ok(());
        }
        let Some(path) = self.files.get(name) else { return Ok(()) };
        let content = read(path)?;
        for dependency in depends(&content) {
            self.add(&dependency)?;
        }
        self.modules.push((name.to_owned(), content));
        Ok(())
    }
}

/// Names (with underscores, as the kernel calls modules) to files.
fn index(tree: &Path) -> Result<HashMap<String, PathBuf>> {
    let mut files = HashMap::new();
    let mut directories = vec![tree.to_path_buf()];
    while let Some(directory) = directories.pop() {
        let entries =
            std::fs::read_dir(&directory).with_context(|| format!("read {}", directory.display()))?;
        for entry in entries {
            let entry = entry?;
            let path = entry.path();
            if entry.file_type()?.is_dir() {
                directories.push(path);
            } else if let Some((stem, _)) = entry.file_name().to_string_lossy().split_once(".ko") {
                files.insert(stem.replace('-', "_"), path);
            }
        }
    }
    Ok(files)
}

fn read(path: &Path) -> Result<Vec<u8>> {
    let tool = match path.extension().and_then(|e| e.to_str()) {
        Some("xz") => "xz",
        Some("zst") => "zstd",
        _ => return std::fs::read(path).with_context(|| format!("read {}", path.display())),
    };
    let output = Command::new(tool)
        .arg("-dc")
        .arg(path)
        .stderr(Stdio::inherit())
        .output()
        .with_context(|| format!("cannot start {tool}"))?;
    if !output.status.success() {
        bail!("{tool} -dc {} failed ({})", path.display(), output.status);
    }
    Ok(output.stdout)
}

/// The `depends=` of a module's .modinfo section, which holds NUL-terminated `key=value` strings.
fn depends(module: &[u8]) -> Vec<String> {
    const KEY: &[u8] = b"\0depends=";
    let Some(at) = module.windows(KEY.len()).position(|window| window == KEY) else { return Vec::new() };
    let value = module[at + KEY.len()..].split(|&byte| byte == 0).next().unwrap_or_default();
    String::from_utf8_lossy(value)
        .split(',')
        .filter(|name| !name.is_empty())
        .map(|name| name.replace('-', "_"))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::depends;

    #[test]
    fn dependencies_come_from_modinfo() {
        assert_eq!(depends(b"..\0license=GPL\0depends=9pnet,net-fs\0name=9p\0"), ["9pnet", "net_fs"]);
        assert_eq!(depends(b"..\0license=GPL\0depends=\0name=virtio\0"), Vec::<String>::new());
        assert_eq!(depends(b"no modinfo"), Vec::<String>::new());
    }
}
