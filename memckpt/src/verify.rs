//! Whether a checkpoint is what a process has in memory: byte for byte, in both directions.

mod process;
mod shared;

use crate::addr::{Addr, AddrRange, PAGE_SIZE, PageCount};
use crate::image::chain::{Chain, ChainError};
use crate::kernel::SyscallError;
use crate::kernel::maps::{self, MapsError, Vma};
use crate::plan::{Handling, VmaFacts, classify};
use crate::range_set::RangeSet;
use crate::tracker::dirty::{PageFlags, PageRun};

pub use process::LiveMemory;

/// How many differences are told apart one by one.
const TOLD: usize = 16;
/// How much is read at a time.
const BATCH: u64 = 256 * PAGE_SIZE;

/// A comparison that could not be made.
#[derive(Debug, thiserror::Error)]
pub enum CompareError {
    /// The layout cannot be read.
    #[error(transparent)]
    Maps(#[from] MapsError),
    /// The memory cannot be read.
    #[error(transparent)]
    Syscall(#[from] SyscallError),
    /// The checkpoint cannot be read.
    #[error(transparent)]
    Chain(#[from] ChainError),
}

/// How a page differs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum DifferenceKind {
    /// Both have the page, with other bytes; the address is that of the first.
    Bytes,
    /// The process has it, the checkpoint does not.
    NotInCheckpoint,
    /// The checkpoint has it, and the process cannot be read there, or maps something there that no checkpoint holds.
    NotInProcess,
}

/// A page that differs.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Difference {
    /// Where.
    pub address: Addr,
    /// How.
    pub kind: DifferenceKind,
    /// The VMA, as `/proc/PID/maps` names it; empty where it has no name.
    pub vma: String,
}

/// What a comparison found.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct Comparison {
    /// Pages of the checkpoint that were compared.
    pub pages_compared: PageCount,
    /// Pages that only the process has, and that hold nothing but zeroes: as good as absent.
    pub pages_zero: PageCount,
    /// Pages that differ.
    pub pages_different: PageCount,
    /// The first of them.
    pub differences: Vec<Difference>,
}

impl Comparison {
    /// Whether the two are the same.
    #[must_use]
    pub fn is_exact(&self) -> bool {
        self.pages_different == PageCount::ZERO
    }

    fn differs(&mut self, address: Addr, kind: DifferenceKind, vma: &str) {
        self.pages_different += PageCount(1);
        if self.differences.len() < TOLD {
            self.differences.push(Difference { address, kind, vma: vma.to_owned() });
        }
    }
}

/// The memory of a process, as the comparison needs it.
pub trait Memory {
    /// The pages of `range` that are present or swapped, in order, with PRESENT, SWAPPED and FILE right.
    ///
    /// # Errors
    /// The process cannot be asked.
    fn pages(&self, range: AddrRange) -> Result<Vec<PageRun>, SyscallError>;

    /// Reads `range` into `buffer`, which is as long.
    ///
    /// # Errors
    /// A page cannot be read.
    fn read(&self, range: AddrRange, buffer: &mut [u8]) -> Result<(), SyscallError>;
}

/// Compares the memory of process `pid`, which should stand still, with a checkpoint.
///
/// # Errors
/// The process or the checkpoint cannot be read; differences are no error.
pub fn compare(pid: i32, chain: &Chain) -> Result<Comparison, CompareError> {
    let memory = LiveMemory::open(pid)?;
    let vmas = maps::read(pid)?;
    let mut found = compare_with(&memory, &vmas, chain)?;
    shared::compare(pid, &vmas, chain, &mut found)?;
    Ok(found)
}

/// Compares the private `memory`, laid out as `vmas`, with a checkpoint.
///
/// # Errors
/// As [`compare`].
pub fn compare_with(memory: &impl Memory, vmas: &[Vma], chain: &Chain) -> Result<Comparison, CompareError> {
    let mut found = Comparison::default();
    let held = chain.held();
    let mut outside = held.clone();
    for vma in vmas {
        let handling = classify(vma, VmaFacts::default()).handling();
        if handling == Handling::Nothing {
            continue;
        }
        outside.remove(vma.range);
        compare_held(memory, vma, chain, &mut found)?;
        if handling == Handling::Whole {
            for missing in held.outside(vma.range).into_iter().flat_map(pages_of) {
                found.differs(missing.start, DifferenceKind::NotInCheckpoint, &vma.name);
            }
        } else {
            compare_missing(memory, vma, &held, &mut found)?;
        }
    }
    for page in outside.iter().flat_map(pages_of) {
        let name = vmas.iter().find(|vma| vma.range.contains(page.start)).map_or("", |vma| &vma.name);
        found.differs(page.start, DifferenceKind::NotInProcess, name);
    }
    Ok(found)
}

/// Every page of the checkpoint in `vma` must be in the process, with the same bytes.
fn compare_held(
    memory: &impl Memory,
    vma: &Vma,
    chain: &Chain,
    found: &mut Comparison,
) -> Result<(), CompareError> {
    let (mut ours, mut theirs) = (vec![0; BATCH as usize], vec![0; BATCH as usize]);
    for run in chain.within(vma.range) {
        for batch in batches_of(run.range) {
            let len = batch.len() as usize;
            chain.read(batch, &mut ours[..len])?;
            found.pages_compared += batch.pages();
            if memory.read(batch, &mut theirs[..len]).is_ok() {
                if ours[..len] != theirs[..len] {
                    bytes_differ(batch.start, &ours[..len], &theirs[..len], vma, found);
                }
                continue;
            }
            // Something in the batch cannot be read: find out which pages.
            for page in pages_of(batch) {
                let at = (page.start.get() - batch.start.get()) as usize;
                let (ours, theirs) = (&ours[at..at + PAGE_SIZE as usize], &mut theirs[..PAGE_SIZE as usize]);
                match memory.read(page, theirs) {
                    Ok(()) => bytes_differ(page.start, ours, theirs, vma, found),
                    Err(_) => found.differs(page.start, DifferenceKind::NotInProcess, &vma.name),
                }
            }
        }
    }
    Ok(())
}

fn bytes_differ(start: Addr, ours: &[u8], theirs: &[u8], vma: &Vma, found: &mut Comparison) {
    let page = PAGE_SIZE as usize;
    for (n, (a, b)) in ours.chunks(page).zip(theirs.chunks(page)).enumerate() {
        if let Some(at) = a.iter().zip(b).position(|(a, b)| a != b) {
            found.differs(start.saturating_add((n * page + at) as u64), DifferenceKind::Bytes, &vma.name);
        }
    }
}

/// Every private page of the process in `vma` must be in the checkpoint, or hold what an absent one would.
fn compare_missing(
    memory: &impl Memory,
    vma: &Vma,
    held: &RangeSet,
    found: &mut Comparison,
) -> Result<(), CompareError> {
    let anonymous = vma.is_anonymous();
    let mut buffer = vec![0; PAGE_SIZE as usize];
    for run in memory.pages(vma.range)? {
        if run.flags.contains(PageFlags::FILE) {
            continue;
        }
        for page in held.outside(run.range).into_iter().flat_map(pages_of) {
            if memory.read(page, &mut buffer).is_err() {
                // A guard page looks swapped and has no content; a page in memory has.
                if run.flags.contains(PageFlags::PRESENT) {
                    found.differs(page.start, DifferenceKind::NotInCheckpoint, &vma.name);
                }
                continue;
            }
            let absent = if anonymous {
                buffer.iter().all(|byte| *byte == 0)
            } else {
                // A write-protection marker looks swapped too. Having read it, the file's page is there.
                !run.flags.contains(PageFlags::PRESENT)
                    && memory.pages(page)?.iter().all(|page| page.flags.contains(PageFlags::FILE))
            };
            if absent {
                found.pages_zero += PageCount(1);
            } else {
                found.differs(page.start, DifferenceKind::NotInCheckpoint, &vma.name);
            }
        }
    }
    Ok(())
}

fn batches_of(range: AddrRange) -> impl Iterator<Item = AddrRange> {
    range.parts(BATCH)
}

fn pages_of(range: AddrRange) -> impl Iterator<Item = AddrRange> {
    range.parts(PAGE_SIZE)
}

#[cfg(test)]
mod tests;
