//! `/proc/PID/fdinfo/FD`: what an open file is and where it stands (proc(5), Linux 2.6.22; the kinds' own lines 3.8, locks 4.1).
//!
//! Each kind's lines are written by its `show_fdinfo`: fs/eventfd.c, fs/signalfd.c, fs/timerfd.c, fs/eventpoll.c,
//! fs/notify/fdinfo.c, kernel/fork.c (fs/pidfs.c since 6.14). All but `pos`, `flags`, `mnt_id` and `ino` are absent for other kinds.

use super::SyscallError;

/// A file's entry, parsed as far as all kinds have it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FdInfo {
    /// The position.
    pub pos: u64,
    /// The status flags of open(2), with O_CLOEXEC for the descriptor's own flag.
    pub flags: u32,
    /// The mount, by its number in `/proc/PID/mountinfo`.
    pub mnt_id: i32,
    lines: Vec<(String, String)>,
}

/// A watched descriptor of an epoll.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EpollTarget {
    /// The number that it was added by; it may mean another file by now.
    pub fd: u32,
    /// EPOLL* events.
    pub events: u32,
    /// The user's word.
    pub data: u64,
    /// The file's position, inode and device at this moment (Linux 4.13).
    pub pos: u64,
    /// See `pos`.
    pub inode: u64,
    /// See `pos`: the kernel's own encoding, major number << 20 | minor number.
    pub dev: u32,
}

/// A watch of an inotify.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InotifyWatch {
    /// Its number.
    pub wd: u32,
    /// The watched inode.
    pub inode: u64,
    /// Its file system: the kernel's own encoding, major number << 20 | minor number.
    pub dev: u32,
    /// IN_* events.
    pub mask: u32,
    /// Events that are ignored.
    pub ignored_mask: u32,
    /// The inode's handle, for open_by_handle_at(2): type and bytes. `None` where the file system has none.
    pub handle: Option<(i32, Vec<u8>)>,
}

/// The state of a timerfd.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TimerState {
    /// CLOCK_*.
    pub clock: u32,
    /// Expirations that were not read yet.
    pub ticks: u64,
    /// TFD_TIMER_* of the last timerfd_settime(2).
    pub settime_flags: u32,
    /// Until the next expiration: seconds and nanoseconds.
    pub value: (u64, u64),
    /// From one to the next.
    pub interval: (u64, u64),
}

/// A lock of flock(2) or fcntl(2) that was taken through this descriptor (POSIX locks: by this process on this file).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Lock {
    /// `FLOCK`, `POSIX`, `OFDLCK`, `LEASE`, `DELEG`, ...
    pub kind: String,
    /// `ADVISORY`, `ACTIVE`, `BREAKING`, ...
    pub state: String,
    /// `READ`, `WRITE`, `UNLCK`.
    pub access: String,
    /// Who took it; -1 for locks of an open file.
    pub pid: i32,
    /// The first byte.
    pub start: u64,
    /// The last byte; `None`: to the end, however far that moves.
    pub end: Option<u64>,
}

impl FdInfo {
    /// Reads the entry of descriptor `fd` of process `pid`.
    ///
    /// # Errors
    /// No such process or descriptor, or the entry is not understood.
    pub fn read(pid: i32, fd: i32) -> Result<Self, SyscallError> {
        let path = format!("/proc/{pid}/fdinfo/{fd}");
        let text = std::fs::read(&path).map_err(|e| SyscallError::new("read", &*path, e))?;
        Self::parse(&String::from_utf8_lossy(&text)).ok_or_else(|| {
            SyscallError::new("read", path, std::io::Error::from(std::io::ErrorKind::InvalidData))
        })
    }

    fn parse(text: &str) -> Option<Self> {
        let lines: Vec<(String, String)> = text
            .lines()
            .filter_map(|line| {
                // `tfd:  5 events: ..` and `inotify wd:1 ino:..`: the first word is the key.
                let (key, rest) = match line.strip_prefix("inotify ") {
                    Some(rest) => ("inotify", rest),
                    None => line.split_once(':')?,
                };
                Some((key.trim().to_owned(), rest.trim().to_owned()))
            })
            .collect();
        let mut info = Self { lines, ..Self::default() };
        info.pos = info.value("pos")?.parse().ok()?;
        info.flags = u32::from_str_radix(info.value("flags")?, 8).ok()?;
        info.mnt_id = info.value("mnt_id")?.parse().ok()?;
        Some(info)
    }

    /// Whether the descriptor is closed by exec.
    #[must_use]
    pub fn close_on_exec(&self) -> bool {
        self.flags & libc::O_CLOEXEC as u32 != 0
    }

    /// The flags of the open file itself: without O_CLOEXEC, which belongs to the descriptor.
    #[must_use]
    pub fn file_flags(&self) -> u32 {
        self.flags & !(libc::O_CLOEXEC as u32)
    }

    fn value(&self, key: &str) -> Option<&str> {
        self.values(key).next()
    }

    fn values<'a, 'k>(&'a self, key: &'k str) -> impl Iterator<Item = &'a str> + use<'a, 'k> {
        self.lines.iter().filter(move |(k, _)| k == key).map(|(_, value)| value.as_str())
    }

    fn hex(&self, key: &str) -> Option<u64> {
        u64::from_str_radix(self.value(key)?, 16).ok()
    }

    /// The counter of an eventfd.
    #[must_use]
    pub fn eventfd_counter(&self) -> Option<u64> {
        self.hex("eventfd-count")
    }

    /// Whether an eventfd was made with EFD_SEMAPHORE; `None` where the kernel does not say (before Linux 6.5).
    #[must_use]
    pub fn eventfd_semaphore(&self) -> Option<bool> {
        self.value("eventfd-semaphore").map(|value| value != "0")
    }

    /// The signals of a signalfd.
    #[must_use]
    pub fn signalfd_mask(&self) -> Option<u64> {
        self.hex("sigmask")
    }

    /// The state of a timerfd.
    #[must_use]
    pub fn timer(&self) -> Option<TimerState> {
        Some(TimerState {
            clock: self.value("clockid")?.parse().ok()?,
            ticks: self.value("ticks")?.parse().ok()?,
            settime_flags: u32::from_str_radix(self.value("settime flags")?, 8).ok()?,
            value: pair(self.value("it_value")?)?,
            interval: pair(self.value("it_interval")?)?,
        })
    }

    /// What an epoll watches; `None` when a line is not understood.
    #[must_use]
    pub fn epoll_targets(&self) -> Option<Vec<EpollTarget>> {
        self.values("tfd").map(epoll_target).collect()
    }

    /// What an inotify watches; `None` when a line is not understood.
    #[must_use]
    pub fn inotify_watches(&self) -> Option<Vec<InotifyWatch>> {
        self.values("inotify").map(inotify_watch).collect()
    }

    /// The locks on the file; `None` when a line is not understood.
    #[must_use]
    pub fn locks(&self) -> Option<Vec<Lock>> {
        self.values("lock").map(lock).collect()
    }

    /// The process that a pidfd means, as its own PID namespace counts; -1 when it has ended and was waited for.
    #[must_use]
    pub fn pidfd_target(&self) -> Option<i32> {
        self.value("Pid")?.parse().ok()
    }
}

/// `(seconds, nanoseconds)`
fn pair(text: &str) -> Option<(u64, u64)> {
    let (seconds, nanos) = text.strip_prefix('(')?.strip_suffix(')')?.split_once(',')?;
    Some((seconds.trim().parse().ok()?, nanos.trim().parse().ok()?))
}

/// `5 events: 19 data: 7  pos:0 ino:61af sdev:7`, behind `tfd:`.
fn epoll_target(text: &str) -> Option<EpollTarget> {
    // A blank may follow a colon or not; without blanks there is one word a field.
    let words = text.replace(": ", ":");
    let mut words = words.split_ascii_whitespace();
    let fd = words.next()?.parse().ok()?;
    let mut target = EpollTarget { fd, events: 0, data: 0, pos: 0, inode: 0, dev: 0 };
    let mut events = false;
    // `data:` is padded to 16 places, so that its number may be a word of its own.
    let mut pending = None;
    for word in words {
        let (key, value) = match (pending.take(), word.split_once(':')) {
            (Some(key), None) => (key, word),
            (_, Some((key, ""))) => {
                pending = Some(key);
                continue;
            }
            (_, Some(field)) => field,
            (None, None) => return None,
        };
        let hex = || u64::from_str_radix(value, 16).ok();
        match key {
            "events" => (target.events, events) = (hex()? as u32, true),
            "data" => target.data = hex()?,
            "pos" => target.pos = value.parse().ok()?,
            "ino" => target.inode = hex()?,
            "sdev" => target.dev = hex()? as u32,
            _ => {}
        }
    }
    events.then_some(target)
}

/// `wd:1 ino:2 sdev:19 mask:3 ignored_mask:0 fhandle-bytes:8 fhandle-type:1 f_handle:0200000000000000`
fn inotify_watch(text: &str) -> Option<InotifyWatch> {
    let field =
        |key: &str| text.split_ascii_whitespace().find_map(|word| word.strip_prefix(key)?.strip_prefix(':'));
    let hex = |key: &str| u64::from_str_radix(field(key)?, 16).ok();
    let handle = match (hex("fhandle-type"), field("f_handle")) {
        (Some(kind), Some(bytes)) => Some((kind as i32, hex_bytes(bytes)?)),
        _ => None,
    };
    Some(InotifyWatch {
        wd: hex("wd")? as u32,
        inode: hex("ino")?,
        dev: hex("sdev")? as u32,
        mask: hex("mask")? as u32,
        ignored_mask: hex("ignored_mask")? as u32,
        handle,
    })
}

fn hex_bytes(text: &str) -> Option<Vec<u8>> {
    let digits = text.as_bytes();
    if !digits.len().is_multiple_of(2) {
        return None;
    }
    digits.chunks_exact(2).map(|two| u8::from_str_radix(std::str::from_utf8(two).ok()?, 16).ok()).collect()
}

/// `1: FLOCK  ADVISORY  WRITE 359 00:13:11691 0 EOF`, behind `lock:`.
fn lock(text: &str) -> Option<Lock> {
    let words: Vec<&str> = text.split_ascii_whitespace().collect();
    let [_, kind, state, access, pid, _, start, end] = words[..] else { return None };
    Some(Lock {
        kind: kind.to_owned(),
        state: state.to_owned(),
        access: access.to_owned(),
        pid: pid.parse().ok()?,
        start: start.parse().ok()?,
        end: if end == "EOF" { None } else { Some(end.parse().ok()?) },
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const HEAD: &str = "pos:\t7\nflags:\t02004002\nmnt_id:\t16\nino:\t1058\n";

    fn info(tail: &str) -> FdInfo {
        FdInfo::parse(&format!("{HEAD}{tail}")).unwrap()
    }

    #[test]
    fn what_all_kinds_have() {
        let info = info("");
        assert_eq!((info.pos, info.mnt_id, info.close_on_exec()), (7, 16, true));
        assert_eq!(info.file_flags(), (libc::O_RDWR | libc::O_NONBLOCK) as u32);
        assert_eq!((info.eventfd_counter(), info.timer(), info.locks()), (None, None, Some(vec![])));
        assert_eq!(FdInfo::parse("pos:\tx\nflags:\t0\nmnt_id:\t1\n"), None);
    }

    #[test]
    fn events() {
        let of = info("eventfd-count:               2a\neventfd-id: 3\neventfd-semaphore: 1\n");
        assert_eq!((of.eventfd_counter(), of.eventfd_semaphore()), (Some(42), Some(true)));
        assert_eq!(info("sigmask:\t0000000000000200\n").signalfd_mask(), Some(0x200));
        let timer =
            info("clockid: 1\nticks: 3\nsettime flags: 01\nit_value: (4, 500)\nit_interval: (60, 0)\n");
        let want = TimerState { clock: 1, ticks: 3, settime_flags: 1, value: (4, 500), interval: (60, 0) };
        assert_eq!(timer.timer(), Some(want));
        assert_eq!(info("Pid:\t42\nNSpid:\t42\n").pidfd_target(), Some(42));
    }

    #[test]
    fn targets_and_watches() {
        let of = info(
            "tfd:        5 events:       19 data:                7  pos:3 ino:61af sdev:7\n\
             tfd:       10 events: 80000001 data: ffffffffffffffff  pos:0 ino:1 sdev:8\n",
        );
        let targets = of.epoll_targets().unwrap();
        assert_eq!(targets[0], EpollTarget { fd: 5, events: 0x19, data: 7, pos: 3, inode: 0x61af, dev: 7 });
        assert_eq!((targets[1].fd, targets[1].events, targets[1].data), (10, 0x8000_0001, u64::MAX));
        let of = info(
            "inotify wd:2 ino:7e9e sdev:800013 mask:800afce ignored_mask:0 fhandle-bytes:8 fhandle-type:1 f_handle:7e9e0000640d1b6d\n\
             inotify wd:1 ino:192 sdev:4 mask:2 ignored_mask:0 \n",
        );
        let watches = of.inotify_watches().unwrap();
        assert_eq!((watches[0].wd, watches[0].dev, watches[0].mask), (2, 0x80_0013, 0x800_afce));
        assert_eq!(watches[0].handle, Some((1, vec![0x7e, 0x9e, 0, 0, 0x64, 0x0d, 0x1b, 0x6d])));
        assert_eq!(watches[1].handle, None);
        assert_eq!(info("tfd: nonsense\n").epoll_targets(), None);
    }

    #[test]
    fn locks() {
        let of = info(
            "lock:\t1: FLOCK  ADVISORY  WRITE 359 00:13:11691 0 EOF\n\
             lock:\t2: POSIX  ADVISORY  READ  359 00:13:11691 10 19\n",
        );
        let locks = of.locks().unwrap();
        assert_eq!((locks[0].kind.as_str(), locks[0].pid, locks[0].end), ("FLOCK", 359, None));
        assert_eq!((locks[1].access.as_str(), locks[1].start, locks[1].end), ("READ", 10, Some(19)));
        assert_eq!(info("lock:\tnonsense\n").locks(), None);
    }
}
