//! `/proc/PID/maps` (proc(5)) and its PROCMAP_QUERY ioctl (Linux 6.11): the truth about the layout.

mod query;

use std::io::Read;

use bitflags::bitflags;
use serde::{Deserialize, Serialize};

use super::SyscallError;
use crate::addr::AddrRange;

pub use query::MapsFile;

bitflags! {
    /// A VMA's protection, as in mmap(2).
    #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
    #[serde(transparent)]
    pub struct Prot: u8 {
        /// PROT_READ
        const READ = 1;
        /// PROT_WRITE
        const WRITE = 2;
        /// PROT_EXEC
        const EXEC = 4;
    }
}

/// One line of `/proc/PID/maps`: a virtual memory area.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Vma {
    /// Its addresses, page-aligned.
    pub range: AddrRange,
    /// Its protection.
    pub prot: Prot,
    /// MAP_SHARED rather than MAP_PRIVATE.
    pub shared: bool,
    /// Offset in the file, in bytes; 0 for anonymous memory.
    pub offset: u64,
    /// Major and minor number of the file's device; (0, 0) for anonymous memory.
    pub dev: (u32, u32),
    /// The file's inode; 0 for anonymous memory, and for the System V segment whose id is 0.
    pub inode: u64,
    /// Path or pseudo-name exactly as maps prints it (`/usr/bin/x`, `[heap]`, ` (deleted)` included), or empty.
    /// A newline in it stays the kernel's `\012`; bytes that are not UTF-8 become U+FFFD.
    pub name: String,
}

impl Vma {
    /// Whether no file is behind it, not even one of the kernel's own as for shared memory. Every file system has a
    /// device, but not every file an inode number: that of a System V segment is its id, the first of a boot 0
    /// (ipc/shm.c, newseg).
    #[must_use]
    pub fn is_anonymous(&self) -> bool {
        self.dev == (0, 0)
    }

    /// Whether its file is on one of the kernel's internal mounts and its name begins with `prefix`. The major number of
    /// their devices is 0, so that a path of that name elsewhere is not mistaken for one.
    #[must_use]
    pub fn is_internal(&self, prefix: &str) -> bool {
        self.dev.0 == 0 && !self.is_anonymous() && self.name.starts_with(prefix)
    }

    /// Whether it maps a memfd.
    #[must_use]
    pub fn is_memfd(&self) -> bool {
        self.is_internal("/memfd:")
    }

    /// Whether the two are the same but for their names.
    #[must_use]
    pub fn is_alike(&self, other: &Self) -> bool {
        let of = |v: &Self| (v.range, v.prot, v.shared, v.offset, v.dev, v.inode);
        of(self) == of(other)
    }
}

/// Why the layout could not be read.
#[derive(Debug, thiserror::Error)]
pub enum MapsError {
    /// A system call failed.
    #[error(transparent)]
    Syscall(#[from] SyscallError),
    /// A line that is not what proc(5) describes.
    #[error("/proc/PID/maps has a line that is not understood: {line:?}")]
    Malformed {
        /// The line.
        line: String,
    },
    /// The address space is gone: the process exited, or it executed another program after the file was opened.
    #[error("the address space of process {pid} no longer exists")]
    Gone {
        /// The process.
        pid: i32,
    },
}

/// Reads the layout of process `pid`: every VMA in order of addresses, `[vsyscall]` included.
///
/// The result is a snapshot only while no thread of the process can run.
///
/// # Errors
/// [`MapsError::Syscall`] when maps cannot be opened or read; [`MapsError::Gone`] for a zombie or kernel thread.
pub fn read(pid: i32) -> Result<Vec<Vma>, MapsError> {
    let path = format!("/proc/{pid}/maps");
    let mut file = std::fs::File::open(&path).map_err(|e| SyscallError::new("open", &path, e))?;
    let mut text = Vec::with_capacity(64 << 10);
    file.read_to_end(&mut text).map_err(|e| SyscallError::new("read", path, e))?;
    if text.is_empty() {
        return Err(MapsError::Gone { pid });
    }
    parse(&text)
}

/// Parses the text of a maps file.
///
/// # Errors
/// [`MapsError::Malformed`] names the first line that is not understood.
pub fn parse(mut text: &[u8]) -> Result<Vec<Vma>, MapsError> {
    let mut vmas = Vec::with_capacity(text.len() / 80);
    while !text.is_empty() {
        let end = text.iter().position(|&b| b == b'\n').unwrap_or(text.len());
        let line = &text[..end];
        text = text.get(end + 1..).unwrap_or_default();
        let vma = parse_line(line)
            .ok_or_else(|| MapsError::Malformed { line: String::from_utf8_lossy(line).into_owned() })?;
        vmas.push(vma);
    }
    Ok(vmas)
}

/// Parses one line, without its newline; smaps heads its sections with the same line.
pub(super) fn parse_line(line: &[u8]) -> Option<Vma> {
    let mut rest = Fields(line);
    let start = rest.hex(b'-')?;
    let end = rest.hex(b' ')?;
    let perms = rest.take(5)?;
    let mut prot = Prot::empty();
    prot.set(Prot::READ, perms[0] == b'r');
    prot.set(Prot::WRITE, perms[1] == b'w');
    prot.set(Prot::EXEC, perms[2] == b'x');
    let shared = match perms[3] {
        b's' => true,
        b'p' => false,
        _ => return None,
    };
    let offset = rest.hex(b' ')?;
    let major = rest.hex(b':')?;
    let minor = rest.hex(b' ')?;
    let inode = rest.decimal()?;
    // Padding up to the name's column. A path starts with a slash, a pseudo-name with a bracket or a word: never a space.
    let name = match rest.0.iter().position(|&b| b != b' ') {
        Some(at) => String::from_utf8_lossy(&rest.0[at..]).into_owned(),
        None => String::new(),
    };
    (start < end).then(|| Vma {
        range: AddrRange::new(start, end),
        prot,
        shared,
        offset,
        dev: (major as u32, minor as u32),
        inode,
        name,
    })
}

struct Fields<'a>(&'a [u8]);

impl<'a> Fields<'a> {
    /// A hexadecimal number that ends with `end`.
    fn hex(&mut self, end: u8) -> Option<u64> {
        let mut value = 0u64;
        for (i, &b) in self.0.iter().enumerate() {
            let digit = match b {
                b'0'..=b'9' => b - b'0',
                b'a'..=b'f' => b - b'a' + 10,
                _ if b == end && i > 0 => {
                    self.0 = &self.0[i + 1..];
                    return Some(value);
                }
                _ => return None,
            };
            if value >> 60 != 0 {
                return None;
            }
            value = value << 4 | u64::from(digit);
        }
        None
    }

    /// A decimal number that ends with a space or with the line.
    fn decimal(&mut self) -> Option<u64> {
        let len = self.0.iter().position(|&b| b == b' ').unwrap_or(self.0.len());
        let (digits, rest) = self.0.split_at(len);
        self.0 = rest;
        std::str::from_utf8(digits).ok()?.parse().ok()
    }

    fn take(&mut self, n: usize) -> Option<&'a [u8]> {
        let (head, rest) = self.0.split_at_checked(n)?;
        self.0 = rest;
        Some(head)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_every_form_of_line() {
        let text = b"\
55d0c0a00000-55d0c0a02000 r--p 00001000 fd:01 1311                       /usr/bin/a b (deleted)
55d0c0b00000-55d0c0b21000 rw-p 00000000 00:00 0                          [heap]
7f0000000000-7f0000001000 ---p 00000000 00:00 0
7f0000001000-7f0000002000 rw-s 00000000 00:01 4026                       /SYSV00000000 (deleted)
7f0000002000-7f0000003000 rw-p 00000000 00:00 0                          [anon: a name]
7f0000003000-7f0000004000 r-xp 00000000 103:02 9                         /tmp/new\\012line
7f0000004000-7f0000005000 rw-p 00000000 00:00 0\x20
ffffffffff600000-ffffffffff601000 --xp 00000000 00:00 0                  [vsyscall]
";
        let vmas = parse(text).unwrap();
        let names: Vec<&str> = vmas.iter().map(|v| v.name.as_str()).collect();
        assert_eq!(
            names,
            [
                "/usr/bin/a b (deleted)",
                "[heap]",
                "",
                "/SYSV00000000 (deleted)",
                "[anon: a name]",
                "/tmp/new\\012line",
                "",
                "[vsyscall]"
            ]
        );
        assert_eq!(vmas[0].range, AddrRange::new(0x55d0_c0a0_0000, 0x55d0_c0a0_2000));
        assert_eq!((vmas[0].offset, vmas[0].dev, vmas[0].inode), (0x1000, (0xfd, 1), 1311));
        assert_eq!(vmas[0].prot, Prot::READ);
        assert_eq!(vmas[2].prot, Prot::empty());
        assert!(vmas[3].shared && !vmas[2].shared);
        assert_eq!(vmas[5].dev, (0x103, 2));
        assert_eq!(vmas[7].range.end.get(), 0xffff_ffff_ff60_1000);
    }

    #[test]
    fn a_strange_line_is_an_error_that_shows_it() {
        for bad in [
            "x",
            "1000-2000 rw-p",
            "2000-1000 rw-p 0 0:0 0 ",
            "1000-2000 rw-? 0 0:0 0 ",
            "10000000000000000-2 rw-p 0 0:0 0",
        ] {
            match parse(bad.as_bytes()) {
                Err(MapsError::Malformed { line }) => assert_eq!(line, bad),
                other => panic!("{bad:?} gave {other:?}"),
            }
        }
    }

    #[test]
    fn an_empty_file_has_no_vmas() {
        assert_eq!(parse(b"").unwrap(), []);
    }
}
