//! One image. The first byte says which kind it is taken for.
#![no_main]

use std::sync::LazyLock;

use libfuzzer_sys::fuzz_target;
use memckpt::image::core::XsaveLayout;
use memckpt::image::pagemap::PagemapImage;
use memckpt::image::proto::{
    CoreEntry, FdinfoEntry, FileEntry, FileLockEntry, FsEntry, GhostFileEntry, InventoryEntry,
    MemfdInodeEntry, MmEntry, PipeDataEntry, PstreeEntry, RemapFilePathEntry, SeccompEntry, SkPacketEntry,
    StatsEntry, TaskKobjIdsEntry, TcpStreamEntry, TtyInfoEntry,
};
use memckpt::image::{CheckpointMeta, Checksums, ImageKind, RecordError, Records, record};

/// More than any processor's extended state.
const XSAVE: usize = 16 << 10;

static LAYOUT: LazyLock<XsaveLayout> = LazyLock::new(XsaveLayout::of_this_processor);

fuzz_target!(|bytes: &[u8]| {
    if let Some((kind, bytes)) = bytes.split_first() {
        let _ = read(*kind, bytes);
    }
});

fn read(kind: u8, bytes: &[u8]) -> Result<(), RecordError> {
    const FILE: &str = "image";
    let open = |kind| Records::open(FILE, kind, bytes);
    match kind {
        0 => drop(record::single::<InventoryEntry>(FILE, ImageKind::Inventory, bytes)?),
        1 => drop(open(ImageKind::Pstree)?.rest::<PstreeEntry>()?),
        2 => core(&record::single(FILE, ImageKind::Core, bytes)?),
        3 => drop(record::single::<MmEntry>(FILE, ImageKind::Mm, bytes)?),
        4 => again(&PagemapImage::decode(FILE, bytes)?),
        5 => drop(record::single::<TaskKobjIdsEntry>(FILE, ImageKind::Ids, bytes)?),
        6 => drop(open(ImageKind::Files)?.rest::<FileEntry>()?),
        7 => drop(open(ImageKind::Fdinfo)?.rest::<FdinfoEntry>()?),
        8 => drop(record::single::<FsEntry>(FILE, ImageKind::Fs, bytes)?),
        9 => with_bytes(open(ImageKind::PipesData)?, |entry: &PipeDataEntry| entry.bytes.into())?,
        10 => with_bytes(open(ImageKind::SkQueues)?, |entry: &SkPacketEntry| entry.length.into())?,
        11 => {
            let mut records = open(ImageKind::GhostFile)?;
            records.expect::<GhostFileEntry>()?;
            records.everything();
        }
        12 => drop(open(ImageKind::RemapFpath)?.rest::<RemapFilePathEntry>()?),
        13 => drop(open(ImageKind::MemfdInode)?.rest::<MemfdInodeEntry>()?),
        14 => drop(open(ImageKind::TtyInfo)?.rest::<TtyInfoEntry>()?),
        15 => drop(open(ImageKind::FileLocks)?.rest::<FileLockEntry>()?),
        16 => with_bytes(open(ImageKind::TcpStream)?, |entry: &TcpStreamEntry| {
            u64::from(entry.inq_len) + u64::from(entry.outq_len)
        })?,
        17 => drop(open(ImageKind::Seccomp)?.rest::<SeccompEntry>()?),
        18 => drop(record::single::<StatsEntry>(FILE, ImageKind::Stats, bytes)?),
        19 => drop(CheckpointMeta::decode(bytes)),
        _ => drop(Checksums::decode(bytes)),
    }
    Ok(())
}

fn with_bytes<M: prost::Message + Default>(
    mut records: Records<'_>,
    len: impl Fn(&M) -> u64,
) -> Result<(), RecordError> {
    while let Some(entry) = records.next_record::<M>()? {
        records.raw(len(&entry))?;
    }
    Ok(())
}

/// The extended state of a thread, as it would be given to the kernel.
fn core(entry: &CoreEntry) {
    if let Some(arch) = &entry.thread_info {
        let mut area = vec![0; XSAVE];
        let _ = LAYOUT.fill(&arch.fpregs, &mut area);
    }
}

/// What could be read means the same once it is written.
fn again(pagemap: &PagemapImage) {
    // So many pages of the parent are written as several entries.
    if pagemap.runs().iter().all(|run| run.range.pages().get() < 1 << 31) {
        assert_eq!(PagemapImage::decode("again", &pagemap.encode()).as_ref().ok(), Some(pagemap));
    }
}
