//! Freezing and infecting live processes, and putting everything back.

#![expect(clippy::print_stdout, reason = "says how long it took")]

#[path = "target/victim.rs"]
mod victim;

use std::fs::File;
use std::io::Read;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use memckpt::addr::{Addr, AddrRange, PAGE_SIZE};
use memckpt::target::{
    self, FreezeError, Frozen, GrabError, InfectError, InfectRefusal, Infected, Injection,
};
use victim::{Victim, eventually};

const TIMEOUT: Duration = Duration::from_secs(10);
const EVERY_KIND: &str = "fmswrrt";

fn grab(infected: &mut Infected<'_>, ranges: &[AddrRange]) -> Result<Vec<u8>, GrabError> {
    let mut bytes = Vec::new();
    infected.grab(ranges, &mut |pipe: BorrowedFd<'_>, len| {
        let mut file = File::from(pipe.try_clone_to_owned()?);
        let read = (&mut file).take(len).read_to_end(&mut bytes)?;
        assert_eq!(read as u64, len);
        Ok(())
    })?;
    Ok(bytes)
}

/// The whole procedure; how long it took from the first SEIZE until all ran again.
fn checkpoint(victim: &Victim, userfaultfd: bool) -> Result<Duration> {
    let injection = Injection::prepare(victim.pid())?;
    let range = victim.memory();
    target::on_tracer_thread(|| {
        let start = Instant::now();
        let mut frozen = Frozen::freeze(victim.pid(), TIMEOUT)?;
        let mut infected = frozen.infect(injection)?;
        let bytes = grab(&mut infected, &[range])?;
        if userfaultfd {
            infected.userfaultfd()?;
        }
        infected.cure()?;
        frozen.thaw();
        let took = start.elapsed();
        ensure!(bytes == Victim::content(0, bytes.len()) && bytes.len() as u64 == range.len(), "wrong bytes");
        Ok(took)
    })
}

#[test]
fn two_hundred_times_and_nobody_notices() -> Result<()> {
    let victim = Victim::start(EVERY_KIND, 0)?;
    let before = victim.belongings()?;
    for round in 0..200 {
        checkpoint(&victim, round % 2 == 0).with_context(|| format!("round {round}"))?;
        victim.progresses()?;
    }
    victim.has(&before)?;
    assert_eq!(victim.state().interrupted.load(Relaxed), 0, "EINTR");
    victim.finish()
}

/// Microseconds from the first SEIZE: all stopped, parasite listening, 1 MiB read from pipes, cured, all running.
fn stages(victim: &Victim) -> Result<[u128; 5]> {
    let injection = Injection::prepare(victim.pid())?;
    target::on_tracer_thread(|| {
        let start = Instant::now();
        let at = || start.elapsed().as_micros();
        let mut frozen = Frozen::freeze(victim.pid(), TIMEOUT)?;
        let stopped = at();
        let mut infected = frozen.infect(injection)?;
        let listening = at();
        grab(&mut infected, &[victim.memory()])?;
        let grabbed = at();
        infected.cure()?;
        let cured = at();
        frozen.thaw();
        Ok([stopped, listening, grabbed, cured, at()])
    })
}

#[test]
fn fifty_threads() -> Result<()> {
    for (workers, idle) in [("f", 0), ("fmsw", 46)] {
        let victim = Victim::start(workers, idle)?;
        let before = victim.belongings()?;
        let all: Vec<[u128; 5]> = (0..50).map(|_| stages(&victim)).collect::<Result<_>>()?;
        let median = |stage: usize| {
            let mut times: Vec<u128> = all.iter().map(|t| t[stage]).collect();
            times.sort_unstable();
            times[times.len() / 2]
        };
        let [stopped, listening, grabbed, cured, resumed] = [0, 1, 2, 3, 4].map(median);
        println!(
            "{} threads, us: stopped {stopped}, infected {listening}, 1 MiB grabbed {grabbed}, cured {cured}, resumed {resumed}",
            idle + workers.len()
        );
        victim.has(&before)?;
        victim.progresses()?;
    }
    Ok(())
}

#[test]
fn sparse_ranges_come_in_order() -> Result<()> {
    let victim = Victim::start("f", 0)?;
    let start = victim.memory().start;
    let page = |n: u64| AddrRange::with_len(start.saturating_add(n * PAGE_SIZE), PAGE_SIZE);
    let odd: Vec<AddrRange> = (0..256).filter(|n| n % 2 == 1).map(page).collect();
    // Many times over, for more than one batch of pipes and of iovecs.
    let ranges: Vec<AddrRange> = odd.iter().copied().cycle().take(20_000).collect();
    let injection = Injection::prepare(victim.pid())?;
    let bytes = target::on_tracer_thread(|| -> Result<_> {
        let mut frozen = Frozen::freeze(victim.pid(), TIMEOUT)?;
        let mut infected = frozen.infect(injection)?;
        let bytes = grab(&mut infected, &ranges)?;
        infected.cure()?;
        Ok(bytes)
    })?;
    assert_eq!(bytes.len(), 20_000 * PAGE_SIZE as usize);
    for (range, bytes) in ranges.iter().zip(bytes.chunks(PAGE_SIZE as usize)) {
        let offset = range.start.get() - start.get();
        assert!(bytes == Victim::content(offset, bytes.len()), "page at {offset:#x}");
    }
    victim.progresses()
}

#[test]
fn a_bad_page_is_named_and_harmless() -> Result<()> {
    let victim = Victim::start("fs", 0)?;
    let before = victim.belongings()?;
    let good = victim.memory();
    let bad = AddrRange::new(0x1000, 0x2000);
    let injection = Injection::prepare(victim.pid())?;
    target::on_tracer_thread(|| -> Result<_> {
        let mut frozen = Frozen::freeze(victim.pid(), TIMEOUT)?;
        let mut infected = frozen.infect(injection)?;
        let error = grab(&mut infected, &[good, bad, good]).err().context("grabbed what is not there")?;
        assert!(matches!(error, GrabError::Page { address: Addr(0x1000), .. }), "{error:?}");
        let bytes = grab(&mut infected, &[good])?;
        assert!(bytes == Victim::content(0, bytes.len()));
        infected.cure()?;
        Ok(())
    })?;
    victim.has(&before)?;
    victim.progresses()?;
    victim.finish()
}

#[test]
fn dropping_an_infection_cures_it() -> Result<()> {
    let victim = Victim::start(EVERY_KIND, 0)?;
    let before = victim.belongings()?;
    for _ in 0..20 {
        let injection = Injection::prepare(victim.pid())?;
        target::on_tracer_thread(|| -> Result<_> {
            let mut frozen = Frozen::freeze(victim.pid(), TIMEOUT)?;
            let mut infected = frozen.infect(injection)?;
            grab(&mut infected, &[victim.memory()])?;
            Ok(())
        })?;
        victim.has(&before)?;
        victim.progresses()?;
    }
    victim.finish()
}

#[test]
fn a_tracer_thread_that_ends_releases_everything() -> Result<()> {
    let victim = Victim::start(EVERY_KIND, 0)?;
    let before = victim.belongings()?;
    for _ in 0..20 {
        let injection = Injection::prepare(victim.pid())?;
        // As at a panic in the middle, but destructors do not even run.
        std::thread::scope(|scope| {
            scope.spawn(|| -> Result<()> {
                let mut frozen = Frozen::freeze(victim.pid(), TIMEOUT)?;
                let mut infected = frozen.infect(injection)?;
                grab(&mut infected, &[victim.memory()])?;
                std::mem::forget(infected);
                std::mem::forget(frozen);
                Ok(())
            });
        });
        victim.progresses()?;
        victim.has(&before)?;
    }
    victim.finish()
}

#[test]
fn a_long_sleep_left_in_a_parasite_is_taken_over() -> Result<()> {
    let victim = Victim::start("z", 0)?;
    let before = victim.belongings()?;
    for _ in 0..3 {
        // Into the first third of a sleep.
        victim.progresses()?;
        let injection = Injection::prepare(victim.pid())?;
        std::thread::scope(|scope| {
            let tracer = scope.spawn(|| -> Result<()> {
                let mut frozen = Frozen::freeze(victim.pid(), TIMEOUT)?;
                let infected = frozen.infect(injection)?;
                std::mem::forget(infected);
                std::mem::forget(frozen);
                Ok(())
            });
            tracer.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })?;
        eventually("it sleeps on", || {
            victim.status(victim.pid(), "State").is_ok_and(|s| s.starts_with('S'))
        })?;
        ensure!(victim.belongings()? != before, "nothing was left: not the case that this is about");
        let injection = Injection::prepare(victim.pid())?;
        target::on_tracer_thread(|| -> Result<()> {
            let mut frozen = Frozen::freeze(victim.pid(), TIMEOUT)?;
            let regs = frozen.registers(victim.pid())?.regs;
            ensure!(regs.orig_rax == libc::SYS_clock_nanosleep as u64, "in call {}", regs.orig_rax);
            frozen.infect(injection)?.cure()?;
            Ok(())
        })?;
        victim.has(&before)?;
    }
    victim.progresses()?;
    assert_eq!(victim.state().interrupted.load(Relaxed), 0, "EINTR");
    victim.finish()
}

#[test]
fn registers_of_all_threads_stay_those_of_the_target() -> Result<()> {
    let victim = Victim::start("fmsw", 3)?;
    let injection = Injection::prepare(victim.pid())?;
    target::on_tracer_thread(|| -> Result<_> {
        let mut frozen = Frozen::freeze(victim.pid(), TIMEOUT)?;
        assert_eq!(frozen.threads().len(), 7);
        let all = |frozen: &Frozen| {
            let threads = frozen.threads().iter();
            threads.map(|&tid| frozen.registers(tid)).collect::<Result<Vec<_>, _>>()
        };
        let before = all(&frozen)?;
        let infected = frozen.infect(injection)?;
        let during = all(infected.frozen())?;
        infected.cure()?;
        let after = all(&frozen)?;
        for ((a, b), c) in before.iter().zip(&during).zip(&after) {
            let key = |r: &target::ThreadRegisters| {
                let g = &r.regs;
                let general =
                    [g.rip, g.rsp, g.rax, g.orig_rax, g.rbx, g.rcx, g.rdi, g.r11, g.eflags, g.fs_base];
                (r.tid, general, r.sigmask, r.robust_list, r.rseq, r.xstate.clone())
            };
            assert_eq!(key(a), key(b));
            assert_eq!(key(a), key(c));
            assert!(a.rseq.is_some() && a.robust_list.head != 0 && a.xstate.len() >= 576);
        }
        Ok(())
    })?;
    victim.progresses()
}

#[test]
fn a_stopped_process_stays_stopped() -> Result<()> {
    let victim = Victim::start(EVERY_KIND, 0)?;
    let before = victim.belongings()?;
    let stopped = || victim.status(victim.pid(), "State").is_ok_and(|s| s.starts_with('T'));
    for _ in 0..20 {
        victim.signal(libc::SIGSTOP);
        eventually("stopped", stopped)?;
        checkpoint(&victim, true)?;
        eventually("stopped again, untraced", || {
            stopped() && victim.status(victim.pid(), "TracerPid").is_ok_and(|t| t == "0")
        })?;
        victim.signal(libc::SIGCONT);
        victim.progresses()?;
        victim.has(&before)?;
    }
    victim.finish()
}

#[test]
fn stops_and_continues_from_outside_do_not_disturb() -> Result<()> {
    let victim = Victim::start(EVERY_KIND, 0)?;
    let before = victim.belongings()?;
    let over = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| -> Result<()> {
        scope.spawn(|| {
            while !over.load(Relaxed) {
                for signal in [libc::SIGSTOP, libc::SIGCONT] {
                    victim.signal(signal);
                    std::thread::sleep(Duration::from_micros(700));
                }
            }
        });
        let result = (0..60).try_for_each(|_| checkpoint(&victim, false).map(drop));
        over.store(true, Relaxed);
        result
    })?;
    victim.signal(libc::SIGCONT);
    victim.progresses()?;
    victim.has(&before)?;
    victim.finish()
}

#[test]
fn left_stopped_means_stopped_and_untraced() -> Result<()> {
    let victim = Victim::start(EVERY_KIND, 0)?;
    target::on_tracer_thread(|| {
        Frozen::freeze(victim.pid(), TIMEOUT)?.leave_stopped().map_err(anyhow::Error::from)
    })?;
    assert_eq!(victim.status(victim.pid(), "TracerPid")?, "0");
    eventually("stopped", || {
        victim.status(victim.pid(), "State").is_ok_and(|s| s.starts_with("T (stopped"))
    })?;
    victim.signal(libc::SIGCONT);
    victim.progresses()
}

#[test]
fn killing_ends_the_process() -> Result<()> {
    let victim = Victim::start("fs", 0)?;
    target::on_tracer_thread(|| Frozen::freeze(victim.pid(), TIMEOUT)?.kill().map_err(anyhow::Error::from))?;
    eventually("dead", || victim.status(victim.pid(), "State").is_ok_and(|s| s.starts_with('Z')))
}

#[test]
fn a_vfork_parent_is_named_and_everything_released() -> Result<()> {
    let program = format!("{}/vforker", env!("MEMCKPT_VICTIMS"));
    let mut child = std::process::Command::new(program).spawn()?;
    let pid = child.id() as i32;
    let task = |tid: i32, file: &str| std::fs::read_to_string(format!("/proc/{pid}/task/{tid}/{file}"));
    let waits = || task(pid, "wchan").is_ok_and(|place| place.contains("vfork") || place.contains("clone"));
    eventually("it has called vfork", || {
        waits() && task(pid, "status").is_ok_and(|s| s.contains("State:\tD"))
    })?;
    let error =
        target::on_tracer_thread(|| Frozen::freeze(pid, Duration::from_millis(200)).map(Frozen::thaw));
    match error {
        Err(FreezeError::Timeout { tid, reason, .. }) => {
            assert_eq!(tid, pid);
            assert!(reason.contains("vfork") && reason.contains("of the child, process"), "{reason}");
        }
        other => panic!("{other:?}"),
    }
    eventually("everything released", || {
        let tids = std::fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten();
        let mut tids = tids.filter_map(|e| e.ok()?.file_name().to_str()?.parse().ok());
        tids.all(|tid| task(tid, "status").is_ok_and(|s| s.contains("TracerPid:\t0")))
    })?;
    child.kill()?;
    child.wait()?;
    Ok(())
}

#[test]
fn seccomp_decides_by_what_the_filter_says() -> Result<()> {
    let allowing = Victim::start("!fs", 0)?;
    checkpoint(&allowing, true)?;
    allowing.progresses()?;
    let denying = Victim::start("-fs", 0)?;
    let error = checkpoint(&denying, false).err().context("infected in spite of the filter")?;
    match error.downcast_ref::<InfectError>() {
        Some(InfectError::Refused(InfectRefusal::SeccompForbids(call))) => assert_eq!(*call, libc::SYS_shmat),
        other => panic!("{other:?}"),
    }
    denying.progresses()
}

#[test]
fn a_single_thread_on_a_tiny_stack() -> Result<()> {
    let victim = Victim::start("t", 0)?;
    let before = victim.belongings()?;
    for _ in 0..50 {
        checkpoint(&victim, true)?;
        victim.progresses()?;
    }
    victim.has(&before)?;
    victim.finish()
}

#[test]
fn the_userfaultfd_is_the_targets() -> Result<()> {
    let victim = Victim::start("fs", 0)?;
    let injection = Injection::prepare(victim.pid())?;
    let before = victim.belongings()?;
    let fd = target::on_tracer_thread(|| -> Result<_> {
        let mut frozen = Frozen::freeze(victim.pid(), TIMEOUT)?;
        let mut infected = frozen.infect(injection)?;
        let fd = infected.userfaultfd()?;
        infected.cure()?;
        Ok(fd)
    })?;
    let link = std::fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd()))?;
    ensure!(link.to_string_lossy().contains("userfaultfd"), "{link:?}");
    victim.has(&before)?;
    victim.progresses()
}

#[test]
fn of_another_user_and_by_that_user() -> Result<()> {
    use std::os::unix::process::CommandExt;
    const NOBODY: u32 = 65534;
    let victim = Victim::start_with(EVERY_KIND, 0, |command| {
        command.uid(NOBODY).gid(NOBODY);
    })?;
    let before = victim.belongings()?;
    for _ in 0..10 {
        checkpoint(&victim, true)?;
        victim.progresses()?;
    }
    let range = victim.memory();
    let arguments = [victim.pid() as u64, range.start.get(), range.len(), 10].map(|n| n.to_string());
    let mut injector = std::process::Command::new(env!("CARGO_BIN_EXE_injector"));
    let output = injector.args(arguments).uid(NOBODY).gid(NOBODY).output()?;
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    victim.has(&before)?;
    victim.progresses()?;
    victim.finish()
}

#[test]
fn in_an_ipc_namespace_of_its_own() -> Result<()> {
    use std::os::unix::process::CommandExt;
    let victim = Victim::start_with(EVERY_KIND, 0, |command| {
        let unshare = || nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWIPC).map_err(Into::into);
        // SAFETY: unshare is async-signal-safe.
        unsafe { command.pre_exec(unshare) };
    })?;
    let before = victim.belongings()?;
    for _ in 0..10 {
        checkpoint(&victim, true)?;
        victim.progresses()?;
    }
    assert_eq!(target::sweep(victim.pid())?, 0);
    drop(Injection::prepare(victim.pid())?);
    assert_eq!(target::sweep(victim.pid())?, 0, "an unused segment was left");
    victim.has(&before)?;
    victim.finish()
}

#[test]
fn gone_and_traced_processes_are_refused() -> Result<()> {
    let error = target::on_tracer_thread(|| Frozen::freeze(i32::MAX, TIMEOUT).map(Frozen::thaw));
    assert!(matches!(error, Err(FreezeError::Gone { .. })), "{error:?}");
    let victim = Victim::start("f", 0)?;
    target::on_tracer_thread(|| -> Result<()> {
        let _frozen = Frozen::freeze(victim.pid(), TIMEOUT)?;
        let second = target::on_tracer_thread(|| Frozen::freeze(victim.pid(), TIMEOUT).map(Frozen::thaw));
        match second {
            Err(FreezeError::Seize { traced, .. }) => assert!(traced.contains("traced by"), "{traced}"),
            other => panic!("{other:?}"),
        }
        Ok(())
    })?;
    victim.progresses()
}
