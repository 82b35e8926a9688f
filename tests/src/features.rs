//! What the kernel under the tests can do, found out by doing it.

use std::fs;
use std::os::unix::fs::FileExt as _;
use std::sync::OnceLock;

const SOFT_DIRTY: u64 = 1 << 55;

/// Whether soft-dirty bits work: without them clear_refs succeeds and every page reads clean.
#[must_use]
pub fn soft_dirty() -> bool {
    static KNOWN: OnceLock<bool> = OnceLock::new();
    *KNOWN.get_or_init(|| {
        let mut page = vec![1_u8; 3 * 4096];
        let address = (page.as_ptr() as u64).next_multiple_of(4096);
        let Ok(before) = bits(address) else { return false };
        if fs::write("/proc/self/clear_refs", "4").is_err() {
            return false;
        }
        let Ok(cleared) = bits(address) else { return false };
        page.iter_mut().for_each(|byte| *byte = std::hint::black_box(2));
        let Ok(written) = bits(address) else { return false };
        before && !cleared && written
    })
}

fn bits(address: u64) -> std::io::Result<bool> {
    let mut entry = [0; 8];
    fs::File::open("/proc/self/pagemap")?.read_exact_at(&mut entry, address / 4096 * 8)?;
    Ok(u64::from_le_bytes(entry) & SOFT_DIRTY != 0)
}

/// Whether this is Linux `major.minor` or later.
#[must_use]
pub fn kernel_at_least(major: u32, minor: u32) -> bool {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let mut numbers = release.split(['.', '-', '+']).map_while(|number| number.parse::<u32>().ok());
    (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0)) >= (major, minor)
}

/// Whether asynchronous userfaultfd write-protection and PAGEMAP_SCAN are there (6.7).
#[must_use]
pub fn uffd_wp_async() -> bool {
    kernel_at_least(6, 7)
}

/// A way to tell dirty pages from clean ones.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Tracker {
    /// Soft-dirty bits.
    SoftDirty,
    /// userfaultfd WP_ASYNC.
    UffdWp,
}

impl Tracker {
    /// Its name on memckpt's command line.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::SoftDirty => "soft-dirty",
            Self::UffdWp => "uffd-wp",
        }
    }

    /// Why it cannot work here, if it cannot.
    #[must_use]
    pub fn missing(self) -> Option<&'static str> {
        match self {
            Self::SoftDirty if !soft_dirty() => Some("this kernel has no soft-dirty bits"),
            Self::UffdWp if !uffd_wp_async() => {
                Some("this kernel has no asynchronous userfaultfd write-protection")
            }
            _ => None,
        }
    }
}
