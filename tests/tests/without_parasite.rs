//! Where a parasite would be unsafe, memory and registers are taken without one, and the output says so and why.

use anyhow::{Result, ensure};
use memckpt_tests::{Scratch, Victim, memckpt, oracle};

/// Dumps `victim` in the default mode, compares, and lets it run on; memckpt names `reason`.
fn taken_by_reading(victim: &mut Victim, reason: &str) -> Result<()> {
    let scratch = Scratch::new()?;
    let images = scratch.directory("images")?;
    let pid = victim.pid().to_string();
    let ran = memckpt(["dump", "-t", &pid, "--leave-stopped", "-D"]).arg(&images).ok()?;
    let said = format!("{}{}", ran.stdout, ran.stderr);
    ensure!(said.contains("taken without a parasite") && said.contains(reason), "not said: {reason}\n{said}");
    let meta: serde_json::Value = serde_json::from_slice(&std::fs::read(images.join("memckpt.json"))?)?;
    ensure!(meta["page_mode"] == "read", "page mode {}", meta["page_mode"]);
    victim.wait_stopped()?;
    let compared = oracle::compare(&images, victim.pid())?;
    ensure!(compared.compared > 10, "hardly anything was compared: {compared:?}");
    victim.go_on()?;
    ensure!(victim.is_alive()?, "the victim is dead");
    Ok(())
}

fn odd(what: &str) -> Result<Victim> {
    Victim::start("odd", [what])
}

#[test]
fn a_seccomp_filter_that_denies_shmat() -> Result<()> {
    taken_by_reading(&mut odd("no-shmat")?, "seccomp filter does not allow system call 30")
}

#[test]
fn a_seccomp_filter_that_would_kill_on_the_way_home() -> Result<()> {
    taken_by_reading(&mut odd("deadly-munmap")?, "seccomp filter does not allow system call 11")
}

#[test]
fn strict_seccomp() -> Result<()> {
    // It says that it is ready just before it is.
    let mut victim = odd("strict")?;
    let strict = || -> Result<bool> {
        let status = std::fs::read_to_string(format!("/proc/{}/status", victim.pid()))?;
        Ok(status.lines().any(|line| line == "Seccomp:\t1"))
    };
    while !strict()? {
        std::thread::yield_now();
    }
    taken_by_reading(&mut victim, "seccomp's strict mode")
}

#[test]
fn an_address_space_limit_that_is_reached() -> Result<()> {
    let mut victim = odd("plain")?;
    let status = procfs::process::Process::new(victim.pid())?.status()?;
    let bytes = status.vmsize.unwrap_or(0) * 1024;
    let limit = libc::rlimit { rlim_cur: bytes, rlim_max: libc::RLIM_INFINITY };
    // SAFETY: reads one rlimit.
    let rc = unsafe { libc::prlimit(victim.pid(), libc::RLIMIT_AS, &raw const limit, std::ptr::null_mut()) };
    ensure!(rc == 0, "prlimit: {}", std::io::Error::last_os_error());
    taken_by_reading(&mut victim, "RLIMIT_AS")
}

#[test]
fn as_many_mappings_as_the_kernel_allows() -> Result<()> {
    taken_by_reading(&mut odd("mappings")?, "vm.max_map_count")
}
