//! The few bpf(2) commands that aya does not offer.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

pub(super) const BPF_LINK_GET_FD_BY_ID: libc::c_long = 30;
const BPF_OBJ_GET_INFO_BY_FD: libc::c_long = 15;
const BPF_MAP_LOOKUP_AND_DELETE_ELEM: libc::c_long = 21;
/// Offsets in bpf_prog_info and bpf_link_info (linux/bpf.h), which only ever grow.
pub(super) const PROG_RECURSION_MISSES: usize = 208;
/// perf_event.kprobe.missed.
pub(super) const LINK_PROBE_MISSED: usize = 48;
const INFO_BYTES: usize = 512;

fn bpf(command: libc::c_long, attr: &mut [u64; 4]) -> io::Result<i32> {
    // SAFETY: attr is a zero-padded bpf_attr for the command, no shorter than what any command here reads; the
    // memory that it points to is the callers' own.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, attr.as_mut_ptr(), size_of_val(attr)) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result as i32) }
}

pub(super) fn fd_by_id(command: libc::c_long, id: u32) -> io::Result<OwnedFd> {
    let fd = bpf(command, &mut [u64::from(id), 0, 0, 0])?;
    // SAFETY: the kernel just gave us this descriptor.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Takes the element of `key` out of a hash map, whole: Linux 5.14. `None` if there is none.
pub(super) fn take<const N: usize>(map: BorrowedFd<'_>, key: u64) -> io::Result<Option<[u64; N]>> {
    let mut value = [0u64; N];
    // struct { u32 map_fd; u64 key; u64 value; u64 flags; }
    let fd = u64::from(map.as_raw_fd() as u32);
    let mut attr = [fd, (&raw const key) as u64, value.as_mut_ptr() as u64, 0];
    match bpf(BPF_MAP_LOOKUP_AND_DELETE_ELEM, &mut attr) {
        Ok(_) => Ok(Some(value)),
        Err(e) if e.raw_os_error() == Some(libc::ENOENT) => Ok(None),
        Err(e) => Err(e),
    }
}

/// The u64 at `offset` of an object's info; `None` where this kernel's info ends before it.
pub(super) fn info_u64(fd: BorrowedFd<'_>, offset: usize) -> io::Result<Option<u64>> {
    let mut info = [0u64; INFO_BYTES / 8];
    // struct { u32 bpf_fd; u32 info_len; u64 info; }
    let head = u64::from(fd.as_raw_fd() as u32) | (INFO_BYTES as u64) << 32;
    let mut attr = [head, info.as_mut_ptr() as u64, 0, 0];
    bpf(BPF_OBJ_GET_INFO_BY_FD, &mut attr)?;
    // The kernel writes back how much it filled in.
    let filled = (attr[0] >> 32) as usize;
    Ok((filled >= offset + 8).then_some(info[offset / 8]))
}
