//! Tries what reaching into a process needs.

use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use super::tracking::say;
use crate::addr::PAGE_SIZE;
use crate::kernel::maps::MapsFile;
use crate::kernel::memory::{ProcMem, vm_read};
use crate::kernel::puppet::Puppet;
use crate::kernel::{SyscallError, process};

fn puppet() -> Result<Puppet, String> {
    Puppet::start().map_err(|e| format!("starting a child: {e}"))
}

pub(super) fn procmap_query() -> Result<(), String> {
    let maps = MapsFile::open(std::process::id() as i32).map_err(say)?;
    if maps.can_query() { Ok(()) } else { Err("the ioctl is refused".to_owned()) }
}

pub(super) fn ptrace_seize() -> Result<(), String> {
    let puppet = puppet()?;
    let call = |request: libc::c_uint, name: &'static str| {
        let none = std::ptr::null_mut::<libc::c_void>();
        // SAFETY: these requests take no memory; the tracee is our own child.
        let result = unsafe { libc::ptrace(request, puppet.pid(), none, none) };
        if result < 0 { Err(say(SyscallError::last(name, "a child"))) } else { Ok(()) }
    };
    call(libc::PTRACE_SEIZE, "ptrace(PTRACE_SEIZE)")?;
    call(libc::PTRACE_INTERRUPT, "ptrace(PTRACE_INTERRUPT)")?;
    let mut status = 0;
    // SAFETY: waits for our own child; the status is written to a local.
    let waited = unsafe { libc::waitpid(puppet.pid(), &raw mut status, libc::__WALL) };
    if waited != puppet.pid() || !libc::WIFSTOPPED(status) {
        return Err(format!("the child did not stop (status {status:#x})"));
    }
    call(libc::PTRACE_DETACH, "ptrace(PTRACE_DETACH)")
}

pub(super) fn proc_mem() -> Result<(), String> {
    let puppet = puppet()?;
    let page = puppet.map(PAGE_SIZE).map_err(say)?;
    puppet.fill(page, 3).map_err(say)?;
    puppet.syscall(libc::SYS_mprotect, &[page.start.get(), PAGE_SIZE, 0]).map_err(say)?;
    let mem = ProcMem::open(puppet.pid()).map_err(say)?;
    let mut byte = [0];
    mem.read_at(page.start, &mut byte).map_err(say)?;
    mem.write_at(page.start, &byte).map_err(say)?;
    if byte == [3] { Ok(()) } else { Err(format!("3 was stored, {} read", byte[0])) }
}

pub(super) fn process_vm_readv() -> Result<(), String> {
    let puppet = puppet()?;
    let page = puppet.map(PAGE_SIZE).map_err(say)?;
    puppet.fill(page, 3).map_err(say)?;
    let mut buffer = vec![0; PAGE_SIZE as usize];
    let n = vm_read(puppet.pid(), &[page], &mut buffer).map_err(say)?;
    if n == buffer.len() && buffer[0] == 3 { Ok(()) } else { Err(format!("{n} bytes came")) }
}

pub(super) fn pidfd() -> Result<(), String> {
    let puppet = puppet()?;
    let pidfd = crate::kernel::pidfd::open(puppet.pid()).map_err(say)?;
    let theirs = puppet.open(std::path::Path::new("/proc/self/status")).map_err(say)?;
    crate::kernel::pidfd::getfd(&pidfd, theirs).map_err(say)?;
    crate::kernel::pidfd::send_signal(&pidfd, 0).map_err(say)
}

pub(super) fn kcmp() -> Result<(), String> {
    let puppet = puppet()?;
    match process::shares_mm(std::process::id() as i32, puppet.pid()) {
        Ok(false) => Ok(()),
        Ok(true) => Err("a forked child is said to share our memory".to_owned()),
        Err(e) => Err(say(e)),
    }
}

pub(super) fn vmsplice() -> Result<(), String> {
    let (reader, writer) = pipe().map_err(say)?;
    let page = vec![7u8; PAGE_SIZE as usize];
    let iov = libc::iovec { iov_base: page.as_ptr().cast_mut().cast(), iov_len: page.len() };
    // SAFETY: the pipe refers to `page`, which lives until both ends are read or closed below; nobody writes to it.
    let n = unsafe { libc::vmsplice(writer.as_raw_fd(), &raw const iov, 1, libc::SPLICE_F_NONBLOCK) };
    if n < 0 {
        return Err(say(SyscallError::last("vmsplice", "a pipe")));
    }
    let mut back = vec![0u8; n as usize];
    let mut file = std::fs::File::from(reader);
    std::io::Read::read_exact(&mut file, &mut back).map_err(say)?;
    if back.len() == page.len() && back == page { Ok(()) } else { Err(format!("{n} bytes came")) }
}

pub(super) fn pipe() -> Result<(OwnedFd, OwnedFd), SyscallError> {
    let mut ends = [0; 2];
    // SAFETY: the kernel writes two descriptors.
    if unsafe { libc::pipe2(ends.as_mut_ptr(), libc::O_CLOEXEC) } < 0 {
        return Err(SyscallError::last("pipe2", "a new pipe"));
    }
    // SAFETY: both were just made for us and nobody else knows them.
    Ok(unsafe { (OwnedFd::from_raw_fd(ends[0]), OwnedFd::from_raw_fd(ends[1])) })
}
