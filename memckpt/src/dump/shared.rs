//! Shared memory that belongs to no file: each object once, however many mappings see it, and whole each time.
//!
//! Nothing tracks it: another process, or write(2) on a memfd, changes it where no page table of the target's tells
//! (docs/soundness.md, row 7). It is read through the object itself, and not through a mapping: so pages are found that no
//! mapping shows.

use nix::sys::stat::FileStat;

use crate::addr::{AddrRange, PageCount};
use crate::image::meta::MetaSegment;
use crate::image::pagemap::{PagemapFlags, PagemapImage};
use crate::image::{ImagesDir, PagesFile};
use crate::kernel::map_files::MappedObject;
use crate::kernel::maps::Vma;
use crate::kernel::sysv_shm::{self, SegmentStat};
use crate::plan::SharedKind;

use super::error::DumpError;
use super::layout::Layout;

/// How much is copied at a time.
const BATCH: u64 = 1 << 20;

/// The shared objects of the target, and what was taken of them.
pub(super) struct SharedObjects {
    objects: Vec<SharedObject>,
    buffer: Vec<u8>,
}

struct SharedObject {
    key: Key,
    object: MappedObject,
    pages: PagesFile,
    image: PagemapImage,
    /// What it is to System V, as it is when its content is taken.
    segment: Option<SegmentStat>,
}

/// Which object. Segments of System V have their own numbers for inodes, on the device of all shared memory.
type Key = (SharedKind, (u32, u32), u64);

fn key(vma: &Vma, kind: SharedKind) -> Key {
    (kind, vma.dev, vma.inode)
}

impl SharedObjects {
    /// For a checkpoint without them: a pre-dump, since the dump that follows takes them whole anyway.
    pub(super) const fn none() -> Self {
        Self { objects: Vec::new(), buffer: Vec::new() }
    }

    /// Opens the objects of `layout`, that of process `pid`, and a pages file for each that was not known.
    pub(super) fn open(
        &mut self,
        pid: i32,
        layout: &Layout,
        images: &mut ImagesDir,
    ) -> Result<(), DumpError> {
        for (vma, kind) in layout.shared_anonymous() {
            // What went away or was replaced meanwhile is opened in the freeze, if it is still needed.
            if let Some(object) = MappedObject::open(pid, vma.range).ok().filter(|o| o.inode() == vma.inode) {
                self.add(key(vma, kind), object, images)?;
            }
        }
        self.buffer.resize(if self.objects.is_empty() { 0 } else { BATCH as usize }, 0);
        Ok(())
    }

    /// The layout is `layout` now: opens what came since. An object that nothing maps any more stays, and is taken
    /// although no mapping refers to it.
    pub(super) fn update(
        &mut self,
        pid: i32,
        layout: &Layout,
        images: &mut ImagesDir,
    ) -> Result<(), DumpError> {
        for (vma, kind) in layout.shared_anonymous() {
            if self.id(vma, kind).is_none() {
                self.add(key(vma, kind), MappedObject::open(pid, vma.range)?, images)?;
            }
        }
        Ok(())
    }

    fn add(&mut self, key: Key, object: MappedObject, images: &mut ImagesDir) -> Result<(), DumpError> {
        if self.objects.iter().all(|known| known.key != key) {
            let (pages_id, pages) = images.create_pages()?;
            self.objects.push(SharedObject {
                key,
                object,
                pages,
                image: PagemapImage::new(pages_id),
                segment: None,
            });
        }
        Ok(())
    }

    /// The number of the memfd `object`, which has `stat`; it may be mapped or not.
    pub(super) fn memfd(
        &mut self,
        stat: &FileStat,
        object: MappedObject,
        images: &mut ImagesDir,
    ) -> Result<u32, DumpError> {
        let dev = (libc::major(stat.st_dev), libc::minor(stat.st_dev));
        let key = (SharedKind::Memfd, dev, stat.st_ino);
        self.add(key, object, images)?;
        Ok(self.objects.iter().position(|o| o.key == key).map_or(0, |at| at as u32 + 1))
    }

    /// The number that the images know the object behind `vma` by.
    pub(super) fn id(&self, vma: &Vma, kind: SharedKind) -> Option<u32> {
        let at = self.objects.iter().position(|o| o.key == key(vma, kind))?;
        Some(at as u32 + 1)
    }

    /// Copies what the objects hold, the target standing still.
    pub(super) fn grab(&mut self) -> Result<(), DumpError> {
        self.buffer.resize(if self.objects.is_empty() { 0 } else { BATCH as usize }, 0);
        for shared in &mut self.objects {
            if let (SharedKind::SysV, _, id) = shared.key {
                shared.segment = match sysv_shm::stat(id as i32) {
                    Ok(stat) => Some(stat),
                    // Nobody has it attached any more, and it is gone.
                    Err(error) if error.errno() == Some(libc::EINVAL) => None,
                    Err(error) => return Err(error.into()),
                };
            }
            for extent in shared.object.extents()? {
                let offset = shared.image.bytes();
                shared
                    .image
                    .push(extent, PagemapFlags::PRESENT)
                    .map_err(|e| DumpError::encode("pagemap-shmem", e))?;
                for part in extent.parts(BATCH) {
                    let bytes = &mut self.buffer[..part.len() as usize];
                    shared.object.read_at(part.start, bytes)?;
                    shared.pages.write_at(offset + (part.start.get() - extent.start.get()), bytes)?;
                }
            }
        }
        Ok(())
    }

    /// Each object's number, pagemap and pages.
    pub(super) fn images(&self) -> impl Iterator<Item = (u32, &PagemapImage, &PagesFile)> {
        (1..).zip(&self.objects).map(|(id, shared)| (id, &shared.image, &shared.pages))
    }

    /// The System V segments among them.
    pub(super) fn segments(&self) -> Vec<MetaSegment> {
        let segment = |(object, shared): (u32, &SharedObject)| {
            Some(MetaSegment { object, id: shared.key.2 as i32, stat: shared.segment? })
        };
        (1..).zip(&self.objects).filter_map(segment).collect()
    }

    /// How many pages were taken.
    pub(super) fn pages(&self) -> PageCount {
        let of = |shared: &SharedObject| -> PageCount {
            shared.image.runs().iter().map(|run| AddrRange::pages(run.range)).sum()
        };
        self.objects.iter().map(of).sum()
    }
}
