//! Carrying pages out of the frozen target into the pages file.

use std::io;

use crate::addr::{Addr, AddrRange, PAGE_SIZE};
use crate::image::PagesFile;
use crate::kernel::memory::ProcMem;
use crate::plan::GrabRun;
use crate::target::Infected;

use super::error::DumpError;

/// A run of pages and where its bytes go in the pages file.
pub(super) struct Place {
    range: AddrRange,
    offset: u64,
    /// A parasite can vmsplice it; the rest is read through `/proc/PID/mem`, which reads PROT_NONE too.
    pub(super) readable: bool,
}

/// The bytes lie in the pages file in the order of `runs`, as the pagemap wants them, whoever brings them.
pub(super) fn place(runs: &[GrabRun]) -> Vec<Place> {
    let mut offset = 0;
    runs.iter()
        .map(|run| {
            let place = Place { range: run.range, offset, readable: run.readable };
            offset += run.range.len();
            place
        })
        .collect()
}

/// The parasite's pipes bring the bytes of all ranges in order; each goes to its place.
pub(super) fn splice(runs: &[Place], parasite: &mut Infected<'_>, file: &PagesFile) -> Result<(), DumpError> {
    let ranges: Vec<AddrRange> = runs.iter().map(|r| r.range).collect();
    let mut rest = runs.iter();
    let mut at = 0;
    let mut left = 0;
    parasite.grab(&ranges, &mut |pipe, mut bytes| {
        while bytes > 0 {
            if left == 0 {
                let Some(next) = rest.next() else {
                    return Err(io::Error::other("the parasite sent more pages than it was asked for"));
                };
                (at, left) = (next.offset, next.range.len());
            }
            // Neighbouring runs lie one behind the other in the file too: one splice serves them all.
            while left < bytes && rest.as_slice().first().is_some_and(|n| n.offset == at + left) {
                left += rest.next().map_or(0, |n| n.range.len());
            }
            let now = left.min(bytes);
            file.splice_from(pipe, at, now).map_err(io::Error::other)?;
            at += now;
            left -= now;
            bytes -= now;
        }
        Ok(())
    })?;
    Ok(())
}

/// Reads all runs from outside.
pub(super) fn copy(runs: &[Place], memory: &ProcMem, file: &PagesFile) -> Result<(), DumpError> {
    if runs.is_empty() {
        return Ok(());
    }
    let mut buffer = vec![0u8; 256 * PAGE_SIZE as usize];
    for run in runs {
        let mut done = 0;
        while done < run.range.len() {
            let now = (run.range.len() - done).min(buffer.len() as u64);
            let part = &mut buffer[..now as usize];
            memory.read_at(Addr(run.range.start.get() + done), part)?;
            file.write_at(run.offset + done, part)?;
            done += now;
        }
    }
    Ok(())
}
