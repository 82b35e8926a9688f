//! The kinds of image file, and the magic numbers that each begins with.

/// First word of every image but the inventory and the service files.
const COMMON: u32 = 0x5456_4319;
/// First word of service files: stats.
const SERVICE: u32 = 0x5510_5940;

/// A kind of image file with records.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ImageKind {
    /// `inventory.img`
    Inventory,
    /// `pstree.img`
    Pstree,
    /// `core-TID.img`
    Core,
    /// `mm-PID.img`
    Mm,
    /// `pagemap-PID.img`
    Pagemap,
    /// `stats-dump`
    Stats,
}

impl ImageKind {
    /// The bytes that a file of this kind begins with. The inventory has its own magic only, for it is older than
    /// the common one.
    #[must_use]
    pub fn header(self) -> Vec<u8> {
        let (first, own) = match self {
            Self::Inventory => (None, 0x5831_3116_u32),
            Self::Pstree => (Some(COMMON), 0x5027_3030),
            Self::Core => (Some(COMMON), 0x5505_3847),
            Self::Mm => (Some(COMMON), 0x5749_2820),
            Self::Pagemap => (Some(COMMON), 0x5608_4025),
            Self::Stats => (Some(SERVICE), 0x5709_3306),
        };
        first.into_iter().chain([own]).flat_map(u32::to_le_bytes).collect()
    }
}

/// `inventory.img`: a directory holds a checkpoint exactly when it has this file.
pub const INVENTORY: &str = "inventory.img";
/// `pstree.img`
pub const PSTREE: &str = "pstree.img";
/// `stats-dump`: CRIU gives it no `.img`.
pub const STATS_DUMP: &str = "stats-dump";
/// The symbolic link to the previous checkpoint's directory.
pub const PARENT: &str = "parent";

/// `core-TID.img`
#[must_use]
pub fn core_name(tid: i32) -> String {
    format!("core-{tid}.img")
}

/// `mm-PID.img`
#[must_use]
pub fn mm_name(pid: i32) -> String {
    format!("mm-{pid}.img")
}

/// `pagemap-PID.img`
#[must_use]
pub fn pagemap_name(pid: i32) -> String {
    format!("pagemap-{pid}.img")
}

/// `pagemap-shmem-ID.img`
#[must_use]
pub fn pagemap_shmem_name(id: u32) -> String {
    format!("pagemap-shmem-{id}.img")
}

/// `pages-N.img`
#[must_use]
pub fn pages_name(id: u32) -> String {
    format!("pages-{id}.img")
}
