//! For each kind of memory: the reassembled chain equals the process's memory, byte for byte, after random dirtying and
//! layout changes between the checkpoints. Twice: by `memckpt show --compare`, and by an oracle that shares no code with it.

use std::path::Path;

use anyhow::{Result, ensure};
use memckpt_tests::features::Tracker;
use memckpt_tests::{Scratch, Victim, memckpt, oracle, quick, skip};
use nix::sys::signal::Signal;

/// Dirties `victim` as step `step` of a chain: much before the first checkpoint, little later.
fn change(victim: &mut Victim, step: u64, layout: bool) -> Result<()> {
    victim.ask(&format!("dirty {} {}", step * 7 + 1, if step == 0 { 2000 } else { 150 }))?;
    if layout {
        victim.ask(&format!("layout {}", step * 13 + 5))?;
        victim.ask(&format!("dirty {} 100", step * 7 + 2))?;
    }
    Ok(())
}

/// watch, pre-dumps, then a dump that leaves the process stopped: compared with it; then it runs on.
fn chain(test: &str, kinds: &str, tracker: Tracker, pre_dump_mode: &str) -> Result<()> {
    if let Some(reason) = tracker.missing() {
        skip(test, reason);
        return Ok(());
    }
    let scratch = Scratch::new()?;
    let mut victim = Victim::start("memory", [kinds.as_ref(), scratch.path().as_os_str()])?;
    let pid = victim.pid().to_string();
    memckpt(["watch", &pid, "--background", "--tracker", tracker.name()]).ok()?;

    let pre_dumps = if quick() { 2 } else { 4 };
    let parent = |step: u64| format!("../{}", step - 1);
    for step in 1..=pre_dumps {
        change(&mut victim, step - 1, step > 1)?;
        let images = scratch.directory(&step.to_string())?;
        let mut pre_dump =
            memckpt(["pre-dump", "-t", &pid, "--pre-dump-mode", pre_dump_mode, "-D"]).arg(&images);
        if step > 1 {
            pre_dump = pre_dump.arg("--prev-images-dir").arg(parent(step));
        }
        pre_dump.ok()?;
    }
    change(&mut victim, pre_dumps, true)?;
    let before = victim.ask("sum")?;
    let last = scratch.directory("dump")?;
    memckpt(["dump", "-t", &pid, "--audit", "--leave-stopped", "--track-mem", "--prev-images-dir"])
        .arg(format!("../{pre_dumps}"))
        .arg("-D")
        .arg(&last)
        .ok()?;
    victim.wait_stopped()?;
    compare(&last, victim.pid(), kinds.contains("shared"))?;

    victim.go_on()?;
    ensure!(victim.ask("sum")? == before, "the victim's memory has changed");
    memckpt(["watch", &pid, "--stop"]).ok()?;
    Ok(())
}

fn compare(images: &Path, pid: i32, has_shared: bool) -> Result<()> {
    let compared = oracle::compare(images, pid)?;
    ensure!(compared.compared > 100, "hardly anything was compared: {compared:?}");
    // How much depends on how much was dirtied, and on the layout changes (seen on 6.1 and 6.12): a VMA that grew is
    // soft-dirty as a whole ("New (or expanded) vma always get soft dirty status", mmap_region() and do_brk_flags()
    // in mm/mmap.c), with all the pages that it had before.
    ensure!(compared.inherited > 0, "nothing was inherited: {compared:?}");
    memckpt(["show", "--compare", &pid.to_string()]).arg(images).ok()?;
    let meta: serde_json::Value = serde_json::from_slice(&std::fs::read(images.join("memckpt.json"))?)?;
    let inherited = &meta["counters"]["pages_inherited"];
    ensure!(meta["audit"]["pages_compared"] == *inherited, "audited: {}", meta["audit"]);
    // Of the victim alone, where it has no child.
    ensure!(meta["descendants"].is_array() || *inherited == compared.inherited, "inherited: {inherited}");
    if has_shared {
        ensure!(compared.shared > 2000, "hardly any shared memory was compared: {compared:?}");
    }
    Ok(())
}

macro_rules! chains {
    ($($module:ident: $tracker:expr;)*) => {$(
        mod $module {
            use super::*;

            #[test]
            fn anonymous() -> Result<()> {
                chain(concat!(stringify!($module), "::anonymous"), "anon", $tracker, "splice")
            }

            #[test]
            fn heap() -> Result<()> {
                chain(concat!(stringify!($module), "::heap"), "heap", $tracker, "splice")
            }

            #[test]
            fn stacks() -> Result<()> {
                chain(concat!(stringify!($module), "::stacks"), "stacks", $tracker, "splice")
            }

            #[test]
            fn private_file() -> Result<()> {
                chain(concat!(stringify!($module), "::private_file"), "file", $tracker, "splice")
            }

            #[test]
            fn prot_none() -> Result<()> {
                chain(concat!(stringify!($module), "::prot_none"), "prot-none", $tracker, "splice")
            }

            #[test]
            fn sparse_64_gib() -> Result<()> {
                chain(concat!(stringify!($module), "::sparse_64_gib"), "sparse", $tracker, "splice")
            }

            #[test]
            fn vmas_10000() -> Result<()> {
                chain(concat!(stringify!($module), "::vmas_10000"), "vmas", $tracker, "splice")
            }

            #[test]
            fn all_kinds() -> Result<()> {
                let kinds = "anon,heap,stacks,file,prot-none,sparse,vmas";
                chain(concat!(stringify!($module), "::all_kinds"), kinds, $tracker, "splice")
            }

            #[test]
            fn shared() -> Result<()> {
                chain(concat!(stringify!($module), "::shared"), "heap,shared", $tracker, "splice")
            }

            #[test]
            fn all_kinds_read() -> Result<()> {
                let kinds = "anon,heap,stacks,file,prot-none";
                chain(concat!(stringify!($module), "::all_kinds_read"), kinds, $tracker, "read")
            }
        }
    )*};
}

chains! {
    soft_dirty: Tracker::SoftDirty;
    uffd_wp: Tracker::UffdWp;
}

/// No session, no parent: everything is in the one checkpoint.
#[test]
fn dump_without_a_parent_is_exact() -> Result<()> {
    let scratch = Scratch::new()?;
    let mut victim =
        Victim::start("memory", ["anon,heap,stacks,file,prot-none".as_ref(), scratch.path().as_os_str()])?;
    change(&mut victim, 0, true)?;
    let images = scratch.directory("full")?;
    let pid = victim.pid();
    memckpt(["dump", "--leave-stopped", "-t", &pid.to_string(), "-D"]).arg(&images).ok()?;
    victim.wait_stopped()?;
    let compared = oracle::compare(&images, pid)?;
    ensure!(compared.inherited == 0 && compared.own > 1000, "{compared:?}");
    memckpt(["show", "--compare", &pid.to_string()]).arg(&images).ok()?;
    Ok(())
}

/// Neither comparison is blind: a page changed behind the checkpoint's back is found.
#[test]
fn compare_finds_a_changed_byte() -> Result<()> {
    let scratch = Scratch::new()?;
    let mut victim = Victim::start("memory", ["heap".as_ref(), scratch.path().as_os_str()])?;
    let images = scratch.directory("full")?;
    let pid = victim.pid();
    memckpt(["dump", "--leave-stopped", "-t", &pid.to_string(), "-D"]).arg(&images).ok()?;
    victim.go_on()?;
    victim.ask("dirty 99 1")?;
    victim.signal(Signal::SIGSTOP)?;
    victim.wait_stopped()?;
    ensure!(oracle::compare(&images, pid).is_err(), "the oracle is blind");
    let shown = memckpt(["show", "--compare", &pid.to_string()]).arg(&images).run()?;
    ensure!(shown.code.is_some_and(|code| code != 0), "show --compare is blind:\n{}", shown.stdout);
    Ok(())
}
