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
    /// `ids-PID.img`
    Ids,
    /// `files.img`
    Files,
    /// `fdinfo-N.img`
    Fdinfo,
    /// `fs-PID.img`
    Fs,
    /// `pipes-data.img`
    PipesData,
    /// `fifo-data.img`
    FifoData,
    /// `ghost-file-ID.img`
    GhostFile,
    /// `remap-fpath.img`
    RemapFpath,
    /// `memfd.img`
    MemfdInode,
    /// `sk-queues.img`
    SkQueues,
    /// `tty-info.img`
    TtyInfo,
    /// `filelocks.img`
    FileLocks,
    /// `tcp-stream-INO.img`
    TcpStream,
    /// `seccomp.img`
    Seccomp,
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
            Self::Ids => (Some(COMMON), 0x5443_2030),
            Self::Files => (Some(COMMON), 0x5630_3138),
            Self::Fdinfo => (Some(COMMON), 0x5621_3732),
            Self::Fs => (Some(COMMON), 0x5140_3912),
            Self::PipesData => (Some(COMMON), 0x5645_3709),
            Self::FifoData => (Some(COMMON), 0x5933_3054),
            Self::GhostFile => (Some(COMMON), 0x5258_3605),
            Self::RemapFpath => (Some(COMMON), 0x5913_3954),
            Self::MemfdInode => (Some(COMMON), 0x4845_3499),
            Self::SkQueues => (Some(COMMON), 0x5626_4026),
            Self::TtyInfo => (Some(COMMON), 0x5945_3036),
            Self::FileLocks => (Some(COMMON), 0x5432_3616),
            Self::TcpStream => (Some(COMMON), 0x5146_5506),
            Self::Seccomp => (Some(COMMON), 0x6441_3049),
            Self::Stats => (Some(SERVICE), 0x5709_3306),
        };
        first.into_iter().chain([own]).flat_map(u32::to_le_bytes).collect()
    }
}

/// `inventory.img`: a directory holds a checkpoint exactly when it has this file.
pub const INVENTORY: &str = "inventory.img";
/// `pstree.img`
pub const PSTREE: &str = "pstree.img";
/// `seccomp.img`
pub const SECCOMP: &str = "seccomp.img";
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

/// `files.img`
pub const FILES: &str = "files.img";
/// `pipes-data.img`
pub const PIPES_DATA: &str = "pipes-data.img";
/// `fifo-data.img`
pub const FIFO_DATA: &str = "fifo-data.img";
/// `remap-fpath.img`
pub const REMAP_FPATH: &str = "remap-fpath.img";
/// `memfd.img`
pub const MEMFD: &str = "memfd.img";
/// `sk-queues.img`
pub const SK_QUEUES: &str = "sk-queues.img";
/// `tty-info.img`
pub const TTY_INFO: &str = "tty-info.img";
/// `filelocks.img`
pub const FILE_LOCKS: &str = "filelocks.img";

/// `ids-PID.img`
#[must_use]
pub fn ids_name(pid: i32) -> String {
    format!("ids-{pid}.img")
}

/// `fs-PID.img`
#[must_use]
pub fn fs_name(pid: i32) -> String {
    format!("fs-{pid}.img")
}

/// `fdinfo-ID.img`: ID is the table's `files_id`.
#[must_use]
pub fn fdinfo_name(files_id: u32) -> String {
    format!("fdinfo-{files_id}.img")
}

/// `ghost-file-ID.img`, in hexadecimal.
#[must_use]
pub fn ghost_name(id: u32) -> String {
    format!("ghost-file-{id:x}.img")
}

/// `tcp-stream-INO.img`: the socket's inode in hexadecimal.
#[must_use]
pub fn tcp_stream_name(inode: u32) -> String {
    format!("tcp-stream-{inode:x}.img")
}
