//! The generation, the end, and losses that are counted.

use super::*;

for_each_family!(
    generation_moves_with_the_layout_only,
    a_full_ring_is_a_loss,
    exec_ends_the_watch,
    exit_ends_the_watch,
    others_do_not_count,
    madvise_from_outside_is_an_event,
);

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
    let mut agent =
        Agent::attach_with(victim.pid, AgentOptions { ring_bytes: 4096, ..options(choice) }).unwrap();
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
