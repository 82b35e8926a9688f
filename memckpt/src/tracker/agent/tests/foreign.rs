//! Writes by others.

use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::*;

for_each_family!(
    foreign_calls_are_events,
    a_call_under_way_is_being_written_until_it_returns,
    a_call_that_is_killed_is_over,
);

fn attach_foreign(name: &str, victim: &Victim, choice: HookChoice) -> Option<Agent> {
    let agent = attach(name, victim, choice)?;
    if !agent.hooks().knows(Fact::ForeignWrites) {
        skip(name, "no per-VMA locks, and so no hook on the mmap lock; no fexit on what others go through");
        return None;
    }
    Some(agent)
}

fn foreign_calls_are_events(name: &str, choice: HookChoice) {
    let victim = Victim::start();
    let arena = victim.arena(2);
    let Some(mut agent) = attach_foreign(name, &victim, choice) else { return };
    vm_write(&victim, arena.at(0));
    mem_write(&victim, arena.at(1));
    std::fs::write(format!("/proc/{}/clear_refs", victim.pid), "4").unwrap();
    let events = drained(&mut agent);
    let of =
        |kind| -> Vec<_> { events.iter().filter(|e| e.kind == kind).flat_map(LayoutEvent::ranges).collect() };
    let mut written = of(EventKind::ProcessVmWrite);
    // A fault that waits lets go of the lock, and is told again.
    written.dedup();
    assert_eq!(written, [range(arena.at(0), 1), range(arena.at(1), 1)], "{events:?}");
    let cleared = events.iter().any(|e| e.kind == EventKind::ClearRefs);
    assert_eq!(cleared, agent.hooks().knows(Fact::ForeignClears), "{events:?}");
    assert!(events.iter().all(|e| agent.is_own(e)), "{events:?}");
    assert_eq!(agent.being_written(), [], "all are over");
}

/// A page of our own whose first access waits until it is let go.
struct Gate {
    uffd: OwnedFd,
    page: u64,
}

impl Gate {
    /// `None` where userfaultfd is missing, or not for us.
    fn new() -> Option<Self> {
        const UFFDIO_API: u64 = 0xC018_AA3F;
        const UFFDIO_REGISTER: u64 = 0xC020_AA00;
        // SAFETY: new descriptor, new mapping; the structures are those of linux/userfaultfd.h.
        unsafe {
            let fd = libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC) as i32;
            if fd < 0 {
                return None;
            }
            let uffd = OwnedFd::from_raw_fd(fd);
            let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
            let page = libc::mmap(std::ptr::null_mut(), 4096, libc::PROT_READ, flags, -1, 0) as u64;
            assert_eq!(libc::ioctl(fd, UFFDIO_API, [0xAAu64, 0, 0].as_mut_ptr()), 0);
            assert_eq!(libc::ioctl(fd, UFFDIO_REGISTER, [page, 4096, 1, 0].as_mut_ptr()), 0);
            Some(Self { uffd, page })
        }
    }

    fn open(&self) {
        const UFFDIO_ZEROPAGE: u64 = 0xC020_AA04;
        let mut range = [self.page, 4096, 0, 0];
        // SAFETY: a zero page into our own registered range.
        let result = unsafe { libc::ioctl(self.uffd.as_raw_fd(), UFFDIO_ZEROPAGE, range.as_mut_ptr()) };
        assert_eq!(result, 0);
    }

    /// Writes 8 bytes from behind it to `address` in the victim.
    fn write(&self, victim: &Victim, address: u64) -> JoinHandle<isize> {
        let (pid, page) = (victim.pid, self.page);
        std::thread::spawn(move || write_from(pid, page, address))
    }
}

impl Drop for Gate {
    fn drop(&mut self) {
        // SAFETY: our own mapping.
        unsafe { libc::munmap(self.page as *mut _, 4096) };
    }
}

fn write_from(pid: i32, local: u64, address: u64) -> isize {
    let local = libc::iovec { iov_base: local as *mut _, iov_len: 8 };
    let remote = libc::iovec { iov_base: address as *mut _, iov_len: 8 };
    // SAFETY: reads our own mapped page; writes into the victim.
    unsafe { libc::process_vm_writev(pid, &raw const local, 1, &raw const remote, 1, 0) }
}

fn wait_for_write(agent: &mut Agent) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while !drained(agent).iter().any(|e| e.kind == EventKind::ProcessVmWrite) {
        assert!(Instant::now() < deadline, "the call never got to the target");
        std::thread::yield_now();
    }
}

fn a_call_under_way_is_being_written_until_it_returns(name: &str, choice: HookChoice) {
    let victim = Victim::start();
    let arena = victim.arena(2);
    let Some(gate) = Gate::new() else { return skip(name, "no userfaultfd for faults of the kernel") };
    let Some(mut agent) = attach_foreign(name, &victim, choice) else { return };
    let call = gate.write(&victim, arena.at(0));
    wait_for_write(&mut agent);
    // One more, by another, and over at once.
    vm_write(&victim, arena.at(1));
    for _ in 0..3 {
        assert_eq!(agent.being_written(), [range(arena.at(0), 1)]);
        drained(&mut agent);
    }
    gate.open();
    assert_eq!(call.join().unwrap(), 8);
    assert_eq!(agent.being_written(), []);
    assert_eq!(agent.losses(), Losses::default());
}

fn a_call_that_is_killed_is_over(name: &str, choice: HookChoice) {
    let victim = Victim::start();
    let arena = victim.arena(1);
    if Gate::new().is_none() {
        return skip(name, "no userfaultfd for faults of the kernel");
    }
    let Some(mut agent) = attach_foreign(name, &victim, choice) else { return };
    // SAFETY: the child makes system calls only, as the parent has threads; nobody opens its gate.
    let child = unsafe {
        let child = libc::fork();
        if child == 0 {
            libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
            if let Some(gate) = Gate::new() {
                write_from(victim.pid, gate.page, arena.at(0));
            }
            libc::_exit(1);
        }
        child
    };
    wait_for_write(&mut agent);
    assert_eq!(agent.being_written(), [range(arena.at(0), 1)]);
    // SAFETY: our own child, not waited for yet.
    unsafe {
        libc::kill(child, libc::SIGKILL);
        libc::waitpid(child, std::ptr::null_mut(), 0);
    }
    assert_eq!(agent.being_written(), []);
}
