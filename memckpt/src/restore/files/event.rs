//! Files that tell of events.

use std::io::Write as _;
use std::os::fd::{AsRawFd, OwnedFd};

use crate::image::proto::{EventfdFileEntry, FileEntry, SignalfdEntry, TimerfdEntry};
use crate::kernel::SyscallError;

use super::{made, set_flags};

/// TFD_IOC_SET_TICKS of linux/timerfd.h (Linux 3.16, CONFIG_CHECKPOINT_RESTORE).
const SET_TICKS: libc::c_ulong = 0x4008_5400;

/// Makes it, if it is one of these.
pub(super) fn open(entry: &FileEntry) -> Option<Result<OwnedFd, SyscallError>> {
    if let Some(eventfd) = &entry.efd {
        return Some(make_eventfd(eventfd));
    }
    if let Some(timerfd) = &entry.tfd {
        return Some(make_timerfd(timerfd));
    }
    if let Some(signalfd) = &entry.sgfd {
        return Some(make_signalfd(signalfd));
    }
    entry.epfd.as_ref().map(|epoll| {
        // What it watches is added once its descriptors have their numbers.
        // SAFETY: makes a descriptor.
        let fd =
            made(unsafe { libc::syscall(libc::SYS_epoll_create1, libc::EPOLL_CLOEXEC) }, "epoll_create1")?;
        set_flags(&fd, epoll.flags)?;
        Ok(fd)
    })
}

fn make_eventfd(entry: &EventfdFileEntry) -> Result<OwnedFd, SyscallError> {
    // SAFETY: makes a descriptor.
    let fd = made(unsafe { libc::syscall(libc::SYS_eventfd2, 0, libc::EFD_CLOEXEC) }, "eventfd2")?;
    if entry.counter > 0 {
        let mut file = std::fs::File::from(fd);
        file.write_all(&entry.counter.to_ne_bytes()).map_err(|e| SyscallError::new("write", "eventfd", e))?;
        let fd = OwnedFd::from(file);
        set_flags(&fd, entry.flags)?;
        return Ok(fd);
    }
    set_flags(&fd, entry.flags)?;
    Ok(fd)
}

fn make_signalfd(entry: &SignalfdEntry) -> Result<OwnedFd, SyscallError> {
    // SAFETY: makes a descriptor; reads eight bytes.
    let fd =
        unsafe { libc::syscall(libc::SYS_signalfd4, -1, &raw const entry.sigmask, 8, libc::SFD_CLOEXEC) };
    let fd = made(fd, "signalfd4")?;
    set_flags(&fd, entry.flags)?;
    Ok(fd)
}

fn make_timerfd(entry: &TimerfdEntry) -> Result<OwnedFd, SyscallError> {
    let clock = entry.clockid as i32;
    // SAFETY: makes a descriptor.
    let fd = unsafe { libc::syscall(libc::SYS_timerfd_create, clock, libc::TFD_CLOEXEC) };
    let fd = made(fd, "timerfd_create")?;
    let failed = |call| SyscallError::last(call, "timerfd");
    // A periodic timer that has expired, unread, shows no time left to CRIU; set so, it would be disarmed.
    let (left, interval) = ((entry.vsec, entry.vnsec), (entry.isec, entry.insec));
    let left = if entry.ticks > 0 && left == (0, 0) { interval } else { left };
    let timespec = |(sec, nsec)| libc::timespec { tv_sec: sec as i64, tv_nsec: nsec as i64 };
    let mut value = libc::itimerspec { it_interval: timespec(interval), it_value: timespec(left) };
    let armed = left != (0, 0);
    if armed && entry.settime_flags as i32 & libc::TFD_TIMER_ABSTIME != 0 {
        // The kernel tells what is left.
        let mut now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
        // SAFETY: writes one timespec.
        if unsafe { libc::clock_gettime(clock, &raw mut now) } != 0 {
            return Err(failed("clock_gettime"));
        }
        let nanos = value.it_value.tv_nsec + now.tv_nsec;
        value.it_value.tv_sec += now.tv_sec + nanos / 1_000_000_000;
        value.it_value.tv_nsec = nanos % 1_000_000_000;
    }
    let flags = entry.settime_flags as i32;
    // SAFETY: reads one itimerspec.
    if unsafe { libc::timerfd_settime(fd.as_raw_fd(), flags, &raw const value, std::ptr::null_mut()) } != 0 {
        return Err(failed("timerfd_settime"));
    }
    if entry.ticks > 0 {
        // SAFETY: reads eight bytes.
        if unsafe { libc::ioctl(fd.as_raw_fd(), SET_TICKS, &raw const entry.ticks) } != 0 {
            return Err(failed("ioctl(TFD_IOC_SET_TICKS)"));
        }
    }
    set_flags(&fd, entry.flags)?;
    Ok(fd)
}
