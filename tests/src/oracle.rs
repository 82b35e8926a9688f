//! Compares a chain of checkpoints with a stopped process, page by page, without any of memckpt's code: its own reader of
//! pagemap-PID.img, of the pages files and of `/proc`.

mod shared;
mod treatment;

pub use treatment::{Treatment, treatment};

use std::fs::{self, File};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};

const PAGE: u64 = 4096;
const PE_PARENT: u64 = 1;
const PE_PRESENT: u64 = 4;

/// One checkpoint of a chain.
#[derive(Debug)]
struct Link {
    directory: PathBuf,
    entries: Vec<Entry>,
    pages: File,
}

/// A run of pages.
#[derive(Debug, Clone, Copy)]
struct Entry {
    start: u64,
    end: u64,
    /// In the parent; else at `offset` in the pages file.
    parent: bool,
    offset: u64,
}

/// What a comparison looked at.
#[derive(Debug, Clone, Copy, Default)]
pub struct Compared {
    /// Pages with bytes in the newest checkpoint.
    pub own: u64,
    /// Pages that it has from its ancestors.
    pub inherited: u64,
    /// Pages compared.
    pub compared: u64,
    /// Those of them that the checkpoint before did not have, or had otherwise.
    pub changed: u64,
    /// Pages of shared memory without a file that were compared.
    pub shared: u64,
}

/// Checks that the chain ending in `images` equals the memory of the stopped process `pid`: each page that it holds, byte for byte;
/// and that no page it lacks holds anything that could not be read from the mapping's file or is not zero.
///
/// # Errors
///
/// Names the first page that differs.
pub fn compare(images: &Path, pid: i32) -> Result<Compared> {
    let chain = read_chain(images, pid)?;
    let newest = chain.first().context("an empty chain")?;
    let mut totals = Compared::default();
    for entry in &newest.entries {
        let pages = (entry.end - entry.start) / PAGE;
        if entry.parent {
            totals.inherited += pages;
        } else {
            totals.own += pages;
        }
    }
    let memory = File::open(format!("/proc/{pid}/mem"))?;
    let pagemap = File::open(format!("/proc/{pid}/pagemap"))?;
    let maps = fs::read_to_string(format!("/proc/{pid}/maps"))?;
    let mut covered = Vec::new();
    for line in maps.lines() {
        let Some(vma) = Vma::parse(line) else { bail!("cannot read {line:?}") };
        covered.push((vma.start, vma.end));
        if vma.private {
            compare_vma(&chain, &memory, &pagemap, &vma, line, &mut totals)?;
        }
    }
    for entry in &newest.entries {
        ensure!(
            (entry.start..entry.end)
                .step_by(4096)
                .all(|page| covered.iter().any(|(s, e)| (*s..*e).contains(&page))),
            "{:x}-{:x} is in {} but not mapped",
            entry.start,
            entry.end,
            images.display()
        );
    }
    shared::compare(images, pid, &memory, &mut totals)?;
    Ok(totals)
}

struct Vma {
    start: u64,
    end: u64,
    private: bool,
    /// The file behind it and the offset in it.
    file: Option<(PathBuf, u64)>,
}

impl Vma {
    fn parse(line: &str) -> Option<Self> {
        let mut fields = line.split_ascii_whitespace();
        let (start, end) = fields.next()?.split_once('-')?;
        let protection = fields.next()?;
        let offset = u64::from_str_radix(fields.next()?, 16).ok()?;
        let inode = fields.nth(1)?;
        let name = fields.collect::<Vec<_>>().join(" ");
        // The kernel's own pages: their content is not the process's.
        let kernel = name.starts_with("[vvar") || name == "[vsyscall]" || name == "[vdso]";
        Some(Self {
            start: u64::from_str_radix(start, 16).ok()?,
            end: u64::from_str_radix(end, 16).ok()?,
            private: protection.ends_with('p') && !kernel,
            // Huge pages without a file look like a file of hugetlbfs that nobody can open.
            file: (inode != "0" && !name.starts_with("/anon_hugepage"))
                .then(|| (PathBuf::from(name), offset)),
        })
    }
}

fn compare_vma(
    chain: &[Link],
    memory: &File,
    pagemap: &File,
    vma: &Vma,
    line: &str,
    totals: &mut Compared,
) -> Result<()> {
    let file = match &vma.file {
        Some((path, _)) => Some(File::open(path).with_context(|| format!("the file behind {line}"))?),
        None => None,
    };
    let (mut actual, mut saved, mut before) = (vec![0; 4096], vec![0; 4096], vec![0; 4096]);
    // 128 KiB of pagemap at a time: 64 GiB of sparse memory is mostly nothing.
    let batch = 16384 * PAGE;
    let mut at = vma.start;
    while at < vma.end {
        let end = vma.end.min(at + batch);
        let mut entries = vec![0; usize::try_from((end - at) / PAGE * 8)?];
        pagemap.read_exact_at(&mut entries, at / PAGE * 8).with_context(|| format!("pagemap of {line}"))?;
        let held = chain[0].entries.iter().any(|entry| entry.start < end && at < entry.end);
        if !held && entries.chunks(8).all(|entry| entry[7] & 0xc0 == 0) {
            at = end;
            continue;
        }
        for (index, bytes) in entries.chunks_exact(8).enumerate() {
            let page = at + index as u64 * PAGE;
            // Present or swapped (Documentation/admin-guide/mm/pagemap.rst).
            let populated = bytes[7] & 0xc0 != 0;
            let in_chain = lookup(chain, page, &mut saved)?;
            if !in_chain && !populated {
                continue;
            }
            // A guard region (bit 58, since 6.15) looks swapped, and has no content to read.
            if bytes[7] & 0x04 != 0 {
                ensure!(!in_chain, "page {page:x} of {line} is guarded, and in the chain");
                continue;
            }
            let read = memory.read_exact_at(&mut actual, page);
            // Behind the end of its file a page has no content; a write-protection marker may look swapped there.
            let in_memory = bytes[7] & 0x80 != 0;
            if read.is_err() && !in_chain && !in_memory && vma.file.is_some() {
                continue;
            }
            read.with_context(|| format!("memory at {page:x} in {line}"))?;
            totals.compared += 1;
            if !in_chain {
                // Left out: a zero page, or a file's page that nobody has written.
                saved.fill(0);
                if let (Some(file), Some((_, offset))) = (&file, &vma.file) {
                    read_up_to(file, &mut saved, offset + (page - vma.start))?;
                }
            }
            if actual != saved {
                let byte = actual.iter().zip(&saved).position(|(a, b)| a != b).unwrap_or(0);
                bail!(
                    "page {page:x} (byte {byte}) of {line} differs from {} ({}, pagemap {:016x})",
                    chain[0].directory.display(),
                    if in_chain { "in the chain" } else { "not in the chain" },
                    u64::from_le_bytes(bytes.try_into()?)
                );
            }
            if let [newest, older @ ..] = chain
                && !older.is_empty()
                && is_own(newest, page)
                && !(lookup(older, page, &mut before)? && before == actual)
            {
                totals.changed += 1;
            }
        }
        at = end;
    }
    Ok(())
}

/// Whether the newest checkpoint has bytes of its own for the page at `address`.
fn is_own(newest: &Link, address: u64) -> bool {
    let at = newest.entries.partition_point(|entry| entry.end <= address);
    newest.entries.get(at).is_some_and(|entry| entry.start <= address && !entry.parent)
}

fn read_up_to(file: &File, buffer: &mut [u8], offset: u64) -> Result<()> {
    let mut done = 0;
    while done < buffer.len() {
        match file.read_at(&mut buffer[done..], offset + done as u64)? {
            0 => break,
            count => done += count,
        }
    }
    Ok(())
}

/// Reads the page at `address` from the newest checkpoint that has it. `false`: the chain lacks it.
fn lookup(chain: &[Link], address: u64, page: &mut [u8]) -> Result<bool> {
    for (depth, link) in chain.iter().enumerate() {
        let at = link.entries.partition_point(|entry| entry.end <= address);
        match link.entries.get(at).filter(|entry| entry.start <= address) {
            Some(entry) if entry.parent => {}
            Some(entry) => {
                let offset = entry.offset + (address - entry.start);
                link.pages
                    .read_exact_at(page, offset)
                    .with_context(|| format!("pages of {} at {offset}", link.directory.display()))?;
                return Ok(true);
            }
            None if depth == 0 => return Ok(false),
            None => bail!("page {address:x} is inherited from {}, which lacks it", link.directory.display()),
        }
    }
    bail!("page {address:x} is inherited from a parent that is not there")
}

fn read_chain(images: &Path, pid: i32) -> Result<Vec<Link>> {
    let mut chain = Vec::new();
    let mut next = Some(images.to_path_buf());
    while let Some(directory) = next {
        ensure!(chain.len() < 1000, "the chain has a cycle");
        let parent = directory.join("parent");
        next = parent.is_symlink().then(|| directory.join(fs::read_link(&parent).unwrap_or_default()));
        // A process that is younger than the parent has nothing in it.
        next = next.filter(|directory| directory.join(format!("pagemap-{pid}.img")).exists());
        chain.push(read_link(directory, pid)?);
    }
    Ok(chain)
}

fn read_link(directory: PathBuf, pid: i32) -> Result<Link> {
    let name = format!("pagemap-{pid}.img");
    read_pagemap(directory, &name)
}

/// The records of an image behind its two magics.
fn records(path: &Path, magic: [u8; 4]) -> Result<Vec<Vec<u8>>> {
    let image = fs::read(path).with_context(|| path.display().to_string())?;
    ensure!(
        image.get(..4) == Some(&[0x19, 0x43, 0x56, 0x54]) && image.get(4..8) == Some(&magic),
        "magics of {}",
        path.display()
    );
    let mut records = Vec::new();
    let mut rest = &image[8..];
    while !rest.is_empty() {
        let (size, after) = rest.split_at_checked(4).context("a record's length")?;
        let (record, after) =
            after.split_at_checked(u32::from_le_bytes(size.try_into()?) as usize).context("a record")?;
        records.push(record.to_vec());
        rest = after;
    }
    Ok(records)
}

fn read_pagemap(directory: PathBuf, name: &str) -> Result<Link> {
    let records = records(&directory.join(name), [0x25, 0x40, 0x08, 0x56])?;
    let records = records.iter().map(|record| fields(record)).collect::<Result<Vec<_>>>()?;
    let (head, runs) = records.split_first().context("no pagemap head")?;
    let pages = directory.join(format!("pages-{}.img", head[1]));
    let (mut entries, mut offset) = (Vec::new(), 0);
    for run in runs {
        let count = if run[5] > 0 { run[5] } else { run[2] };
        let parent = run[4] & PE_PARENT != 0 || run[3] != 0;
        ensure!(parent != (run[4] & PE_PRESENT != 0), "neither or both of parent and present: {run:?}");
        let entry = Entry { start: run[1], end: run[1] + count * PAGE, parent, offset };
        ensure!(
            entries.last().is_none_or(|last: &Entry| last.end <= entry.start),
            "entries out of order: {run:?}"
        );
        if !parent {
            offset += count * PAGE;
        }
        entries.push(entry);
    }
    let pages = File::open(&pages).with_context(|| pages.display().to_string())?;
    ensure!(
        pages.metadata()?.len() == offset,
        "the pages file holds {} and not {offset}",
        pages.metadata()?.len()
    );
    Ok(Link { directory, entries, pages })
}

/// The varint fields 1 to 15 of a protobuf message.
fn fields(mut record: &[u8]) -> Result<[u64; 16]> {
    let mut fields = [0; 16];
    while !record.is_empty() {
        let key = varint(&mut record)?;
        ensure!(key & 7 == 0, "field {} is no varint", key >> 3);
        let value = varint(&mut record)?;
        *fields.get_mut(usize::try_from(key >> 3)?).context("an unknown field")? = value;
    }
    Ok(fields)
}

fn varint(bytes: &mut &[u8]) -> Result<u64> {
    let mut value = 0;
    for shift in (0..64).step_by(7) {
        let (&byte, rest) = bytes.split_first().context("a varint breaks off")?;
        *bytes = rest;
        value |= u64::from(byte & 0x7f) << shift;
        if byte < 0x80 {
            return Ok(value);
        }
    }
    bail!("a varint of more than ten bytes")
}

#[cfg(test)]
mod tests {
    #[test]
    fn varints_and_fields_are_read() {
        // vaddr = 0x7f0000000000 >> 0 as varint, compat_nr_pages = 300, flags = 4.
        let record = [0x08, 0x80, 0x01, 0x10, 0xac, 0x02, 0x20, 0x04];
        assert_eq!(super::fields(&record).unwrap()[..8], [0, 128, 300, 0, 4, 0, 0, 0]);
        assert!(super::fields(&[0x08, 0x80]).is_err());
    }
}
