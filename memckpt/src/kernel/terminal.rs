//! What a terminal is set to: ioctl_tty(2), termios(3).

use std::io;
use std::os::fd::{AsRawFd as _, BorrowedFd};

/// Control characters of a struct termios (include/uapi/asm-generic/termbits.h).
pub const CONTROL_CHARACTERS: usize = 19;

/// TCGETS and TIOCGLCKTRMIOS.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LineSettings {
    /// c_iflag, c_oflag, c_cflag, c_lflag.
    pub flags: [u32; 4],
    /// The line discipline.
    pub line: u8,
    /// The control characters.
    pub characters: [u8; CONTROL_CHARACTERS],
}

/// The settings of a terminal.
///
/// # Errors
/// It is none.
pub fn settings(terminal: BorrowedFd<'_>) -> io::Result<LineSettings> {
    get(terminal, libc::TCGETS).map(|bytes| parse(&bytes))
}

/// Which settings are locked.
///
/// # Errors
/// It is no terminal.
pub fn locked_settings(terminal: BorrowedFd<'_>) -> io::Result<LineSettings> {
    get(terminal, libc::TIOCGLCKTRMIOS).map(|bytes| parse(&bytes))
}

/// Rows, columns, and both in pixels.
///
/// # Errors
/// It is no terminal.
pub fn window(terminal: BorrowedFd<'_>) -> io::Result<[u16; 4]> {
    let bytes: [u8; 8] = get(terminal, libc::TIOCGWINSZ)?;
    Ok(std::array::from_fn(|n| u16::from_ne_bytes([bytes[2 * n], bytes[2 * n + 1]])))
}

/// Whether others may not open it (TIOCEXCL).
///
/// # Errors
/// It is no terminal.
pub fn is_exclusive(terminal: BorrowedFd<'_>) -> io::Result<bool> {
    int(terminal, libc::TIOCGEXCL).map(|value| value != 0)
}

/// The number of the pseudoterminal whose master this is.
///
/// # Errors
/// It is no master.
pub fn number_of_master(master: BorrowedFd<'_>) -> io::Result<u32> {
    int(master, libc::TIOCGPTN).map(|value| value as u32)
}

/// Whether the slave of this master cannot be opened (TIOCSPTLCK).
///
/// # Errors
/// It is no master.
pub fn is_locked(master: BorrowedFd<'_>) -> io::Result<bool> {
    int(master, libc::TIOCGPTLCK).map(|value| value != 0)
}

/// Whether the master is in packet mode.
///
/// # Errors
/// It is no master.
pub fn is_in_packet_mode(master: BorrowedFd<'_>) -> io::Result<bool> {
    int(master, libc::TIOCGPKT).map(|value| value != 0)
}

/// Session and foreground group that the pseudoterminal of a master controls, if it does.
///
/// # Errors
/// It is no master, and is not our controlling terminal.
pub fn controlled_by_master(master: BorrowedFd<'_>) -> io::Result<Option<(i32, i32)>> {
    match int(master, libc::TIOCGSID) {
        Ok(session) => Ok(Some((session, int(master, libc::TIOCGPGRP)?))),
        Err(error) if error.raw_os_error() == Some(libc::ENOTTY) => Ok(None),
        Err(error) => Err(error),
    }
}

/// Sets what [`settings`] reads.
///
/// # Errors
/// It is no terminal.
pub fn set_settings(terminal: BorrowedFd<'_>, settings: &LineSettings) -> io::Result<()> {
    set(terminal, libc::TCSETS, &bytes(settings))
}

/// Sets what [`locked_settings`] reads. Needs CAP_SYS_ADMIN.
///
/// # Errors
/// It is no terminal, or we lack the right.
pub fn set_locked_settings(terminal: BorrowedFd<'_>, settings: &LineSettings) -> io::Result<()> {
    set(terminal, libc::TIOCSLCKTRMIOS, &bytes(settings))
}

/// Sets what [`window`] reads.
///
/// # Errors
/// It is no terminal.
pub fn set_window(terminal: BorrowedFd<'_>, window: [u16; 4]) -> io::Result<()> {
    set(terminal, libc::TIOCSWINSZ, &window.map(u16::to_ne_bytes).concat())
}

/// From now on others may not open it (TIOCEXCL).
///
/// # Errors
/// It is no terminal.
pub fn make_exclusive(terminal: BorrowedFd<'_>) -> io::Result<()> {
    set(terminal, libc::TIOCEXCL, &[])
}

/// Says whether the slave of this master can be opened (TIOCSPTLCK).
///
/// # Errors
/// It is no master.
pub fn lock(master: BorrowedFd<'_>, locked: bool) -> io::Result<()> {
    set(master, libc::TIOCSPTLCK, &i32::from(locked).to_ne_bytes())
}

/// Says whether the master is in packet mode (TIOCPKT).
///
/// # Errors
/// It is no master.
pub fn set_packet_mode(master: BorrowedFd<'_>, on: bool) -> io::Result<()> {
    set(master, libc::TIOCPKT, &i32::from(on).to_ne_bytes())
}

/// Hands over bytes, as many as the request reads.
fn set(terminal: BorrowedFd<'_>, request: libc::Ioctl, bytes: &[u8]) -> io::Result<()> {
    // SAFETY: the requests above read four bytes, a struct winsize (8), a struct termios (36) or none, and their callers give so many.
    let rc = unsafe { libc::ioctl(terminal.as_raw_fd(), request, bytes.as_ptr()) };
    if rc < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

fn int(terminal: BorrowedFd<'_>, request: libc::Ioctl) -> io::Result<i32> {
    get(terminal, request).map(i32::from_ne_bytes)
}

/// Asks for `N` bytes, which is what each request above writes.
fn get<const N: usize>(terminal: BorrowedFd<'_>, request: libc::Ioctl) -> io::Result<[u8; N]> {
    let mut bytes = [0; N];
    // SAFETY: the requests above write four bytes, a struct winsize (8) or a struct termios (36), and their callers ask for so many.
    let rc = unsafe { libc::ioctl(terminal.as_raw_fd(), request, bytes.as_mut_ptr()) };
    if rc < 0 { Err(io::Error::last_os_error()) } else { Ok(bytes) }
}

/// struct termios: four words, a byte, the control characters.
fn parse(bytes: &[u8; 36]) -> LineSettings {
    LineSettings {
        flags: std::array::from_fn(|n| bytes[4 * n..4 * n + 4].try_into().map_or(0, u32::from_ne_bytes)),
        line: bytes[16],
        characters: std::array::from_fn(|n| bytes[17 + n]),
    }
}

/// As [`parse`] reads it.
fn bytes(settings: &LineSettings) -> [u8; 36] {
    let mut bytes = [0; 36];
    for (four, flags) in bytes.chunks_exact_mut(4).zip(settings.flags) {
        four.copy_from_slice(&flags.to_ne_bytes());
    }
    bytes[16] = settings.line;
    bytes[17..].copy_from_slice(&settings.characters);
    bytes
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::fd::AsFd as _;
    use std::os::unix::fs::OpenOptionsExt as _;

    use super::*;

    #[test]
    fn a_pair_is_told() {
        let master = File::options().read(true).write(true).open("/dev/ptmx").unwrap();
        assert!(is_locked(master.as_fd()).unwrap() && !is_in_packet_mode(master.as_fd()).unwrap());
        lock(master.as_fd(), false).unwrap();
        let number = number_of_master(master.as_fd()).unwrap();
        let slave = File::options()
            .read(true)
            .write(true)
            .custom_flags(libc::O_NOCTTY)
            .open(format!("/dev/pts/{number}"))
            .unwrap();
        assert!(!is_locked(master.as_fd()).unwrap() && !is_exclusive(slave.as_fd()).unwrap());
        // ^C, ^\\, DEL, ^U, ^D
        let settings = settings(slave.as_fd()).unwrap();
        assert_eq!(settings.characters[..5], [3, 28, 127, 21, 4]);
        assert_ne!(settings.flags[3] & libc::ICANON, 0);
        assert_eq!(locked_settings(slave.as_fd()).unwrap(), LineSettings::default());
        assert_eq!(window(slave.as_fd()).unwrap(), [0; 4]);
        let mut others = settings;
        others.characters[0] = 2;
        others.flags[3] &= !libc::ECHO;
        set_settings(slave.as_fd(), &others).unwrap();
        assert_eq!(super::settings(master.as_fd()).unwrap(), others);
        set_window(master.as_fd(), [1, 2, 3, 4]).unwrap();
        assert_eq!(window(slave.as_fd()).unwrap(), [1, 2, 3, 4]);
        set_packet_mode(master.as_fd(), true).unwrap();
        make_exclusive(slave.as_fd()).unwrap();
        assert!(is_in_packet_mode(master.as_fd()).unwrap() && is_exclusive(slave.as_fd()).unwrap());
        assert_eq!(controlled_by_master(master.as_fd()).unwrap().unwrap_or((0, 0)), (0, 0));
        assert!(number_of_master(slave.as_fd()).is_err());
    }
}
