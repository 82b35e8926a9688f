//! Touched chunks: exact, from whatever side, and none lost over a flip.

use super::*;
use crate::addr::{Addr, AddrRange, CHUNK_SIZE, PAGE_SIZE};

for_each_family!(
    own_faults_mark_exactly_their_chunks,
    faults_in_system_calls_mark,
    writes_from_outside_mark,
    dropped_pages_mark,
    truncation_by_another_marks,
    collapse_marks,
    huge_ranges_become_events,
    flips_lose_nothing_in_a_storm,
    buffers_flip_carry_and_clear,
    a_pin_shows_for_good,
);

fn fresh(agent: &mut Agent) {
    agent.flip();
    agent.clear_previous();
}

fn own_faults_mark_exactly_their_chunks(name: &str, choice: HookChoice) {
    let victim = Victim::start();
    let arena = victim.arena(700);
    victim.touch(arena.at(5));
    let Some(agent) = attach(name, &victim, choice) else { return };
    let before = agent.counters().faults;
    let wanted = [0, 1, 63, 64, 65, 127, 300, 511, 512, 513, 699];
    for chunk in wanted {
        victim.touch(arena.at(chunk) + (chunk % 512) * PAGE_SIZE);
    }
    assert_eq!(arena.of(&agent.touched(Buffer::Current)), wanted);
    assert!(agent.counters().faults - before >= wanted.len() as u64);
    assert_eq!(agent.touched_count(Buffer::Current), agent.touched(Buffer::Current).len() as u64);
    assert!(agent.touched(Buffer::Previous).is_empty());
    assert_eq!(agent.losses(), Losses::default());
}

fn faults_in_system_calls_mark(name: &str, choice: HookChoice) {
    let victim = Victim::start();
    let arena = victim.arena(4);
    let zero = victim.ok(libc::SYS_memfd_create, [arena.at(0), 0]);
    victim.ok(libc::SYS_ftruncate, [zero, 100]);
    let Some(agent) = attach(name, &victim, choice) else { return };
    assert_eq!(victim.ok(libc::SYS_pread64, [zero, arena.at(2), 100, 0]), 100);
    assert_eq!(arena.of(&agent.touched(Buffer::Current)), [2]);
}

fn writes_from_outside_mark(name: &str, choice: HookChoice) {
    let victim = Victim::start();
    let arena = victim.arena(4);
    let Some(agent) = attach(name, &victim, choice) else { return };
    if !agent.hooks().knows(Fact::RemoteFaults) {
        assert!(
            matches!(agent.hooks().hint_mode(), HintMode::Incomplete { missing } if missing.contains(&Fact::RemoteFaults))
        );
        return;
    }
    vm_write(&victim, arena.at(1));
    mem_write(&victim, arena.at(3));
    assert_eq!(arena.of(&agent.touched(Buffer::Current)), [1, 3]);
}

fn dropped_pages_mark(name: &str, choice: HookChoice) {
    let victim = Victim::start();
    let arena = victim.arena(200);
    for chunk in 0..200 {
        victim.touch(arena.at(chunk));
    }
    let Some(mut agent) = attach(name, &victim, choice) else { return };
    fresh(&mut agent);
    victim.ok(libc::SYS_madvise, [arena.at(2), PAGE_SIZE, libc::MADV_DONTNEED as u64]);
    // Two chunks by half, over a boundary of words or not, as the kernel placed them.
    victim.ok(libc::SYS_madvise, [arena.at(5) + CHUNK_SIZE / 2, CHUNK_SIZE, libc::MADV_DONTNEED as u64]);
    victim.ok(libc::SYS_munmap, [arena.at(20), 150 * CHUNK_SIZE]);
    if agent.hooks().knows(Fact::Zaps) {
        let wanted: Vec<u64> = [2, 5, 6].into_iter().chain(20..170).collect();
        assert_eq!(arena.of(&agent.touched(Buffer::Current)), wanted);
    } else {
        assert!(
            matches!(agent.hooks().hint_mode(), HintMode::Incomplete { missing } if missing.contains(&Fact::Zaps))
        );
    }
    assert_eq!(agent.losses(), Losses::default());
}

fn truncation_by_another_marks(name: &str, choice: HookChoice) {
    let file = memfd(2 * CHUNK_SIZE);
    let victim = Victim::start();
    let arena = victim.arena(4);
    let prot = (libc::PROT_READ | libc::PROT_WRITE) as u64;
    let flags = (libc::MAP_PRIVATE | libc::MAP_FIXED) as u64;
    victim.ok(libc::SYS_mmap, [arena.at(1), 2 * CHUNK_SIZE, prot, flags, file.as_raw_fd() as u64, 0]);
    victim.touch(arena.at(1));
    victim.touch(arena.at(2));
    let Some(mut agent) = attach(name, &victim, choice) else { return };
    fresh(&mut agent);
    // SAFETY: our own file.
    assert_eq!(unsafe { libc::ftruncate(file.as_raw_fd(), CHUNK_SIZE as i64) }, 0);
    if agent.hooks().knows(Fact::Zaps) {
        let touched = arena.of(&agent.touched(Buffer::Current));
        assert!(touched.contains(&2) && !touched.contains(&1), "{touched:?}");
    }
}

fn collapse_marks(name: &str, choice: HookChoice) {
    const MADV_COLLAPSE: u64 = 25;
    let victim = Victim::start();
    let arena = victim.arena(4);
    for page in 0..512 {
        victim.touch(arena.at(1) + page * PAGE_SIZE);
    }
    let Some(mut agent) = attach(name, &victim, choice) else { return };
    fresh(&mut agent);
    victim.syscall(libc::SYS_madvise, [arena.at(1), CHUNK_SIZE, libc::MADV_HUGEPAGE as u64]);
    let result = victim.syscall(libc::SYS_madvise, [arena.at(1), CHUNK_SIZE, MADV_COLLAPSE]);
    if result != 0 {
        return skip(name, &format!("madvise(MADV_COLLAPSE): errno {}", -result));
    }
    let family = agent.hooks().hooks.iter().find(|h| h.purpose == "huge-page collapses").unwrap().family;
    if family == Some(HookChoice::Auto) {
        assert!(agent.losses().collapse > 0);
    } else {
        assert_eq!(arena.of(&agent.touched(Buffer::Current)), [1]);
        assert_eq!(agent.losses(), Losses::default());
    }
}

fn huge_ranges_become_events(name: &str, choice: HookChoice) {
    let victim = Victim::start();
    let len = 64 << 30;
    let flags = (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE) as u64;
    let prot = (libc::PROT_READ | libc::PROT_WRITE) as u64;
    let at = victim.ok(libc::SYS_mmap, [0, len, prot, flags, u64::MAX, 0]);
    victim.touch(at);
    let Some(mut agent) = attach(name, &victim, choice) else { return };
    if !agent.hooks().knows(Fact::Zaps) {
        return;
    }
    victim.ok(libc::SYS_madvise, [at, len, libc::MADV_DONTNEED as u64]);
    let zaps: Vec<_> = drained(&mut agent).into_iter().filter(|e| e.kind == EventKind::Zap).collect();
    assert!(zaps.iter().any(|e| e.ranges() == [AddrRange::with_len(Addr(at), len)]), "{zaps:?}");
    assert_eq!(agent.losses(), Losses::default());
}

fn flips_lose_nothing_in_a_storm(name: &str, choice: HookChoice) {
    const CHUNKS: u64 = 6000;
    let victim = Victim::start();
    let arena = victim.arena(CHUNKS);
    let Some(mut agent) = attach(name, &victim, choice) else { return };
    victim.start_storm(arena.start, CHUNKS);
    let (mut all, mut flips, mut busy) = (Vec::new(), 0, 0);
    // Until the last chunk is in: the storm goes upwards.
    while all.last() != Some(&(CHUNKS - 1)) {
        agent.flip();
        let new = arena.of(&agent.touched(Buffer::Previous));
        agent.clear_previous();
        flips += 1;
        busy += u32::from(!new.is_empty());
        all.extend(new);
        assert!(flips < 50_000_000, "the storm never ended: {} chunks", all.len());
    }
    victim.end_storm();
    // In order, each once: nothing lost, nothing seen in two buffers, as each chunk faults once.
    assert_eq!(all, (0..CHUNKS).collect::<Vec<_>>());
    // How often depends on the scheduler; that buffers did flip in the midst of it is what this is about.
    assert!(busy >= 2, "{flips} flips met the storm {busy} times only");
    assert_eq!(agent.losses(), Losses::default());
}

fn buffers_flip_carry_and_clear(name: &str, choice: HookChoice) {
    let victim = Victim::start();
    let arena = victim.arena(80);
    let Some(mut agent) = attach(name, &victim, choice) else { return };
    victim.touch(arena.at(1));
    agent.flip();
    victim.touch(arena.at(2));
    assert_eq!(arena.of(&agent.touched(Buffer::Previous)), [1]);
    assert_eq!(arena.of(&agent.touched(Buffer::Current)), [2]);
    let previous = agent.touched(Buffer::Previous);
    agent.carry(previous);
    agent.clear_previous();
    assert!(agent.touched(Buffer::Previous).is_empty());
    assert_eq!(arena.of(&agent.touched(Buffer::Current)), [1, 2]);
}

fn a_pin_shows_for_good(name: &str, choice: HookChoice) {
    let victim = Victim::start();
    let arena = victim.arena(1);
    victim.touch(arena.at(0));
    let Some(agent) = attach(name, &victim, choice) else { return };
    if agent.pinned.is_none() || !matches!(agent.capture, Capture::Always) {
        assert!(agent.may_be_pinned().unwrap(), "told without knowing");
        assert_ne!(
            (agent.hooks().hint_mode(), agent.hooks().knows(Fact::ForeignClears)),
            (HintMode::Complete, true),
            "the flag was not found on a kernel that has it"
        );
        return;
    }
    mem_write(&victim, arena.at(0));
    assert!(!agent.may_be_pinned().unwrap(), "neither attaching nor /proc/PID/mem pins");
    vm_write(&victim, arena.at(0));
    assert!(agent.may_be_pinned().unwrap());
    assert!(agent.may_be_pinned().unwrap());
}
