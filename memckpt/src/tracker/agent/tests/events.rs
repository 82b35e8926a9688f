//! Layout events, the generation, the end, and losses that are counted.

use super::*;
use crate::addr::{Addr, AddrRange, PAGE_SIZE};

for_each_family!(
    each_layout_call_is_an_event,
    generation_moves_with_the_layout_only,
    a_full_ring_is_a_loss,
    exec_ends_the_watch,
    exit_ends_the_watch,
    others_do_not_count,
    foreign_calls_are_events,
    madvise_from_outside_is_an_event,
);

const RW: u64 = (libc::PROT_READ | libc::PROT_WRITE) as u64;
const ANON: u64 = (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS) as u64;

fn range(start: u64, pages: u64) -> AddrRange {
    AddrRange::with_len(Addr(start), pages * PAGE_SIZE)
}

fn each_layout_call_is_an_event(name: &str, choice: HookChoice) {
    let victim = Victim::start();
    let Some(mut agent) = attach(name, &victim, choice) else { return };
    let mut expect = |kind: EventKind, ranges: &[AddrRange]| {
        let events = drained(&mut agent);
        let found =
            events.iter().find(|e| e.kind == kind).unwrap_or_else(|| panic!("{kind:?} not in {events:?}"));
        assert_eq!(found.ranges(), ranges, "{found:?}");
        // madvise comes from two hooks where do_madvise is hooked too; nothing else comes twice.
        assert!(events.iter().all(|e| e.kind == kind), "{events:?}");
    };
    let pages = |n| n * PAGE_SIZE;
    let any = [EVERYTHING];

    let at = victim.ok(libc::SYS_mmap, [0, pages(8) - 1, RW, ANON, u64::MAX, 0]);
    expect(EventKind::Mmap, &[range(at, 8)]);
    victim.ok(libc::SYS_mprotect, [at, pages(2), libc::PROT_READ as u64]);
    expect(EventKind::Mprotect, &[range(at, 2)]);
    victim.syscall(libc::SYS_pkey_mprotect, [at, pages(2), RW, u64::MAX]);
    expect(EventKind::Mprotect, &[range(at, 2)]);
    victim.ok(libc::SYS_madvise, [at, pages(1), libc::MADV_DONTNEED as u64]);
    expect(EventKind::Madvise(libc::MADV_DONTNEED), &[range(at, 1)]);
    let moved =
        victim.ok(libc::SYS_mremap, [at + pages(7), pages(1), pages(64), libc::MREMAP_MAYMOVE as u64, 0]);
    expect(EventKind::Mremap, &[range(at + pages(7), 1), range(moved, 64)]);
    victim.ok(libc::SYS_munmap, [moved, pages(64)]);
    expect(EventKind::Munmap, &[range(moved, 64)]);
    // Failing calls may have done part of their work.
    assert!(victim.syscall(libc::SYS_mprotect, [at + pages(6), pages(9999999), 1]) < 0);
    expect(EventKind::Mprotect, &[range(at + pages(6), 9_999_999)]);
    assert!(
        victim.syscall(libc::SYS_mmap, [0, pages(1), RW, ANON | libc::MAP_SHARED as u64, u64::MAX, 1]) < 0
    );
    expect(EventKind::Mmap, &[]);

    let brk = victim.ok(libc::SYS_brk, [0]);
    expect(EventKind::Brk, &[]);
    victim.ok(libc::SYS_brk, [brk + 0x5000]);
    let floor = brk & !(PAGE_SIZE - 1);
    expect(EventKind::Brk, &[AddrRange::with_len(Addr(floor), brk + 0x5000 - floor).page_aligned()]);
    victim.ok(libc::SYS_brk, [brk + 0x1000]);
    let shrunk = (brk + 0x1000) & !(PAGE_SIZE - 1);
    expect(EventKind::Brk, &[AddrRange::new(shrunk, brk + 0x5000).page_aligned()]);

    victim.ok(libc::SYS_mlock, [at, pages(1)]);
    expect(EventKind::Flags, &[range(at, 1)]);
    victim.ok(libc::SYS_munlock, [at, pages(1)]);
    expect(EventKind::Flags, &[range(at, 1)]);
    victim.ok(libc::SYS_munlockall, []);
    expect(EventKind::Flags, &any);
    victim.syscall(libc::SYS_prctl, [libc::PR_SET_VMA as u64, 0, at, pages(3), 0]);
    expect(EventKind::Flags, &[range(at, 3)]);
    victim.syscall(libc::SYS_remap_file_pages, [at, pages(1), 0, 0, 0]);
    expect(EventKind::RemapFilePages, &[range(at, 1)]);
    // What they do is tested elsewhere; here, that failing ones are told too.
    victim.syscall(libc::SYS_shmat, [u64::MAX, 0, 0]);
    expect(EventKind::Shmat, &any);
    victim.syscall(libc::SYS_shmdt, [at]);
    expect(EventKind::Shmdt, &any);
    victim.syscall(libc::SYS_io_setup, [0, 0]);
    expect(EventKind::AioSetup, &any);
    victim.syscall(libc::SYS_io_destroy, [0]);
    expect(EventKind::AioDestroy, &any);
    victim.syscall(libc::SYS_prctl, [libc::PR_SET_MM as u64, 0, 0, 0, 0]);
    expect(EventKind::Prctl, &any);
    victim.syscall(libc::SYS_userfaultfd, [u64::MAX]);
    expect(EventKind::Userfaultfd, &[]);
    victim.syscall(libc::SYS_io_uring_setup, [0, 0]);
    expect(EventKind::IoUringSetup, &[]);
    victim.syscall(libc::SYS_io_uring_register, [u64::MAX, 0, 0, 0]);
    expect(EventKind::IoUringRegister, &[]);
    victim.syscall(libc::SYS_process_madvise, [u64::MAX, 0, 0, 0, 0]);
    expect(EventKind::Unknown, &any);

    // And nothing for calls that change no layout.
    victim.ok(libc::SYS_getpid, []);
    victim.ok(libc::SYS_prctl, [libc::PR_GET_DUMPABLE as u64]);
    assert_eq!(drained(&mut agent), []);
    assert_eq!(agent.losses(), Losses::default());
}

fn generation_moves_with_the_layout_only(name: &str, choice: HookChoice) {
    let victim = Victim::start();
    let Some(agent) = attach(name, &victim, choice) else { return };
    let mut last = agent.generation();
    let mut moved = || {
        let now = agent.generation();
        std::mem::replace(&mut last, now) != now
    };
    let at = victim.ok(libc::SYS_mmap, [0, 0x8000, RW, ANON, u64::MAX, 0]);
    assert!(moved(), "mmap");
    victim.touch(at);
    victim.ok(libc::SYS_getpid, []);
    assert!(!moved(), "a fault or getpid");
    victim.ok(libc::SYS_mprotect, [at, 0x1000, 1]);
    assert!(moved(), "mprotect of a part");
    victim.ok(libc::SYS_mprotect, [at + 0x1000, 0x7000, 1]);
    assert!(moved(), "mprotect of a whole VMA");
    victim.ok(libc::SYS_mremap, [at, 0x8000, 0x10000, libc::MREMAP_MAYMOVE as u64]);
    assert!(moved(), "mremap");
    let brk = victim.ok(libc::SYS_brk, [0]);
    moved();
    victim.ok(libc::SYS_brk, [brk + 0x2000]);
    assert!(moved(), "brk");
    victim.ok(libc::SYS_munmap, [at, 0x1000]);
    assert!(moved(), "munmap");
    let (hole, stack) = (victim.arena(3), libc::MAP_GROWSDOWN as u64 | libc::MAP_FIXED as u64);
    victim.ok(libc::SYS_munmap, [hole.at(0), hole.at(2) - hole.at(0)]);
    victim.ok(libc::SYS_mmap, [hole.at(1), 0x1000, RW, ANON | stack, u64::MAX, 0]);
    moved();
    victim.touch(hole.at(1) - 1);
    assert!(moved(), "growth of the stack, which no system call tells");
    let _ = std::fs::read(format!("/proc/{}/maps", victim.pid)).unwrap();
    vm_write(&victim, victim.arena(1).at(0));
    moved();
    let _ = std::fs::read(format!("/proc/{}/smaps", victim.pid)).unwrap();
    assert!(!moved(), "readers");
}

fn a_full_ring_is_a_loss(name: &str, choice: HookChoice) {
    let victim = Victim::start();
    if attach(name, &victim, choice).is_none() {
        return;
    }
    let mut agent = Agent::attach_with(victim.pid, AgentOptions { choice, ring_bytes: 4096 }).unwrap();
    let calls = 300;
    for _ in 0..calls {
        victim.syscall(libc::SYS_munmap, [0x1000, 0x1000]);
    }
    let got = drained(&mut agent).len() as u64;
    let losses = agent.losses();
    assert!(got > 0 && got < calls, "{got}");
    assert_eq!(got + losses.ring, calls);
    assert_eq!(losses.total(), losses.ring);
}

fn exec_ends_the_watch(name: &str, choice: HookChoice) {
    let victim = Victim::start();
    let arena = victim.arena(1);
    // "/bin/true", and an argv of that and NULL, built in the victim.
    let memory = std::fs::OpenOptions::new().write(true).open(format!("/proc/{}/mem", victim.pid)).unwrap();
    use std::os::unix::fs::FileExt;
    memory.write_all_at(b"/bin/true\0", arena.at(0)).unwrap();
    memory.write_all_at(&arena.at(0).to_ne_bytes(), arena.at(0) + 64).unwrap();
    drop(memory);
    let Some(mut agent) = attach(name, &victim, choice) else { return };
    assert!(!agent.ended() && agent.still_attached().unwrap());
    victim.send_exec(arena.at(0), arena.at(0) + 64);
    victim.wait();
    assert!(agent.ended());
    let events = drained(&mut agent);
    assert!(events.iter().any(|e| e.kind == EventKind::Exec && e.ranges() == [EVERYTHING]), "{events:?}");
}

fn exit_ends_the_watch(name: &str, choice: HookChoice) {
    let victim = Victim::start();
    let Some(mut agent) = attach(name, &victim, choice) else { return };
    assert!(!agent.ended());
    victim.kill();
    victim.wait();
    assert!(agent.ended());
    assert!(drained(&mut agent).iter().any(|e| e.kind == EventKind::Exit));
}

fn others_do_not_count(name: &str, choice: HookChoice) {
    let (victim, other) = (Victim::start(), Victim::start());
    let arena = other.arena(64);
    let Some(mut agent) = attach(name, &victim, choice) else { return };
    let generation = agent.generation();
    for chunk in 0..64 {
        other.touch(arena.at(chunk));
    }
    other.ok(libc::SYS_munmap, [arena.at(0), 4096]);
    assert_eq!(drained(&mut agent), []);
    assert_eq!(agent.counters().faults, 0);
    assert_eq!(agent.generation(), generation);
    assert_eq!(agent.touched_count(Buffer::Current), 0);
}

fn foreign_calls_are_events(name: &str, choice: HookChoice) {
    let victim = Victim::start();
    let arena = victim.arena(2);
    let Some(mut agent) = attach(name, &victim, choice) else { return };
    if !agent.hooks().knows(Fact::ForeignWrites) {
        return skip(name, "no per-VMA locks, and so no hook on the mmap lock");
    }
    vm_write(&victim, arena.at(0));
    mem_write(&victim, arena.at(1));
    std::fs::write(format!("/proc/{}/clear_refs", victim.pid), "4").unwrap();
    let events = drained(&mut agent);
    let of =
        |kind| -> Vec<_> { events.iter().filter(|e| e.kind == kind).flat_map(LayoutEvent::ranges).collect() };
    assert_eq!(of(EventKind::ProcessVmWrite), [range(arena.at(0), 1), range(arena.at(1), 1)], "{events:?}");
    assert!(events.iter().any(|e| e.kind == EventKind::ClearRefs), "{events:?}");
    assert_eq!(events.len(), 3, "{events:?}");
}

fn madvise_from_outside_is_an_event(name: &str, choice: HookChoice) {
    let victim = Victim::start();
    let arena = victim.arena(1);
    victim.touch(arena.at(0));
    let Some(mut agent) = attach(name, &victim, choice) else { return };
    if !agent.hooks().knows(Fact::AnyMadvise) {
        return;
    }
    // SAFETY: a new descriptor; the vector lives through the call, which touches memory of the victim only.
    let result = unsafe {
        let pidfd = OwnedFd::from_raw_fd(libc::syscall(libc::SYS_pidfd_open, victim.pid, 0) as i32);
        let vector = libc::iovec { iov_base: arena.at(0) as *mut _, iov_len: 4096 };
        libc::syscall(libc::SYS_process_madvise, pidfd.as_raw_fd(), &raw const vector, 1, libc::MADV_COLD, 0)
    };
    assert_eq!(result, 4096);
    let events = drained(&mut agent);
    assert!(
        events
            .iter()
            .any(|e| e.kind == EventKind::Madvise(libc::MADV_COLD) && e.ranges() == [range(arena.at(0), 1)]),
        "{events:?}"
    );
}
