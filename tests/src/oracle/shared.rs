//! Shared memory without a file: what the mappings show, against `pagemap-shmem-ID.img`.

use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use nix::unistd::{Whence, lseek};

use super::{Compared, PAGE, fields, lookup, read_pagemap, records, varint};

/// Bits of `vma_entry.status`.
const ANON_SHARED: u64 = 1 << 8;
const MEMFD: u64 = 1 << 14;
/// An AIO ring looks shared, and is a process's own.
const AIORING: u64 = 1 << 13;

pub(super) fn compare(images: &Path, pid: i32, memory: &File, totals: &mut Compared) -> Result<()> {
    let path = images.join(format!("mm-{pid}.img"));
    if !path.exists() {
        return Ok(());
    }
    let mm = records(&path, [0x20, 0x28, 0x49, 0x57])?;
    for vma in areas(mm.first().context("no mm")?)? {
        let [_, start, end, offset, id, _, _, status, ..] = vma;
        if status & (ANON_SHARED | MEMFD) == 0 || status & AIORING != 0 {
            continue;
        }
        ensure!(id != 0, "{start:x}-{end:x} is shared memory without an object");
        let stored = [read_pagemap(images.to_path_buf(), &format!("pagemap-shmem-{id}.img"))?];
        let object = File::open(format!("/proc/{pid}/map_files/{start:x}-{end:x}"))?;
        let length = object.metadata()?.len();
        // Where the object holds something, or the checkpoint does: reading the rest would fill it.
        let mut held: Vec<u64> = data_pages(&object)?;
        held.extend(stored[0].entries.iter().flat_map(|e| (e.start..e.end).step_by(PAGE as usize)));
        held.sort_unstable();
        held.dedup();
        let (mut actual, mut saved) = (vec![0; PAGE as usize], vec![0; PAGE as usize]);
        for at in held.into_iter().filter(|at| *at < length) {
            saved.fill(0);
            lookup(&stored, at, &mut saved)?;
            let address = (start + at).wrapping_sub(offset);
            if (start..end).contains(&address) && at >= offset {
                memory.read_exact_at(&mut actual, address)?;
            } else {
                object.read_exact_at(&mut actual, at)?;
            }
            ensure!(actual == saved, "offset {at:x} of the object at {start:x}-{end:x} differs");
            totals.shared += 1;
        }
    }
    Ok(())
}

fn data_pages(object: &File) -> Result<Vec<u64>> {
    let (mut pages, mut at) = (Vec::new(), 0);
    while let Ok(start) = lseek(object, at, Whence::SeekData) {
        at = lseek(object, start, Whence::SeekHole)?;
        pages.extend((start as u64..at as u64).step_by(PAGE as usize));
    }
    Ok(pages)
}

/// The `vmas` (field 14) of an mm entry.
fn areas(mut mm: &[u8]) -> Result<Vec<[u64; 16]>> {
    let mut areas = Vec::new();
    while !mm.is_empty() {
        let key = varint(&mut mm)?;
        let value = varint(&mut mm)?;
        if key & 7 == 2 {
            let (bytes, rest) = mm.split_at_checked(usize::try_from(value)?).context("a field breaks off")?;
            mm = rest;
            if key >> 3 == 14 {
                areas.push(fields(bytes)?);
            }
        }
    }
    Ok(areas)
}
