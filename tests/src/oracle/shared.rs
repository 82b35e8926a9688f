//! Shared memory without a file: what the mappings show, against `pagemap-shmem-ID.img`. A mapping names its object by that ID, or,
//! where the object is a memfd, by the number of an opened file, which `files.img` and `memfd.img` lead from to the ID.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
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
    let memfds = memfds(images)?;
    for vma in nested(mm.first().context("no mm")?, 14)? {
        let vma = fields(vma)?;
        let [_, start, end, offset, id, _, _, status, ..] = vma;
        if status & (ANON_SHARED | MEMFD) == 0 || status & AIORING != 0 {
            continue;
        }
        let id = if status & MEMFD == 0 { Some(id) } else { memfds.get(&id).copied() };
        let id = id.filter(|id| *id != 0);
        let id = id.with_context(|| format!("{start:x}-{end:x} is shared memory without an object"))?;
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

/// The object of each opened file that is a memfd.
fn memfds(images: &Path) -> Result<BTreeMap<u64, u64>> {
    let inodes = images.join("memfd.img");
    if !inodes.exists() {
        return Ok(BTreeMap::new());
    }
    let mut objects = BTreeMap::new();
    for inode in records(&inodes, [0x99, 0x34, 0x45, 0x48])? {
        let inode = varints(&inode)?;
        objects.insert(inode[7], inode[5]);
    }
    let mut openings = BTreeMap::new();
    for file in records(&images.join("files.img"), [0x38, 0x31, 0x30, 0x56])? {
        for memfd in nested(&file, 20)? {
            let memfd = varints(memfd)?;
            let object =
                objects.get(&memfd[5]).with_context(|| format!("memfd {} is not there", memfd[5]))?;
            openings.insert(memfd[1], *object);
        }
    }
    Ok(openings)
}

/// The varint fields 1 to 15 of a message that has others too.
fn varints(mut message: &[u8]) -> Result<[u64; 16]> {
    let mut fields = [0; 16];
    while !message.is_empty() {
        if let (number @ ..16, Field::Varint(value)) = field(&mut message)? {
            fields[number as usize] = value;
        }
    }
    Ok(fields)
}

/// The messages, or strings, in field `wanted`.
fn nested(mut message: &[u8], wanted: u64) -> Result<Vec<&[u8]>> {
    let mut found = Vec::new();
    while !message.is_empty() {
        match field(&mut message)? {
            (number, Field::Bytes(bytes)) if number == wanted => found.push(bytes),
            _ => {}
        }
    }
    Ok(found)
}

enum Field<'a> {
    Varint(u64),
    Bytes(&'a [u8]),
}

/// The next field, and its number.
fn field<'a>(message: &mut &'a [u8]) -> Result<(u64, Field<'a>)> {
    let key = varint(message)?;
    let value = varint(message)?;
    match key & 7 {
        0 => Ok((key >> 3, Field::Varint(value))),
        2 => {
            let (bytes, rest) =
                message.split_at_checked(usize::try_from(value)?).context("a field breaks off")?;
            *message = rest;
            Ok((key >> 3, Field::Bytes(bytes)))
        }
        kind => bail!("field {} of a kind that is not read here: {kind}", key >> 3),
    }
}
