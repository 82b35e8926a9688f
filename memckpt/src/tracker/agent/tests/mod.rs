//! The agent against a child whose every fault and system call is known, by each family of hooks.

mod events;
mod foreign;
mod hints;
mod layout;
mod victim;

use std::io::Write;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use super::*;
use crate::addr::{Addr, CHUNK_SIZE, PAGE_SIZE};
use victim::Victim;

/// Says why a test cannot run here, in the form that the test runner looks for.
fn skip(name: &str, reason: &str) {
    // Not eprintln!, which libtest keeps to itself for tests that pass.
    let _ = writeln!(std::io::stderr(), "memckpt-test-skip: {name}: {reason}");
}

/// Layout calls at the mmap lock wherever the kernel can.
fn options(choice: HookChoice) -> AgentOptions {
    AgentOptions { choice, dropped_pages_show: true, ..AgentOptions::default() }
}

/// An agent with hooks of `choice`, or the reason why this kernel has none.
fn attach(name: &str, victim: &Victim, choice: HookChoice) -> Option<Agent> {
    attach_by(name, victim, choice, true)
}

/// As [`attach`], with layout calls told at their return if not `by_lock`.
fn attach_by(name: &str, victim: &Victim, choice: HookChoice, by_lock: bool) -> Option<Agent> {
    match Agent::attach_by(victim.pid, options(choice), by_lock) {
        Ok(agent) => {
            assert_eq!(agent.losses(), Losses::default());
            assert!(agent.hooks().withdrawn.keys().all(|f| *f == Fact::MissesCounted), "{:?}", agent.hooks());
            Some(agent)
        }
        Err(AgentError::Choice { hook, reason, .. }) => {
            skip(name, &format!("{hook}: {reason}"));
            None
        }
        Err(error) => panic!("{error}"),
    }
}

/// Makes a test of each function in each family of hooks: `fentry::NAME`, `kprobe::NAME`, `tracepoint::NAME`.
macro_rules! for_each_family {
    ($($name:ident),* $(,)?) => {
        for_each_family!(@ fentry Fentry; $($name),*);
        for_each_family!(@ kprobe Kprobe; $($name),*);
        for_each_family!(@ tracepoint Tracepoint; $($name),*);
    };
    (@ $family:ident $choice:ident; $($name:ident),*) => {
        mod $family {
            $(#[test]
            fn $name() {
                super::$name(concat!(module_path!(), "::", stringify!($name)), $crate::tracker::agent::HookChoice::$choice);
            })*
        }
    };
}
use for_each_family;

const RW: u64 = (libc::PROT_READ | libc::PROT_WRITE) as u64;
const SHARED: u64 = (libc::MAP_SHARED | libc::MAP_ANONYMOUS) as u64;
const ANON: u64 = (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS) as u64;

fn range(start: u64, pages: u64) -> AddrRange {
    AddrRange::with_len(Addr(start), pages * PAGE_SIZE)
}

fn memfd(len: u64) -> OwnedFd {
    // SAFETY: a new descriptor.
    unsafe {
        let fd = libc::memfd_create(c"memckpt-test".as_ptr(), libc::MFD_CLOEXEC);
        assert!(fd >= 0 && libc::ftruncate(fd, len as i64) == 0);
        OwnedFd::from_raw_fd(fd)
    }
}

fn drained(agent: &mut Agent) -> Vec<LayoutEvent> {
    let mut events = Vec::new();
    agent.drain(&mut events);
    events
}

/// Writes one byte into the victim by process_vm_writev.
fn vm_write(victim: &Victim, address: u64) {
    let byte = 7u8;
    let local = libc::iovec { iov_base: (&raw const byte).cast_mut().cast(), iov_len: 1 };
    let remote = libc::iovec { iov_base: address as *mut _, iov_len: 1 };
    // SAFETY: reads one byte of ours; writes into the victim.
    let n = unsafe { libc::process_vm_writev(victim.pid, &raw const local, 1, &raw const remote, 1, 0) };
    assert_eq!(n, 1);
}

/// Writes one byte into the victim through /proc/PID/mem.
fn mem_write(victim: &Victim, address: u64) {
    use std::os::unix::fs::FileExt;
    let mem = std::fs::OpenOptions::new().write(true).open(format!("/proc/{}/mem", victim.pid)).unwrap();
    mem.write_all_at(&[9], address).unwrap();
}

#[test]
fn the_committed_object_is_built_from_these_sources() {
    use sha2::{Digest, Sha256};
    let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../memckpt-ebpf");
    let recorded = std::fs::read_to_string(root.join("memckpt.bpf.sources.sha256")).unwrap();
    let mut files: Vec<_> = std::fs::read_dir(root.join("src"))
        .unwrap()
        .map(|entry| format!("src/{}", entry.unwrap().file_name().into_string().unwrap()))
        .chain(["Cargo.toml".into(), "bpf-cargo.toml".into()])
        .collect();
    files.sort();
    let mut hash = Sha256::new();
    for file in files {
        let content = std::fs::read(root.join(&file)).unwrap();
        hash.update(format!("{file} {}\n", content.len()));
        hash.update(content);
    }
    let now: String = hash.finalize().iter().map(|b| format!("{b:02x}")).collect();
    assert_eq!(
        recorded.trim(),
        now,
        "memckpt-ebpf changed: run `cargo xtask ebpf` and commit what it builds"
    );
}
