//! userfaultfd(2), as far as asynchronous write protection needs it (Linux 6.7; ioctl_userfaultfd(2)).

use std::fs::OpenOptions;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use bitflags::bitflags;

use super::SyscallError;
use crate::addr::AddrRange;

const UFFD_API: u64 = 0xaa;
/// `_IOWR(0xaa, 0x3f, struct uffdio_api)`
const UFFDIO_API: libc::c_ulong = 0xc018_aa3f;
/// `_IOWR(0xaa, 0, struct uffdio_register)`
const UFFDIO_REGISTER: libc::c_ulong = 0xc020_aa00;
/// `_IOWR(0xaa, 6, struct uffdio_writeprotect)`
const UFFDIO_WRITEPROTECT: libc::c_ulong = 0xc018_aa06;
/// `_IO(0xaa, 0)`, on /dev/userfaultfd (Linux 6.1)
const USERFAULTFD_IOC_NEW: libc::c_ulong = 0xaa00;
const UFFDIO_REGISTER_MODE_WP: u64 = 1 << 1;
const UFFDIO_WRITEPROTECT_MODE_WP: u64 = 1 << 0;

/// Only faults of user mode: allowed to everybody (Linux 5.11). Asynchronous protection tracks the kernel's writes even so.
pub const UFFD_USER_MODE_ONLY: i32 = 1;

bitflags! {
    /// UFFD_FEATURE_* of linux/userfaultfd.h.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
    pub struct UffdFeatures: u64 {
        /// Write protection.
        const PAGEFAULT_FLAG_WP = 1 << 0;
        /// Write protection of hugetlb and shared memory (Linux 5.19).
        const WP_HUGETLBFS_SHMEM = 1 << 12;
        /// Pages that are not there yet can be protected too (Linux 6.4).
        const WP_UNPOPULATED = 1 << 13;
        /// The kernel resolves write faults by itself (Linux 6.7).
        const WP_ASYNC = 1 << 15;
    }
}

impl UffdFeatures {
    /// What asynchronous tracking asks for.
    pub const ASYNC_WP: Self = Self::PAGEFAULT_FLAG_WP
        .union(Self::WP_HUGETLBFS_SHMEM)
        .union(Self::WP_UNPOPULATED)
        .union(Self::WP_ASYNC);
}

#[repr(C)]
struct UffdioApi {
    api: u64,
    features: u64,
    ioctls: u64,
}

#[repr(C)]
struct UffdioRange {
    start: u64,
    len: u64,
}

#[repr(C)]
struct UffdioRegister {
    range: UffdioRange,
    mode: u64,
    ioctls: u64,
}

#[repr(C)]
struct UffdioWriteprotect {
    range: UffdioRange,
    mode: u64,
}

impl From<AddrRange> for UffdioRange {
    fn from(range: AddrRange) -> Self {
        Self { start: range.start.get(), len: range.len() }
    }
}

/// The handshake: must be the first call on a new userfaultfd, and is allowed once.
///
/// # Errors
/// EINVAL: a feature that this kernel lacks, or the handshake was done before.
pub fn handshake(fd: BorrowedFd<'_>, features: UffdFeatures) -> Result<(), SyscallError> {
    let mut api = UffdioApi { api: UFFD_API, features: features.bits(), ioctls: 0 };
    // SAFETY: UFFDIO_API reads and writes one UffdioApi.
    check(unsafe { libc::ioctl(fd.as_raw_fd(), UFFDIO_API, &raw mut api) }, "ioctl(UFFDIO_API)", || {
        format!("userfaultfd, features {features:?}")
    })
}

/// Registers `range` for write protection; its VMAs are split at its ends. Nothing is protected yet.
///
/// # Errors
/// EINVAL: nothing mapped at its start, or a VMA that cannot be tracked (droppable memory). EPERM: a shared mapping of a
/// file opened for reading only. EBUSY: registered with another userfaultfd. ENOMEM: the address space is gone.
pub fn register(fd: BorrowedFd<'_>, range: AddrRange) -> Result<(), SyscallError> {
    let mut arg = UffdioRegister { range: range.into(), mode: UFFDIO_REGISTER_MODE_WP, ioctls: 0 };
    // SAFETY: UFFDIO_REGISTER reads and writes one UffdioRegister; it changes no page's content.
    check(
        unsafe { libc::ioctl(fd.as_raw_fd(), UFFDIO_REGISTER, &raw mut arg) },
        "ioctl(UFFDIO_REGISTER)",
        || range.to_string(),
    )
}

/// Protects (`protect`) or releases every page of `range`. Protecting what is not populated builds its page tables: for
/// sparse memory use [`super::pagemap_scan`] with WP_MATCHING.
///
/// # Errors
/// ENOENT: not registered. ESRCH: the address space is gone. EAGAIN: the layout is being changed, try again.
pub fn write_protect(fd: BorrowedFd<'_>, range: AddrRange, protect: bool) -> Result<(), SyscallError> {
    let mode = if protect { UFFDIO_WRITEPROTECT_MODE_WP } else { 0 };
    let mut arg = UffdioWriteprotect { range: range.into(), mode };
    // SAFETY: UFFDIO_WRITEPROTECT reads one UffdioWriteprotect; with WP_ASYNC no thread ever waits for a protected page.
    check(
        unsafe { libc::ioctl(fd.as_raw_fd(), UFFDIO_WRITEPROTECT, &raw mut arg) },
        "ioctl(UFFDIO_WRITEPROTECT)",
        || range.to_string(),
    )
}

/// Opens /dev/userfaultfd (Linux 6.1), from which a process without rights of its own can be given a userfaultfd.
///
/// # Errors
/// The device is not there or not ours to open.
pub fn open_device() -> Result<OwnedFd, SyscallError> {
    let path = "/dev/userfaultfd";
    let file = OpenOptions::new().read(true).write(true).open(path);
    file.map(OwnedFd::from).map_err(|e| SyscallError::new("open", path, e))
}

/// A new userfaultfd for *this* process's memory, out of /dev/userfaultfd.
///
/// # Errors
/// The ioctl failed.
pub fn new_from_device(device: BorrowedFd<'_>) -> Result<OwnedFd, SyscallError> {
    // SAFETY: takes flags, gives a descriptor.
    let fd = unsafe { libc::ioctl(device.as_raw_fd(), USERFAULTFD_IOC_NEW, libc::O_CLOEXEC) };
    check(fd, "ioctl(USERFAULTFD_IOC_NEW)", || "/dev/userfaultfd".to_owned())?;
    // SAFETY: the kernel has just made this descriptor for us and nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn check(result: i32, call: &'static str, object: impl Fn() -> String) -> Result<(), SyscallError> {
    if result < 0 { Err(SyscallError::last(call, object())) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ioctl_numbers_fit_the_structs() {
        for (number, size) in [
            (UFFDIO_API, size_of::<UffdioApi>()),
            (UFFDIO_REGISTER, size_of::<UffdioRegister>()),
            (UFFDIO_WRITEPROTECT, size_of::<UffdioWriteprotect>()),
        ] {
            assert_eq!((number >> 16 & 0x3fff) as usize, size, "{number:#x}");
        }
    }
}
