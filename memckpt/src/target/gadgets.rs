//! Instructions that are there already: nothing is ever written to a target's text.

use crate::addr::AddrRange;
use crate::kernel::maps::{Prot, Vma};

use super::proc;

/// `syscall; ret`
const SYSCALL_RET: &[u8] = b"\x0f\x05\xc3";
/// `mov $15, %rax; syscall`, as glibc and ld.so have it, and `mov $15, %eax; syscall`, as musl and Go.
const SIGRETURN: [&[u8]; 2] = [b"\x48\xc7\xc0\x0f\0\0\0\x0f\x05", b"\xb8\x0f\0\0\0\x0f\x05"];
/// The longest of them.
const LONGEST: usize = 9;
/// Text is read in pieces of this size.
const PIECE: u64 = 1 << 20;

/// Where a target has what the parasite needs of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Gadgets {
    /// `syscall; ret`
    pub(super) syscall: u64,
    /// A call of rt_sigreturn.
    pub(super) sigreturn: u64,
}

impl Gadgets {
    /// Looks for them in the files that `pid` executes.
    pub(super) fn find(pid: i32, maps: &[Vma]) -> Option<Self> {
        let (mut syscall, mut sigreturn) = (None, None);
        let mut text: Vec<&Vma> = maps.iter().filter(|vma| is_lasting_text(vma)).collect();
        text.sort_by_key(|vma| !is_libc(&vma.name));
        for vma in text {
            for piece in pieces(vma.range) {
                let mut bytes = vec![0; piece.len() as usize];
                let Ok(len) = proc::read_memory(pid, piece.start.get(), &mut bytes) else { break };
                let found = |pattern| find(&bytes[..len], pattern).map(|at| piece.start.get() + at as u64);
                syscall = syscall.or_else(|| found(SYSCALL_RET));
                sigreturn = sigreturn.or_else(|| SIGRETURN.into_iter().find_map(found));
                if let (Some(syscall), Some(sigreturn)) = (syscall, sigreturn) {
                    return Some(Self { syscall, sigreturn });
                }
            }
        }
        None
    }

    /// Whether they are still there.
    pub(super) fn still_there(self, pid: i32) -> bool {
        let starts_with = |address, pattern: &[u8]| {
            let mut bytes = [0; LONGEST];
            let bytes = &mut bytes[..pattern.len()];
            proc::read_memory(pid, address, bytes).is_ok_and(|n| n == bytes.len()) && bytes == pattern
        };
        starts_with(self.syscall, SYSCALL_RET) && SIGRETURN.iter().any(|p| starts_with(self.sigreturn, p))
    }
}

/// Text of a file: compilers at run time throw theirs away. Not the vsyscall page, which only looks executable.
fn is_lasting_text(vma: &Vma) -> bool {
    vma.prot == Prot::READ | Prot::EXEC && !vma.shared && (!vma.is_anonymous() || vma.name == "[vdso]")
}

fn is_libc(name: &str) -> bool {
    name.rsplit('/').next().is_some_and(|file| file.starts_with("libc.so") || file.starts_with("libc-"))
}

/// The range in pieces that overlap by what a pattern across a border needs.
fn pieces(range: AddrRange) -> impl Iterator<Item = AddrRange> {
    let mut at = range.start.get();
    std::iter::from_fn(move || {
        (at < range.end.get()).then(|| {
            let end = (at + PIECE + LONGEST as u64 - 1).min(range.end.get());
            let piece = AddrRange::new(at, end);
            at += PIECE;
            piece
        })
    })
}

fn find(bytes: &[u8], pattern: &[u8]) -> Option<usize> {
    bytes.windows(pattern.len()).position(|window| window == pattern)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_cover_borders() {
        let all: Vec<_> = pieces(AddrRange::new(0x1000, 0x1000 + 2 * PIECE + 5)).collect();
        assert_eq!(all.len(), 3);
        assert!(all.windows(2).all(|w| w[0].end.get() - w[1].start.get() >= 5));
        assert_eq!(all[2].end.get(), 0x1000 + 2 * PIECE + 5);
    }

    #[test]
    fn this_process_has_them() {
        let me = std::process::id() as i32;
        let gadgets = crate::kernel::maps::read(me).ok().and_then(|maps| Gadgets::find(me, &maps));
        assert!(gadgets.is_some_and(|g| g.still_there(me)), "{gadgets:?}");
    }
}
