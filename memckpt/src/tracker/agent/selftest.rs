//! Whether the hooks that attached do what the table says, on this kernel: a function that the compiler inlined
//! attaches well and then never fires. Tried on our own process before the target's turn.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::atomic::Ordering;

use aya::maps::{MapData, RingBuf};
use memckpt_ebpf::loss;

use super::bitmap::{Bitmaps, ControlPage};
use super::events::{EventKind, LayoutEvent};
use super::hooks::{Fact, HookReport};
use super::read_record;
use crate::addr::{Addr, AddrRange, CHUNK_SIZE, Chunk, PAGE_SIZE};
use crate::kernel::SyscallError;

/// Chunks: touched, written from outside, dropped, truncated, unmapped; and one for alignment.
const CHUNKS: usize = 6;
const PAGE: usize = PAGE_SIZE as usize;

/// Reserved address space of our own, in whole chunks.
struct Arena {
    raw: *mut libc::c_void,
    first: u64,
}

impl Arena {
    fn new() -> io::Result<Self> {
        let len = CHUNKS * CHUNK_SIZE as usize;
        // SAFETY: a new private mapping at an address of the kernel's choice.
        let raw = unsafe {
            let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
            libc::mmap(std::ptr::null_mut(), len, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0)
        };
        if raw == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: our own mapping. Small pages: a huge one would be one fault for all of them. Failing is harmless.
        unsafe { libc::madvise(raw, len, libc::MADV_NOHUGEPAGE) };
        Ok(Self { raw, first: (raw as u64).next_multiple_of(CHUNK_SIZE) })
    }

    fn page(&self, chunk: u64) -> *mut u8 {
        (self.first + chunk * CHUNK_SIZE) as *mut u8
    }

    fn chunk(&self, chunk: u64) -> Option<Chunk> {
        Addr(self.first + chunk * CHUNK_SIZE).chunk()
    }

    fn touch(&self, chunk: u64) {
        // SAFETY: a writable page of the arena.
        unsafe { self.page(chunk).write_volatile(1) };
    }
}

impl Drop for Arena {
    fn drop(&mut self) {
        // SAFETY: our own mapping; the part that the test unmapped may only be unmapped again by luck of nobody having
        // taken it, so it is left out.
        unsafe {
            let end = self.raw as u64 + CHUNKS as u64 * CHUNK_SIZE;
            let hole = self.page(4) as u64;
            libc::munmap(self.raw, (hole - self.raw as u64) as usize);
            libc::munmap((hole + CHUNK_SIZE) as *mut _, (end - hole - CHUNK_SIZE) as usize);
        }
    }
}

/// Tries each fact that can be tried on ourselves; withdraws those that do not hold.
///
/// `own_mm` is our mm. On return no mm is watched.
pub(super) fn run(
    control: &ControlPage,
    bitmaps: &Bitmaps,
    ring: &mut RingBuf<MapData>,
    own_mm: u64,
    report: &mut HookReport,
) -> Result<(), SyscallError> {
    let fail = |call, source| SyscallError::new(call, "the hooks' self-test", source);
    let arena = Arena::new().map_err(|e| fail("mmap", e))?;
    let file = truncated_mapping(&arena, 3).map_err(|e| fail("memfd_create", e))?;
    arena.touch(2);
    arena.touch(4);

    let generation = control.generation().load(Ordering::SeqCst);
    control.target_mm().store(own_mm, Ordering::SeqCst);
    arena.touch(0);
    // SAFETY: pages of the arena and of the file mapped into it. What fails leaves no mark, and so is noticed.
    unsafe {
        let byte = 1u8;
        let local = libc::iovec { iov_base: (&raw const byte).cast_mut().cast(), iov_len: 1 };
        let remote = libc::iovec { iov_base: arena.page(1).cast(), iov_len: 1 };
        libc::process_vm_writev(libc::getpid(), &raw const local, 1, &raw const remote, 1, 0);
        libc::madvise(arena.page(2).cast(), PAGE, libc::MADV_DONTNEED);
        libc::ftruncate(file.as_raw_fd(), 0);
        libc::munmap(arena.page(4).cast(), CHUNK_SIZE as usize);
    }
    control.target_mm().store(0, Ordering::SeqCst);

    let active = (control.active().load(Ordering::SeqCst) & 1) as u32;
    let touched = bitmaps.touched(active);
    let seen = |chunk| arena.chunk(chunk).is_none_or(|c| touched.binary_search(&c).is_ok());
    let tries = [
        (0, Fact::OwnFaults, "a write fault left no mark"),
        (1, Fact::RemoteFaults, "a process_vm_writev left no mark"),
        (2, Fact::Zaps, "madvise(MADV_DONTNEED) left no mark"),
        (3, Fact::Zaps, "ftruncate of a private file mapping left no mark"),
        (4, Fact::Zaps, "munmap left no mark"),
    ];
    for (chunk, fact, reason) in tries {
        if !seen(chunk) {
            report.withdraw(fact, format!("self-test: {reason}"));
        }
    }
    if control.generation().load(Ordering::SeqCst) == generation {
        report.withdraw(Fact::Generation, "self-test: munmap did not move it");
    }
    drop(arena);
    if report.layout_by_lock()
        && let Err(reason) = layout_calls(control, ring, own_mm).map_err(|e| fail("mmap", e))?
    {
        report.withdraw(Fact::LayoutCalls, format!("self-test: {reason}"));
    }
    Ok(())
}

/// Whether mmap and munmap are told at the mmap lock, with where the mapping was made. Other threads of ours may fill
/// the ring meanwhile.
fn layout_calls(
    control: &ControlPage,
    ring: &mut RingBuf<MapData>,
    own_mm: u64,
) -> io::Result<Result<(), &'static str>> {
    const TRIES: usize = 5;
    // No other thread's length.
    const LEN: usize = 37 * PAGE - 123;
    let mut outcome = Ok(());
    for _ in 0..TRIES {
        while ring.next().is_some() {}
        let lost = control.loss(loss::RING_FULL);
        control.target_mm().store(own_mm, Ordering::SeqCst);
        // SAFETY: a new private mapping at an address of the kernel's choice, gone again before anybody knows of it.
        let at = unsafe {
            let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
            let at = libc::mmap(std::ptr::null_mut(), LEN, libc::PROT_NONE, flags, -1, 0);
            if at != libc::MAP_FAILED {
                libc::munmap(at, LEN);
            }
            at
        };
        let failed = io::Error::last_os_error();
        control.target_mm().store(0, Ordering::SeqCst);
        if at == libc::MAP_FAILED {
            return Err(failed);
        }
        let (mut mapped, mut unmapped) = (false, false);
        while let Some(item) = ring.next() {
            let Some(event) = read_record(&item).map(|record| LayoutEvent::from_record(&record)) else {
                continue;
            };
            if event.args[1] != LEN as u64 || event.lock == 0 || !event.is_of_the_call() {
                continue;
            }
            let whole = AddrRange::with_len(Addr(at as u64), LEN as u64).page_aligned();
            let holds = event.ranges().iter().any(|r| r.start <= whole.start && whole.end <= r.end);
            mapped |= event.kind == EventKind::Mmap && event.found().is_some() && holds;
            unmapped |= event.kind == EventKind::Munmap && event.args[0] == at as u64;
        }
        outcome = match (mapped, unmapped) {
            (true, true) => return Ok(Ok(())),
            (false, _) => Err("mmap was not told, or not where to"),
            (true, false) => Err("munmap was not told"),
        };
        if control.loss(loss::RING_FULL) == lost {
            break;
        }
    }
    Ok(outcome)
}

/// Maps a file of one page privately at the start of `chunk`, with a copied page in it.
fn truncated_mapping(arena: &Arena, chunk: u64) -> io::Result<OwnedFd> {
    // SAFETY: a new descriptor; the mapping replaces a page of our own arena.
    let file = unsafe {
        let fd = libc::memfd_create(c"memckpt-selftest".as_ptr(), libc::MFD_CLOEXEC);
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        let file = OwnedFd::from_raw_fd(fd);
        let flags = libc::MAP_PRIVATE | libc::MAP_FIXED;
        if libc::ftruncate(fd, PAGE as i64) != 0
            || libc::mmap(arena.page(chunk).cast(), PAGE, libc::PROT_READ | libc::PROT_WRITE, flags, fd, 0)
                == libc::MAP_FAILED
        {
            return Err(io::Error::last_os_error());
        }
        file
    };
    arena.touch(chunk);
    Ok(file)
}
