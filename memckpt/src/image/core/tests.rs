use super::*;
use crate::image::record;

/// The second thread of a real process as CRIU wrote it: a clock_nanosleep that was interrupted.
fn regs() -> libc::user_regs_struct {
    // SAFETY: the struct holds integers only, for which all zeroes are valid.
    let mut regs: libc::user_regs_struct = unsafe { std::mem::zeroed() };
    regs.r15 = 0x7fe5_a9eb_7000;
    regs.rbx = 0x7fe5_aa6b_76c0;
    regs.r11 = 0x293;
    regs.rax = -516_i64 as u64;
    regs.rcx = 0x7fe5_aa98_a545;
    regs.orig_rax = 0xe6;
    regs.rip = 0x7fe5_aa98_a545;
    regs.cs = 0x33;
    regs.eflags = 0x293;
    regs.rsp = 0x7fe5_aa6b_6e60;
    regs.ss = 0x2b;
    regs.fs_base = 0x7fe5_aa6b_76c0;
    regs
}

fn thread(xstate: &[u8]) -> ThreadState<'_> {
    ThreadState {
        regs: regs(),
        xstate,
        blocked: 0,
        clear_tid_addr: 0x7fe5_aa6b_7990,
        robust_list: (140_624_383_408_544, 24),
        rseq: Some(Rseq { pointer: 140_624_383_410_144, size: 32, signature: 1_392_848_979 }),
        sigaltstack: Some((0, 0, 2)),
        sched: Some((0, 0, 0)),
        creds: None,
        comm: "t".into(),
        pdeath_signal: 0,
        pending: None,
        seccomp: None,
    }
}

#[test]
fn a_thread_is_recorded_as_criu_records_it() {
    let xstate = vec![0; 832];
    let entry = core_entry(&thread(&xstate), None, &XsaveLayout::of_this_processor()).unwrap();
    let read: CoreEntry = record::single("core-1.img", ImageKind::Core, &encode(&entry)).unwrap();
    assert_eq!(read, entry);
    let info = read.thread_info.unwrap();
    let regs = &info.gpregs;
    assert_eq!(info.clear_tid_addr, 0x7fe5_aa6b_7990);
    assert_eq!((regs.ax, regs.orig_ax, regs.ip), (0xffff_ffff_ffff_fffc, 0xe6, 0x7fe5_aa98_a545));
    assert_eq!((regs.r15, regs.bx, regs.sp), (0x7fe5_a9eb_7000, 0x7fe5_aa6b_76c0, 0x7fe5_aa6b_6e60));
    assert_eq!((regs.cs, regs.ss, regs.fs_base, regs.mode), (0x33, 0x2b, 0x7fe5_aa6b_76c0, Some(1)));
    assert_eq!(info.tls.iter().map(|tls| tls.entry_number).collect::<Vec<_>>(), [12, 13, 14]);
    assert!(info.tls.iter().all(|tls| tls.read_exec_only && tls.seg_not_present && !tls.usable));
    let thread = read.thread_core.unwrap();
    assert_eq!((thread.futex_rla, thread.futex_rla_len), (140_624_383_408_544, 24));
    assert_eq!((thread.sched_nice, thread.sched_policy, thread.sched_prio), (Some(0), Some(0), None));
    assert_eq!(thread.rseq_entry.map(|rseq| rseq.signature), Some(1_392_848_979));
    assert!(read.tc.is_none());
}

#[test]
fn interrupted_system_calls_are_made_again_and_others_are_left_alone() {
    let settled = |rax: i64, orig: i64| {
        let mut regs = regs();
        (regs.rax, regs.orig_rax) = (rax as u64, orig as u64);
        let regs = gpregs(regs);
        (regs.ax as i64, regs.ip == 0x7fe5_aa98_a545 - 2)
    };
    for code in [-512, -513, -514] {
        assert_eq!(settled(code, 7), (7, true));
    }
    assert_eq!(settled(-516, 7), (-4, false));
    let mut wait = regs();
    (wait.rax, wait.orig_rax, wait.rdx) = (-516_i64 as u64, libc::SYS_poll as u64, u64::from(u32::MAX));
    assert_eq!(gpregs(wait).ax as i64, libc::SYS_poll, "a wait without end");
    wait.rdx = 100;
    assert_eq!(gpregs(wait).ax as i64, -4);
    (wait.orig_rax, wait.rsi) = (libc::SYS_futex as u64, 128 | 9);
    assert_eq!(gpregs(wait).ax as i64, libc::SYS_futex, "a wait until a point in time");
    wait.rsi = 128;
    assert_eq!(gpregs(wait).ax as i64, -4);
    assert_eq!(settled(-512, -1), (-512, false));
    assert_eq!(settled(-4, 7), (-4, false));
    assert_eq!(settled(100, 7), (100, false));
}
