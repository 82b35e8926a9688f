//! Layout calls as events: at their return, with results; at the mmap lock, with what the arguments say.

use super::*;

for_each_family!(
    each_layout_call_is_an_event_at_its_return,
    each_layout_call_is_an_event_at_its_lock,
    a_move_tells_where_to,
    a_lock_in_no_layout_call_is_not_explained,
    every_write_lock_has_a_number_of_its_own,
);

/// What has come, all of one kind; the ranges of the first.
fn expect(agent: &mut Agent, kind: EventKind, ranges: &[AddrRange]) {
    let events = drained(agent);
    let found =
        events.iter().find(|e| e.kind == kind).unwrap_or_else(|| panic!("{kind:?} not in {events:?}"));
    assert_eq!(found.ranges(), ranges, "{found:?}");
    // madvise comes from two hooks where do_madvise is hooked too; nothing else comes twice.
    assert!(events.iter().all(|e| e.kind == kind), "{events:?}");
}

const fn pages(n: u64) -> u64 {
    n * PAGE_SIZE
}

/// What both ways tell alike. Returns where 8 pages were mapped.
fn told_in_any_way(victim: &Victim, agent: &mut Agent) -> u64 {
    let at = victim.ok(libc::SYS_mmap, [0, pages(8) - 1, RW, ANON, u64::MAX, 0]);
    expect(agent, EventKind::Mmap, &[range(at, 8)]);
    victim.ok(libc::SYS_mprotect, [at, pages(2), libc::PROT_READ as u64]);
    expect(agent, EventKind::Mprotect, &[range(at, 2)]);
    victim.syscall(libc::SYS_pkey_mprotect, [at, pages(2), RW, u64::MAX]);
    expect(agent, EventKind::Mprotect, &[range(at, 2)]);
    victim.ok(libc::SYS_madvise, [at, pages(1), libc::MADV_DONTFORK as u64]);
    expect(agent, EventKind::Madvise(libc::MADV_DONTFORK), &[range(at, 1)]);
    let moved =
        victim.ok(libc::SYS_mremap, [at + pages(7), pages(1), pages(64), libc::MREMAP_MAYMOVE as u64, 0]);
    expect(agent, EventKind::Mremap, &[range(at + pages(7), 1), range(moved, 64)]);
    victim.ok(libc::SYS_munmap, [moved, pages(64)]);
    expect(agent, EventKind::Munmap, &[range(moved, 64)]);
    // Failing calls may have done part of their work.
    assert!(victim.syscall(libc::SYS_mprotect, [at + pages(6), pages(9999999), 1]) < 0);
    expect(agent, EventKind::Mprotect, &[range(at + pages(6), 9_999_999)]);

    let brk = victim.ok(libc::SYS_brk, [0]);
    expect(agent, EventKind::Brk, &[]);
    victim.ok(libc::SYS_brk, [brk + 0x5000]);
    let floor = brk & !(PAGE_SIZE - 1);
    expect(agent, EventKind::Brk, &[AddrRange::with_len(Addr(floor), brk + 0x5000 - floor).page_aligned()]);
    victim.ok(libc::SYS_brk, [brk + 0x1000]);
    let shrunk = (brk + 0x1000) & !(PAGE_SIZE - 1);
    expect(agent, EventKind::Brk, &[AddrRange::new(shrunk, brk + 0x5000).page_aligned()]);

    victim.ok(libc::SYS_mlock, [at, pages(1)]);
    expect(agent, EventKind::Flags, &[range(at, 1)]);
    victim.ok(libc::SYS_munlock, [at, pages(1)]);
    expect(agent, EventKind::Flags, &[range(at, 1)]);
    victim.ok(libc::SYS_munlockall, []);
    expect(agent, EventKind::Flags, &[EVERYTHING]);
    if victim.syscall(libc::SYS_prctl, [libc::PR_SET_VMA as u64, 0, at, pages(3), 0]) == 0 {
        expect(agent, EventKind::Flags, &[range(at, 3)]);
    } else {
        // No CONFIG_ANON_VMA_NAME.
        drained(agent);
    }
    let shared = victim.ok(libc::SYS_mmap, [0, pages(2), RW, SHARED, u64::MAX, 0]);
    drained(agent);
    victim.ok(libc::SYS_remap_file_pages, [shared, pages(1), 0, 1, 0]);
    expect(agent, EventKind::RemapFilePages, &[range(shared, 1)]);
    victim.syscall(libc::SYS_shmdt, [at]);
    expect(agent, EventKind::Shmdt, &[EVERYTHING]);
    at
}

fn nothing_else(victim: &Victim, agent: &mut Agent) {
    victim.ok(libc::SYS_getpid, []);
    victim.ok(libc::SYS_prctl, [libc::PR_GET_DUMPABLE as u64]);
    assert_eq!(drained(agent), []);
    assert_eq!(agent.losses(), Losses::default());
}

fn each_layout_call_is_an_event_at_its_return(name: &str, choice: HookChoice) {
    let victim = Victim::start();
    let Some(mut agent) = attach_by(name, &victim, choice, false) else { return };
    assert!(!agent.hooks().layout_by_lock() && agent.hooks().knows(Fact::LayoutCalls));
    let at = told_in_any_way(&victim, &mut agent);
    let agent = &mut agent;
    victim.ok(libc::SYS_madvise, [at, pages(1), libc::MADV_DONTNEED as u64]);
    expect(agent, EventKind::Madvise(libc::MADV_DONTNEED), &[range(at, 1)]);
    assert!(victim.syscall(libc::SYS_mmap, [0, pages(1), RW, SHARED, u64::MAX, 1]) < 0);
    expect(agent, EventKind::Mmap, &[]);
    victim.syscall(libc::SYS_remap_file_pages, [at, pages(1), 0, 0, 0]);
    expect(agent, EventKind::RemapFilePages, &[range(at, 1)]);
    // What they do is tested elsewhere; here, that failing ones are told too.
    victim.syscall(libc::SYS_shmat, [u64::MAX, 0, 0]);
    expect(agent, EventKind::Shmat, &[EVERYTHING]);
    victim.syscall(libc::SYS_io_setup, [0, 0]);
    expect(agent, EventKind::AioSetup, &[EVERYTHING]);
    victim.syscall(libc::SYS_io_destroy, [0]);
    expect(agent, EventKind::AioDestroy, &[EVERYTHING]);
    victim.syscall(libc::SYS_prctl, [libc::PR_SET_MM as u64, 0, 0, 0, 0]);
    expect(agent, EventKind::Prctl, &[EVERYTHING]);
    victim.syscall(libc::SYS_userfaultfd, [u64::MAX]);
    expect(agent, EventKind::Userfaultfd, &[]);
    victim.syscall(libc::SYS_io_uring_setup, [0, 0]);
    expect(agent, EventKind::IoUringSetup, &[]);
    victim.syscall(libc::SYS_io_uring_register, [u64::MAX, 0, 0, 0]);
    expect(agent, EventKind::IoUringRegister, &[]);
    victim.syscall(libc::SYS_process_madvise, [u64::MAX, 0, 0, 0, 0]);
    expect(agent, EventKind::Unknown, &[EVERYTHING]);
    // And nothing for calls that change no layout.
    nothing_else(&victim, agent);
}

/// An agent that tells layout calls at the mmap lock, where the kernel can.
fn by_lock(name: &str, victim: &Victim, choice: HookChoice) -> Option<Agent> {
    let agent = attach(name, victim, choice)?;
    if !agent.hooks().layout_by_lock() {
        assert!(!agent.hooks().knows(Fact::ForeignClears), "{:?}", agent.hooks());
        skip(name, "no per-VMA locks, and so no hook on the mmap lock");
        return None;
    }
    assert!(agent.hooks().knows(Fact::LayoutCalls), "{:?}", agent.hooks());
    let attached: Vec<_> = agent.hooks().hooks.iter().flat_map(|h| &h.attached).collect();
    assert!(attached.iter().all(|hook| !hook.contains("sys_")), "slows down every system call: {attached:?}");
    Some(agent)
}

fn each_layout_call_is_an_event_at_its_lock(name: &str, choice: HookChoice) {
    let victim = Victim::start();
    let Some(mut agent) = by_lock(name, &victim, choice) else { return };
    let at = told_in_any_way(&victim, &mut agent);
    let agent = &mut agent;
    // As far as a file or a hole is looked for before the arguments are refused.
    victim.ok(libc::SYS_mmap, [at, pages(2), RW, ANON | libc::MAP_FIXED as u64, u64::MAX, 0]);
    expect(agent, EventKind::Mmap, &[range(at, 2)]);
    let noreplace = ANON | libc::MAP_FIXED_NOREPLACE as u64;
    assert_eq!(
        victim.syscall(libc::SYS_mmap, [at, pages(2), RW, noreplace, u64::MAX, 0]),
        -i64::from(libc::EEXIST)
    );
    expect(agent, EventKind::Mmap, &[range(at, 2)]);
    // THP-aligned: somewhere in what was found.
    let huge = victim.ok(libc::SYS_mmap, [0, 4 << 20, RW, ANON, u64::MAX, 0]);
    let events = drained(agent);
    assert!(events.len() == 1 && events[0].ranges()[0].overlaps(range(huge, 1024)), "{events:?}");
    assert!(events[0].ranges()[0].intersection(range(huge, 1024)) == Some(range(huge, 1024)), "{events:?}");
    // A hint that can be met is not searched for.
    victim.ok(libc::SYS_munmap, [huge, 4 << 20]);
    drained(agent);
    assert_eq!(victim.ok(libc::SYS_mmap, [huge, pages(1), RW, ANON, u64::MAX, 0]), huge);
    let events = drained(agent);
    assert!(events[0].is_placed_by_hint() && events[0].ranges() == [range(huge, 1)], "{events:?}");

    let key = victim.ok(libc::SYS_shmget, [libc::IPC_PRIVATE as u64, pages(1), 0o600]);
    let shared = victim.ok(libc::SYS_shmat, [key, 0, 0]);
    victim.ok(libc::SYS_shmctl, [key, libc::IPC_RMID as u64, 0]);
    let events = drained(agent);
    assert!(events.len() == 1 && events[0].kind == EventKind::Shmat, "{events:?}");
    assert_eq!(events[0].found(), Some(range(shared, 1)));
    let context = at;
    victim.ok(libc::SYS_mmap, [at, pages(1), RW, ANON | libc::MAP_FIXED as u64, u64::MAX, 0]);
    victim.touch(at + 8);
    drained(agent);
    if victim.syscall(libc::SYS_io_setup, [8, context + 64]) == 0 {
        expect(agent, EventKind::AioSetup, &[EVERYTHING]);
    }
    victim.syscall(libc::SYS_prctl, [libc::PR_SET_MM as u64, 6, at, 0, 0]);
    drained(agent);
    // A file descriptor: that it is one counts when a range is registered.
    let uffd = victim.syscall(libc::SYS_userfaultfd, [1]);
    assert_eq!(drained(agent), []);
    if uffd >= 0 {
        register(&victim, uffd as u64, at);
        let events = drained(agent);
        assert!(events.iter().any(|e| e.kind == EventKind::Userfaultfd), "{events:?}");
    }
    // What fails before it takes the lock has changed nothing.
    victim.syscall(libc::SYS_shmat, [u64::MAX, 0, 0]);
    victim.syscall(libc::SYS_io_setup, [0, 0]);
    victim.syscall(libc::SYS_process_madvise, [u64::MAX, 0, 0, 0, 0]);
    nothing_else(&victim, agent);
}

/// UFFDIO_API, then UFFDIO_REGISTER of one page, both structures being built in the page after it.
fn register(victim: &Victim, uffd: u64, at: u64) {
    use std::os::unix::fs::FileExt;
    const UFFDIO_API: u64 = 0xC018_AA3F;
    const UFFDIO_REGISTER: u64 = 0xC020_AA00;
    let mem = std::fs::OpenOptions::new().write(true).open(format!("/proc/{}/mem", victim.pid)).unwrap();
    let put = |words: &[u64]| {
        let bytes: Vec<u8> = words.iter().flat_map(|w| w.to_ne_bytes()).collect();
        mem.write_all_at(&bytes, at + PAGE_SIZE).unwrap();
    };
    put(&[0xAA, 0, 0]);
    victim.ok(libc::SYS_ioctl, [uffd, UFFDIO_API, at + PAGE_SIZE]);
    put(&[at, PAGE_SIZE, 1, 0]);
    victim.ok(libc::SYS_ioctl, [uffd, UFFDIO_REGISTER, at + PAGE_SIZE]);
}

fn a_move_tells_where_to(name: &str, choice: HookChoice) {
    let victim = Victim::start();
    let arena = victim.arena(16);
    let Some(mut agent) = by_lock(name, &victim, choice) else { return };
    let mut remap = |args: [u64; 5]| {
        let to = victim.ok(libc::SYS_mremap, args);
        let events = drained(&mut agent);
        assert!(events.len() == 1 && events[0].kind == EventKind::Mremap, "{events:?}");
        (to, events[0].remapped())
    };
    let (fixed, may_move) = (libc::MREMAP_FIXED as u64, libc::MREMAP_MAYMOVE as u64);
    let at = arena.at(0);
    let (to, what) = remap([at, pages(1), pages(1), may_move | fixed, arena.at(2)]);
    assert_eq!((to, what), (arena.at(2), Remap::Moved { from: range(at, 1), to: range(to, 1), exact: true }));
    // A hole behind it, into which it can grow, and from which it can shrink.
    let last = arena.at(4) - PAGE_SIZE;
    victim.ok(libc::SYS_munmap, [arena.at(4), CHUNK_SIZE]);
    let mut remap = |args: [u64; 5]| {
        drained(&mut agent);
        let to = victim.ok(libc::SYS_mremap, args);
        let events = drained(&mut agent);
        assert!(events.len() == 1 && events[0].kind == EventKind::Mremap, "{events:?}");
        (to, events[0].remapped())
    };
    let (to, what) = remap([last, pages(1), pages(3), may_move, 0]);
    assert_eq!((to, what), (last, Remap::Tail(range(last + pages(1), 2))));
    let (to, what) = remap([last, pages(3), pages(2), 0, 0]);
    assert_eq!((to, what), (last, Remap::Tail(range(last + pages(2), 1))));
    // What has no room behind it moves, to a hole that the kernel finds, and THP-aligned within it.
    let (to, what) = remap([arena.at(6), pages(1), pages(8), may_move, 0]);
    assert!(to != arena.at(6));
    assert_eq!(what, Remap::Moved { from: range(arena.at(6), 1), to: range(to, 8), exact: true });
    let (to, what) = remap([arena.at(7), CHUNK_SIZE, 2 * CHUNK_SIZE, may_move, 0]);
    let Remap::Moved { from, to: around, exact } = what else { panic!("{what:?}") };
    let wanted = AddrRange::with_len(Addr(to), 2 * CHUNK_SIZE);
    assert_eq!((from, around.intersection(wanted)), (range(arena.at(7), 512), Some(wanted)));
    assert_eq!(exact, around == wanted);
    let dontunmap = libc::MREMAP_DONTUNMAP as u64 | may_move;
    let (to, what) = remap([arena.at(9), pages(2), pages(2), dontunmap, 0]);
    assert_eq!(what, Remap::Moved { from: range(arena.at(9), 2), to: range(to, 2), exact: true });
    let (to, what) = remap([arena.at(10), pages(2), pages(2), dontunmap, arena.at(7)]);
    assert_eq!(to, arena.at(7));
    assert_eq!(what, Remap::Moved { from: range(arena.at(10), 2), to: range(to, 2), exact: true });
}

fn a_lock_in_no_layout_call_is_not_explained(name: &str, choice: HookChoice) {
    let victim = Victim::start();
    let arena = victim.arena(3);
    let stack = libc::MAP_GROWSDOWN as u64 | libc::MAP_FIXED as u64;
    victim.ok(libc::SYS_munmap, [arena.at(0), 2 * CHUNK_SIZE]);
    victim.ok(libc::SYS_mmap, [arena.at(1), PAGE_SIZE, RW, ANON | stack, u64::MAX, 0]);
    let Some(mut agent) = by_lock(name, &victim, choice) else { return };
    let generation = agent.generation();
    victim.touch(arena.at(1) - 1);
    assert_eq!((drained(&mut agent), agent.generation()), (vec![], generation + 1), "by the target's fault");
    // By a write through /proc/PID/mem, which is no clear_refs, though it takes the same lock in the same call.
    mem_write(&victim, arena.at(1) - PAGE_SIZE - 8);
    let events = drained(&mut agent);
    assert!(agent.generation() > generation + 1 && !events.is_empty(), "{events:?}");
    assert!(events.iter().all(|e| e.kind == EventKind::ProcessVmWrite), "{events:?}");
}

fn every_write_lock_has_a_number_of_its_own(name: &str, choice: HookChoice) {
    let victim = Victim::start();
    let arena = victim.arena(1);
    let Some(mut agent) = by_lock(name, &victim, choice) else { return };
    let first = agent.generation() + 1;
    for n in 0..100 {
        victim.ok(libc::SYS_mprotect, [arena.at(0), PAGE_SIZE, n % 2]);
    }
    let numbers: Vec<u64> = drained(&mut agent).iter().map(|e| e.lock).collect();
    assert_eq!(numbers, (first..first + 100).collect::<Vec<_>>());
    assert_eq!(agent.generation(), first + 99);
}
