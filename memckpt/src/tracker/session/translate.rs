//! What the agent's events mean to the model.

use libc::{SYS_ioctl, SYS_pread64, SYS_preadv, SYS_process_vm_readv, SYS_read, SYS_readv};

use super::record::Observed;
use crate::addr::{Addr, AddrRange};
use crate::tracker::agent::{EventKind, LayoutEvent, Remap};
use crate::tracker::model::{Change, EVERYTHING, Explains};

/// UFFDIO_REGISTER and UFFDIO_UNREGISTER (linux/userfaultfd.h).
const REGISTER: u64 = 0xC020_AA00;
const UNREGISTER: u64 = 0x8010_AA01;
/// Calls that only look at another process's memory.
const FOREIGN_READS: [i64; 5] = [SYS_read, SYS_pread64, SYS_readv, SYS_preadv, SYS_process_vm_readv];
/// shmat's SHM_REMAP (linux/shm.h): takes the place of what is there.
const SHM_REMAP: u64 = 0o40000;

/// Appends what `event` means. `userfaultfd`: the number of our own descriptor, if we made the call: registrations take
/// the mm's lock, whoever makes them.
pub(super) fn translate(event: &LayoutEvent, userfaultfd: Option<i32>, out: &mut Vec<Observed>) {
    let nothing = |explains| Observed::Layout { change: Change::Attributes(AddrRange::new(0, 0)), explains };
    if is_own_registration(event, userfaultfd) {
        // The ranges are read again by whoever registered them; only the one write lock must be accounted for.
        out.push(nothing(lock(event)));
        return;
    }
    match event.kind {
        EventKind::Exec => out.push(Observed::Exec),
        EventKind::Exit => out.push(Observed::Exit),
        EventKind::Userfaultfd => {
            if event.result >= 0 {
                out.push(Observed::Userfaultfd);
            }
            out.push(nothing(if event.is_by_lock() { lock(event) } else { Explains::Moves(1) }));
        }
        EventKind::ClearRefs => {
            out.push(Observed::ClearRefs);
            out.push(nothing(lock(event)));
        }
        _ => {
            if event.kind == EventKind::IoUringSetup {
                out.push(Observed::IoUring);
            }
            if is_ioctl(event, REGISTER) {
                // Of a userfaultfd of the target's that another process was given.
                out.push(Observed::Userfaultfd);
            }
            let mut explains = explains(event);
            for change in changes(event) {
                let explains = std::mem::replace(&mut explains, Explains::Nothing);
                out.push(Observed::Layout { change, explains });
            }
        }
    }
}

fn is_ioctl(event: &LayoutEvent, command: u64) -> bool {
    i64::from(event.call) == SYS_ioctl && event.args[1] & 0xffff_ffff == command
}

fn is_own_registration(event: &LayoutEvent, userfaultfd: Option<i32>) -> bool {
    (is_ioctl(event, REGISTER) || is_ioctl(event, UNREGISTER))
        && userfaultfd.and_then(|fd| u64::try_from(fd).ok()) == Some(event.args[0] & 0xffff_ffff)
}

/// What of the generation's movement the event's change accounts for.
fn explains(event: &LayoutEvent) -> Explains {
    if event.call != 0 && event.lock == 0 && !event.is_by_lock() && event.kind != EventKind::ProcessVmWrite {
        // Told at its return: the agent moves the generation once then; the call itself takes the write lock once.
        return Explains::Moves(1 + u64::from(takes_write_lock(event)));
    }
    match event.kind {
        // The lock was that of a stack that grew.
        EventKind::ProcessVmWrite => Explains::Nothing,
        // These read user memory, and a stack may grow from that, which has nothing to do with the event's range.
        EventKind::Flags => Explains::Nothing,
        _ if !event.is_of_the_call() => Explains::Nothing,
        _ => lock(event),
    }
}

fn lock(event: &LayoutEvent) -> Explains {
    match event.lock {
        0 => Explains::Nothing,
        number => Explains::Lock(number),
    }
}

fn takes_write_lock(event: &LayoutEvent) -> bool {
    let certain = match event.kind {
        EventKind::Madvise(advice) => matches!(advice_of(advice), Advice::Flags),
        EventKind::Mmap
        | EventKind::Munmap
        | EventKind::Mremap
        | EventKind::Brk
        | EventKind::Mprotect
        | EventKind::Shmat
        | EventKind::Shmdt => true,
        _ => false,
    };
    // A call that failed may have done so before it took the lock. What is not explained is read again: only that.
    certain && event.result >= 0
}

fn changes(event: &LayoutEvent) -> Vec<Change> {
    let [a0, a1, a2, ..] = event.args;
    let span = |start: u64, len: u64| AddrRange::with_len(Addr(start), len);
    let each = |make: fn(AddrRange) -> Change| event.ranges().into_iter().map(make).collect();
    let failed = event.result < 0;
    match event.kind {
        EventKind::Mmap | EventKind::Munmap | EventKind::Mremap | EventKind::Shmat if event.is_by_lock() => {
            changes_by_lock(event)
        }
        // Part of the work may be done; nothing is certain to be gone.
        EventKind::Mmap | EventKind::Munmap | EventKind::Mremap if failed => each(Change::Unclear),
        EventKind::Mmap => vec![Change::Replaced(span(event.result.unsigned_abs(), a1))],
        EventKind::Munmap => vec![Change::Replaced(span(a0, a1))],
        EventKind::Mremap => {
            vec![Change::Moved { from: span(a0, a1), to: span(event.result.unsigned_abs(), a2) }]
        }
        EventKind::Brk => vec![Change::Replaced(AddrRange::new(a1.min(a2), a1.max(a2)))],
        EventKind::Mprotect | EventKind::Flags => each(Change::Attributes),
        EventKind::Madvise(advice) => each(match advice_of(advice) {
            Advice::Nothing => return Vec::new(),
            Advice::Flags => Change::Attributes,
            Advice::Free => Change::Freed,
            Advice::Drop => Change::Dropped,
            Advice::Unknown => Change::Unclear,
        }),
        EventKind::RemapFilePages => each(Change::Nonlinear),
        // The length is in no argument: the whole layout is read again, and what is new or gone found by comparing.
        // Without SHM_REMAP nothing that was there is replaced.
        EventKind::Shmat if a2 & SHM_REMAP == 0 || failed => vec![Change::Attributes(EVERYTHING)],
        EventKind::Shmdt | EventKind::AioSetup | EventKind::AioDestroy | EventKind::Prctl => {
            vec![Change::Attributes(EVERYTHING)]
        }
        EventKind::ProcessVmWrite => each(Change::Written),
        EventKind::Zap => each(Change::Dropped),
        EventKind::IoUringSetup | EventKind::IoUringRegister => Vec::new(),
        // Another process read unmapped memory of the target: the kernel took the lock to see whether a stack should
        // grow (get_user_pages_remote(), mm/gup.c). Nothing was written.
        EventKind::Unknown if FOREIGN_READS.contains(&i64::from(event.call)) => {
            vec![Change::Attributes(EVERYTHING)]
        }
        EventKind::Shmat
        | EventKind::Unknown
        | EventKind::Exec
        | EventKind::Exit
        | EventKind::Userfaultfd
        | EventKind::ClearRefs => vec![Change::Everything],
    }
}

/// Of a call whose result is not known: nothing is certain to be gone, and what came into being lies in a hole unless the
/// arguments say otherwise. A hole counts as changed too: it may have come about unseen.
fn changes_by_lock(event: &LayoutEvent) -> Vec<Change> {
    let whole_layout = Change::Attributes(EVERYTHING);
    match event.kind {
        EventKind::Munmap => event.ranges().into_iter().map(Change::Unclear).collect(),
        EventKind::Mremap => match event.remapped() {
            Remap::Tail(tail) => vec![Change::Unclear(tail)],
            Remap::Moved { from, to, exact } => vec![Change::MaybeMoved { from, to, exact }],
            Remap::Unknown(from) => vec![Change::Unclear(from), whole_layout],
        },
        EventKind::Shmat if event.args[2] & SHM_REMAP != 0 => vec![Change::Everything],
        EventKind::Shmat => event.found().map(Change::Unclear).into_iter().chain([whole_layout]).collect(),
        _ => {
            let hint = event.is_placed_by_hint().then_some(whole_layout);
            event.placed().map(Change::Unclear).into_iter().chain(hint).collect()
        }
    }
}

/// What a madvise call may do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Advice {
    /// Neither the layout nor contents change.
    Nothing,
    /// VMA flags change, and so VMAs may split or merge.
    Flags,
    /// Pages may be dropped at any later time.
    Free,
    /// Pages are dropped now.
    Drop,
    /// Not known to this memckpt.
    Unknown,
}

/// madvise(2), include/uapi/asm-generic/mman-common.h as of Linux 6.18.
fn advice_of(advice: i32) -> Advice {
    match advice {
        // WILLNEED, COLD, PAGEOUT, POPULATE_READ, POPULATE_WRITE, COLLAPSE, and UNMERGEABLE's break-up of pages.
        3 | 20 | 21 | 22 | 23 | 25 => Advice::Nothing,
        // NORMAL, RANDOM, SEQUENTIAL, DONTFORK, DOFORK, MERGEABLE, UNMERGEABLE, HUGEPAGE, NOHUGEPAGE, DONTDUMP,
        // DODUMP, WIPEONFORK, KEEPONFORK.
        0..=2 | 10..=19 => Advice::Flags,
        8 => Advice::Free,
        // DONTNEED, REMOVE, DONTNEED_LOCKED, HWPOISON, SOFT_OFFLINE, GUARD_INSTALL, GUARD_REMOVE.
        4 | 9 | 24 | 100..=103 => Advice::Drop,
        _ => Advice::Unknown,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::tracker::session::record::Observed::Layout;

    fn of(kind: serde_json::Value, call: i64, args: [u64; 6], result: i64) -> Vec<Observed> {
        let event =
            json!({"kind": kind, "tgid": 1, "call": call, "args": args, "result": result, "range": null});
        let mut out = Vec::new();
        match serde_json::from_value(event) {
            Ok(event) => translate(&event, Some(7), &mut out),
            Err(e) => panic!("{e}"),
        }
        out
    }

    fn r(start: u64, end: u64) -> AddrRange {
        AddrRange::new(start, end)
    }

    #[test]
    fn results_count_and_not_intentions() {
        let mapped = of(json!("mmap"), libc::SYS_mmap, [0, 0x3000, 3, 0x22, u64::MAX, 0], 0x7000);
        assert_eq!(
            mapped,
            [Layout { change: Change::Replaced(r(0x7000, 0xa000)), explains: Explains::Moves(2) }]
        );
        let moved = of(json!("mremap"), libc::SYS_mremap, [0x1000, 0x2000, 0x4000, 1, 0, 0], 0x9000);
        let change = Change::Moved { from: r(0x1000, 0x3000), to: r(0x9000, 0xd000) };
        assert_eq!(moved, [Layout { change, explains: Explains::Moves(2) }]);
        let grown = of(json!("brk"), libc::SYS_brk, [0x5010, 0x3010, 0x5010, 0, 0, 0], 0x5010);
        assert_eq!(
            grown,
            [Layout { change: Change::Replaced(r(0x3010, 0x5010)), explains: Explains::Moves(2) }]
        );
    }

    #[test]
    fn a_failed_fixed_mmap_may_have_unmapped() {
        let args = [0x1000, 0x2000, 3, 0x32, u64::MAX, 0];
        let failed = of(json!("mmap"), libc::SYS_mmap, args, -12);
        assert_eq!(
            failed,
            [Layout { change: Change::Unclear(r(0x1000, 0x3000)), explains: Explains::Moves(1) }]
        );
    }

    #[test]
    fn advice_is_told_apart() {
        let advise = |advice: i32| {
            of(json!({"madvise": advice}), libc::SYS_madvise, [0x1000, 0x1000, advice as u64, 0, 0, 0], 0)
        };
        let range = r(0x1000, 0x2000);
        assert_eq!(
            advise(libc::MADV_FREE),
            [Layout { change: Change::Freed(range), explains: Explains::Moves(1) }]
        );
        assert_eq!(
            advise(libc::MADV_DONTNEED),
            [Layout { change: Change::Dropped(range), explains: Explains::Moves(1) }]
        );
        assert_eq!(
            advise(libc::MADV_DONTFORK),
            [Layout { change: Change::Attributes(range), explains: Explains::Moves(2) }]
        );
        assert_eq!(advise(4711), [Layout { change: Change::Unclear(range), explains: Explains::Moves(1) }]);
        assert_eq!(advise(libc::MADV_WILLNEED), []);
    }

    #[test]
    fn our_own_registrations_are_no_changes_and_others_are() {
        let args = |fd| [fd, 0xC020_AA00, 0, 0, 0, 0];
        let nothing = Layout { change: Change::Attributes(r(0, 0)), explains: Explains::Nothing };
        assert_eq!(of(json!("unknown"), libc::SYS_ioctl, args(7), 0), [nothing]);
        let theirs = of(json!("unknown"), libc::SYS_ioctl, args(8), 0);
        assert!(
            matches!(theirs[..], [Observed::Userfaultfd, Layout { change: Change::Everything, .. }]),
            "{theirs:?}"
        );
    }

    #[test]
    fn shared_memory_is_found_by_comparing_unless_it_replaces() {
        let attached = of(json!("shmat"), libc::SYS_shmat, [1, 0, 0, 0, 0, 0], 0x7000);
        assert_eq!(
            attached,
            [Layout { change: Change::Attributes(EVERYTHING), explains: Explains::Moves(2) }]
        );
        let replaced = of(json!("shmat"), libc::SYS_shmat, [1, 0x7000, SHM_REMAP, 0, 0, 0], 0x7000);
        assert!(matches!(replaced[..], [Layout { change: Change::Everything, .. }]), "{replaced:?}");
    }

    #[test]
    fn a_userfaultfd_that_was_not_made_is_none() {
        let made = of(json!("userfaultfd"), libc::SYS_userfaultfd, [0; 6], 5);
        assert!(made.contains(&Observed::Userfaultfd));
        let refused = of(json!("userfaultfd"), libc::SYS_userfaultfd, [0; 6], -1);
        assert!(!refused.contains(&Observed::Userfaultfd));
    }
}
