//! Getting pages out by vmsplice(2) into pipes, without copying them.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use super::blob::{IOVEC_MAX, IoVec, PIPE_MAX, op};
use super::infected::{CommandError, Infected};
use crate::addr::{Addr, AddrRange, PAGE_SIZE, PageCount};
use crate::kernel::{SyscallError, descriptor};

/// What a pipe should hold: what an unprivileged user may ask for (fs.pipe-max-size).
const PIPE_BYTES: u64 = 1 << 20;
/// UIO_MAXIOV
const IOVECS_PER_CALL: usize = 1024;

/// Why memory could not be grabbed.
#[derive(Debug, thiserror::Error)]
pub enum GrabError {
    /// The parasite failed.
    #[error(transparent)]
    Command(#[from] CommandError),
    /// A page cannot be given away: not mapped, not readable, or its content cannot be had.
    #[error("vmsplice of the page at {address}")]
    Page {
        /// The first such page.
        address: Addr,
        /// Why.
        source: io::Error,
    },
    /// A range is not made of whole pages.
    #[error("{0} is not made of whole pages")]
    NotPages(AddrRange),
    /// The receiver failed.
    #[error("writing what was grabbed")]
    Drain(#[source] io::Error),
    /// The receiver left something in a pipe.
    #[error("{0} bytes left in a pipe")]
    NotDrained(u64),
}

impl From<SyscallError> for GrabError {
    fn from(e: SyscallError) -> Self {
        Self::Command(CommandError::Call(e))
    }
}

/// A pipe of the target, of which we hold the read end.
#[derive(Debug)]
pub(super) struct Pipe {
    read_end: OwnedFd,
    pages: PageCount,
}

/// What goes into one pipe: iovecs `first..first + count`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Fill {
    first: usize,
    count: usize,
    bytes: u64,
}

/// How far a list of ranges has been dealt with.
#[derive(Clone, Copy, Debug, Default)]
struct Cursor {
    range: usize,
    offset: u64,
}

impl Infected<'_> {
    /// Gives the content of `ranges` to `drain`, in order: each call gets a pipe and how many bytes it holds, and must
    /// take them all out. What a pipe holds are references to the pages: what must not change belongs copied before
    /// the thaw.
    ///
    /// Ranges must be readable by the target itself: PROT_NONE memory is not.
    ///
    /// # Errors
    /// See [`GrabError`]. Bytes before the page that it names may have been given out already.
    pub fn grab(
        &mut self,
        ranges: &[AddrRange],
        drain: &mut dyn FnMut(BorrowedFd<'_>, u64) -> io::Result<()>,
    ) -> Result<(), GrabError> {
        if let Some(&odd) =
            ranges.iter().find(|r| !r.start.is_page_aligned() || !r.end.is_page_aligned() || r.is_empty())
        {
            return Err(GrabError::NotPages(odd));
        }
        let total: PageCount = ranges.iter().map(|r| r.pages()).sum();
        if total == PageCount::ZERO {
            return Ok(());
        }
        self.open_pipes(total)?;
        let result = self.grab_all(ranges, drain);
        if result.is_err() {
            // Something may be left in them.
            self.close_all()?;
        }
        result
    }

    fn grab_all(
        &mut self,
        ranges: &[AddrRange],
        drain: &mut dyn FnMut(BorrowedFd<'_>, u64) -> io::Result<()>,
    ) -> Result<(), GrabError> {
        // Two groups of pipes take turns: while we drain one, the parasite fills the other.
        let half = self.pipes.len().div_ceil(2);
        let groups = [0..half, half..self.pipes.len()];
        let iovecs_each = IOVEC_MAX / 2;
        let mut cursor = Cursor::default();
        let mut turn = 0;
        let mut in_flight: Option<(usize, Vec<Fill>, Cursor)> = None;
        loop {
            if in_flight.is_none() {
                in_flight = self.start(ranges, cursor, turn, &groups[turn], turn * iovecs_each)?;
            }
            let Some((group, fills, next)) = in_flight.take() else { return Ok(()) };
            let spliced = self.spliced(&groups[group], &fills)?;
            let wanted: u64 = fills.iter().map(|fill| fill.bytes).sum();
            let got: u64 = spliced.iter().map(|&n| n.max(0) as u64).sum();
            if got == wanted {
                cursor = next;
                let other = 1 - group;
                // One pipe only: nothing to take turns with.
                if !groups[other].is_empty() {
                    turn = other;
                    in_flight = self.start(ranges, cursor, turn, &groups[turn], turn * iovecs_each)?;
                }
            } else {
                cursor = advance(ranges, cursor, got);
                if got == 0 {
                    let errno = spliced.first().map_or(libc::EFAULT, |&n| -n.min(0) as i32);
                    let address = ranges[cursor.range].start.saturating_add(cursor.offset);
                    return Err(GrabError::Page { address, source: io::Error::from_raw_os_error(errno) });
                }
            }
            for (pipe, &bytes) in self.pipes[groups[group].clone()].iter().zip(&spliced) {
                if bytes > 0 {
                    drain(pipe.read_end.as_fd(), bytes as u64).map_err(GrabError::Drain)?;
                    pipe.check_empty()?;
                }
            }
        }
    }

    /// Has the parasite fill one group of pipes; none when there is nothing left.
    fn start(
        &mut self,
        ranges: &[AddrRange],
        cursor: Cursor,
        turn: usize,
        group: &std::ops::Range<usize>,
        first_iovec: usize,
    ) -> Result<Option<(usize, Vec<Fill>, Cursor)>, GrabError> {
        let capacities: Vec<PageCount> = self.pipes[group.clone()].iter().map(|pipe| pipe.pages).collect();
        let (iovecs, fills, next) = plan(ranges, cursor, &capacities, IOVEC_MAX / 2);
        if fills.is_empty() {
            return Ok(None);
        }
        let host = self.host()?;
        let p = host.injection.segment.parameters();
        let list = host.injection.segment.iovecs();
        // SAFETY: indices are within the arrays of the segment by construction; the parasite reads them only after
        // the command that follows.
        unsafe {
            for (n, iovec) in iovecs.iter().enumerate() {
                list.add(first_iovec + n).write(*iovec);
            }
            (*p).batch_first = group.start as u32;
            (*p).batch_len = fills.len() as u32;
            for (fill, pipe) in fills.iter().zip(group.clone()) {
                let slot = &mut (*p).pipes[pipe];
                slot.first = (first_iovec + fill.first) as u32;
                slot.count = fill.count as u32;
                slot.wanted = fill.bytes;
                slot.spliced = 0;
            }
        }
        self.submit(op::SPLICE)?;
        Ok(Some((turn, fills, next)))
    }

    /// What vmsplice said for each pipe of the group that was started last.
    fn spliced(&mut self, group: &std::ops::Range<usize>, fills: &[Fill]) -> Result<Vec<i64>, GrabError> {
        let done = self.finish()?.max(0) as usize;
        let p = self.parameters()?;
        // SAFETY: the parasite is done with them.
        let pipes = unsafe { (&raw const (*p).pipes).read_volatile() };
        Ok(pipes[group.clone()].iter().take(fills.len().min(done)).map(|pipe| pipe.spliced).collect())
    }

    /// Pipes for `total` pages, or as many as the limits allow.
    fn open_pipes(&mut self, total: PageCount) -> Result<(), GrabError> {
        let wanted = total.bytes().div_ceil(PIPE_BYTES).clamp(1, PIPE_MAX as u64) as usize;
        if self.pipes.len() >= wanted {
            return Ok(());
        }
        if !self.pipes.is_empty() {
            self.close_all()?;
        }
        let p = self.parameters()?;
        // SAFETY: the parasite reads it only after the command.
        unsafe { (*p).pipe_count = wanted as u32 };
        let made = self.call(op::PIPES, "pipe2")? as usize;
        // SAFETY: the parasite is done with them.
        let slots = unsafe { (&raw const (*p).pipes).read_volatile() };
        for slot in &slots[..made] {
            let read_end = self.take(slot.read_end)?;
            let pages = enlarge(&read_end)?;
            self.pipes.push(Pipe { read_end, pages });
        }
        // Past fs.pipe-user-pages-soft a pipe shrinks to two pages: a few good ones serve better than many such.
        let best = self.pipes.iter().map(|pipe| pipe.pages).max().unwrap_or_default();
        let good = self.pipes.iter().take_while(|pipe| pipe.pages == best).count();
        self.pipes.truncate(good.max(1));
        Ok(())
    }
}

impl Pipe {
    fn check_empty(&self) -> Result<(), GrabError> {
        let left = descriptor::waiting(self.read_end.as_fd())
            .map_err(|e| SyscallError::new("ioctl(FIONREAD)", "a pipe", e))?;
        if left == 0 { Ok(()) } else { Err(GrabError::NotDrained(left as u64)) }
    }
}

/// Makes a pipe as large as we may; how many pages it holds then.
fn enlarge(pipe: &OwnedFd) -> Result<PageCount, SyscallError> {
    let fd = pipe.as_raw_fd();
    // SAFETY: no memory is involved.
    let bytes = unsafe {
        libc::fcntl(fd, libc::F_SETPIPE_SZ, PIPE_BYTES as libc::c_int);
        libc::fcntl(fd, libc::F_GETPIPE_SZ)
    };
    if bytes <= 0 {
        return Err(SyscallError::last("fcntl(F_GETPIPE_SZ)", "a pipe"));
    }
    Ok(PageCount(bytes as u64 / PAGE_SIZE))
}

/// What the pipes of the given capacities get next, with at most `iovec_max` iovecs; and where that ends. A page takes
/// one slot of a pipe, however it lies in memory.
fn plan(
    ranges: &[AddrRange],
    from: Cursor,
    capacities: &[PageCount],
    iovec_max: usize,
) -> (Vec<IoVec>, Vec<Fill>, Cursor) {
    let (mut iovecs, mut fills, mut at) = (Vec::new(), Vec::new(), from);
    for capacity in capacities {
        let mut fill = Fill { first: iovecs.len(), count: 0, bytes: 0 };
        while fill.bytes < capacity.bytes() && fill.count < IOVECS_PER_CALL && iovecs.len() < iovec_max {
            let Some(range) = ranges.get(at.range) else { break };
            let len = (range.len() - at.offset).min(capacity.bytes() - fill.bytes);
            iovecs.push(IoVec { base: range.start.get() + at.offset, len });
            fill.count += 1;
            fill.bytes += len;
            at = advance(ranges, at, len);
        }
        if fill.count == 0 {
            break;
        }
        fills.push(fill);
    }
    (iovecs, fills, at)
}

fn advance(ranges: &[AddrRange], mut at: Cursor, mut bytes: u64) -> Cursor {
    while let Some(range) = ranges.get(at.range) {
        let rest = range.len() - at.offset;
        if bytes < rest {
            at.offset += bytes;
            break;
        }
        bytes -= rest;
        at = Cursor { range: at.range + 1, offset: 0 };
    }
    at
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn plans_name_every_byte_once_and_in_order(
            pages in prop::collection::vec((1u64..40, 1u64..40), 1..60),
            capacities in prop::collection::vec(1u64..20, 1..6),
            iovec_max in 1usize..30,
        ) {
            let mut next = 0x10_0000;
            let ranges: Vec<AddrRange> = pages.iter().map(|&(gap, len)| {
                let start = next + gap * PAGE_SIZE;
                next = start + len * PAGE_SIZE;
                AddrRange::new(start, next)
            }).collect();
            let capacities: Vec<PageCount> = capacities.into_iter().map(PageCount).collect();
            let (mut cursor, mut seen) = (Cursor::default(), Vec::new());
            loop {
                let (iovecs, fills, after) = plan(&ranges, cursor, &capacities, iovec_max);
                if fills.is_empty() { break; }
                prop_assert!(iovecs.len() <= iovec_max);
                prop_assert_eq!(fills.iter().map(|f| f.count).sum::<usize>(), iovecs.len());
                for (fill, capacity) in fills.iter().zip(&capacities) {
                    let of_fill = &iovecs[fill.first..fill.first + fill.count];
                    prop_assert_eq!(of_fill.iter().map(|v| v.len).sum::<u64>(), fill.bytes);
                    prop_assert!(fill.bytes <= capacity.bytes());
                }
                seen.extend(iovecs.iter().flat_map(|v| (v.base..v.base + v.len).step_by(PAGE_SIZE as usize)));
                cursor = after;
            }
            let wanted: Vec<u64> = ranges.iter()
                .flat_map(|r| (r.start.get()..r.end.get()).step_by(PAGE_SIZE as usize)).collect();
            prop_assert_eq!(seen, wanted);
        }
    }
}
