//! Carrying out the plan of [`super::memory`] in a task.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt as _;

use crate::addr::{Addr, AddrRange, PAGE_SIZE};
use crate::image::Chain;
use crate::image::chain::{HeldRun, KnownChecksums};
use crate::kernel::SyscallError;
use crate::range_set::RangeSet;

use super::batch::Batch;
use super::error::RestoreError;
use super::files::Opened;
use super::memory::{Difference, Plan, Source, Step};

/// How much of two memories is compared at once.
const BLOCK: u64 = 1 << 20;
/// MLOCK_ONFAULT of mlock2(2) (Linux 4.4): what is not there yet is locked when it comes.
const MLOCK_ONFAULT: u64 = 1;

/// Makes the memory of the task. All its pages are compared with `known` checksums.
pub(super) fn build(
    pid: i32,
    plan: &Plan,
    memory: &Chain,
    known: Option<&mut KnownChecksums>,
    files: &Opened,
    batch: &mut Batch<'_>,
) -> Result<(), RestoreError> {
    make(pid, &plan.before, files, batch)?;
    fill(pid, &plan.pages, memory, known)?;
    make(pid, &plan.after, files, batch)
}

/// Brings `pages` into place. We read them and not the task: on all processors, and each byte once, to compare it and to copy it.
fn fill(
    pid: i32,
    pages: &RangeSet,
    memory: &Chain,
    known: Option<&mut KnownChecksums>,
) -> Result<(), RestoreError> {
    let path = format!("/proc/{pid}/mem");
    let failed = |call, object: String| move |error| SyscallError::new(call, object, error);
    // Not process_vm_writev(2), which pins (see `target::proc`).
    let task: File = OpenOptions::new().write(true).open(&path).map_err(failed("open", path.clone()))?;
    memory.pour(pages, known, |range, bytes| {
        let written = task.write_all_at(bytes, range.start.get());
        Ok(written.map_err(failed("pwrite", format!("{path} at {range}")))?)
    })
}

/// Has the task make the steps.
fn make(pid: i32, steps: &[Step], files: &Opened, batch: &mut Batch<'_>) -> Result<(), RestoreError> {
    for step in steps {
        match step {
            Step::Unmap(range) => {
                batch.call("munmap", libc::SYS_munmap, [range.start.get(), range.len()])?;
            }
            Step::Map { range, prot, flags, source } => {
                let (fd, offset) = match source {
                    Source::Anonymous => (-1, 0),
                    Source::File { id, offset, flags } => (files.mapped(pid, *id, *flags)?, *offset),
                    Source::Shared { id, offset } => (files.shared(pid, *id)?, *offset),
                };
                // An object that is anonymous to its user is one to us that has a descriptor.
                let anonymous = if fd < 0 { libc::MAP_ANONYMOUS } else { 0 };
                let flags = *flags as i32 & !libc::MAP_ANONYMOUS | anonymous | libc::MAP_FIXED_NOREPLACE;
                let start = range.start.get();
                let args = [start, range.len(), u64::from(*prot), flags as u64, fd as u64, offset];
                batch.call_for(start as i64, "mmap", libc::SYS_mmap, args)?;
            }
            Step::Attach { range, object } => {
                let start = range.start.get();
                let id = files.segment(pid, *object)?;
                batch.call_for(start as i64, "shmat", libc::SYS_shmat, [id as u64, start, 0])?;
            }
            Step::Advise { range, advice } => {
                batch.call("madvise", libc::SYS_madvise, [range.start.get(), range.len(), *advice as u64])?;
            }
            Step::Protect { range, prot } => {
                let args = [range.start.get(), range.len(), u64::from(*prot)];
                batch.call("mprotect", libc::SYS_mprotect, args)?;
            }
            Step::Lock { range, on_fault } => {
                let how = if *on_fault { MLOCK_ONFAULT } else { 0 };
                batch.call("mlock2", libc::SYS_mlock2, [range.start.get(), range.len(), how])?;
            }
        }
    }
    batch.flush()
}

/// In which the pages of `child` are not those of `parent`, within `range`.
pub(super) fn difference(
    parent: &Chain,
    child: &Chain,
    range: AddrRange,
) -> Result<Difference, RestoreError> {
    let mut found = Difference::default();
    let mut at = range.start;
    for run in child.within(range) {
        gone(parent, AddrRange { start: at, end: run.range.start }, &mut found);
        at = run.range.end;
        compare(parent, child, run, &mut found)?;
    }
    gone(parent, AddrRange { start: at, end: range.end }, &mut found);
    Ok(found)
}

/// The child has nothing in `range`.
fn gone(parent: &Chain, range: AddrRange, found: &mut Difference) {
    if !range.is_empty() {
        found.gone.extend(parent.within(range).map(|run| run.range));
    }
}

/// The child has `run`.
fn compare(parent: &Chain, child: &Chain, run: HeldRun, found: &mut Difference) -> Result<(), RestoreError> {
    let mut ours = vec![0; BLOCK.min(run.range.len()) as usize];
    let mut theirs = ours.clone();
    let mut at = run.range.start;
    for held in parent.within(run.range) {
        if at < held.range.start {
            found.other.push(AddrRange { start: at, end: held.range.start });
        }
        at = held.range.end;
        for range in held.range.parts(BLOCK) {
            let len = range.len() as usize;
            child.read(range, &mut ours[..len])?;
            parent.read(range, &mut theirs[..len])?;
            let pages = ours[..len].chunks(PAGE_SIZE as usize).zip(theirs[..len].chunks(PAGE_SIZE as usize));
            for (n, _) in pages.enumerate().filter(|(_, (a, b))| a != b) {
                let page = AddrRange::with_len(Addr(range.start.get() + n as u64 * PAGE_SIZE), PAGE_SIZE);
                match found.other.last_mut().filter(|last| last.end == page.start) {
                    Some(last) => last.end = page.end,
                    None => found.other.push(page),
                }
            }
        }
    }
    if at < run.range.end {
        found.other.push(AddrRange { start: at, end: run.range.end });
    }
    Ok(())
}
