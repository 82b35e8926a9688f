//! What an infection needs and can be had before the freeze; and the reasons not to infect.

use std::fs;
use std::io;
use std::os::fd::OwnedFd;

use super::adopt;
use super::blob::{SEGMENT_LEN, XSAVE_LEN};
use super::gadgets::Gadgets;
use super::proc;
use super::segment::{self, Segment};
use super::stack::Stacks;
use crate::addr::{Addr, AddrRange, PAGE_SIZE};
use crate::kernel::SyscallError;
use crate::kernel::maps::{self, MapsError, MapsFile, Vma};
use crate::kernel::{pidfd, process};

/// Why infecting a process would be unsafe, or cannot work: take its memory without a parasite instead.
#[derive(Debug, thiserror::Error)]
pub enum InfectRefusal {
    /// There is nothing to call the kernel with.
    #[error("none of its files has the instructions `syscall; ret` and rt_sigreturn that a parasite needs")]
    NoGadgets,
    /// Strict seccomp mode.
    #[error("it runs in seccomp's strict mode")]
    SeccompStrict,
    /// Its filters cannot be read.
    #[error("it has a seccomp filter, which only CAP_SYS_ADMIN may read")]
    SeccompUnreadable,
    /// A filter does not allow a call that the parasite makes.
    #[error("its seccomp filter does not allow system call {0}")]
    SeccompForbids(i64),
    /// A return address of ours would not be on it.
    #[error("it has a user shadow stack")]
    ShadowStack,
    /// No address space left.
    #[error("its address space limit (RLIMIT_AS) of {limit} bytes is all but reached")]
    AddressSpaceLimit {
        /// The limit.
        limit: u64,
    },
    /// No VMA left.
    #[error("it has {count} mappings, and vm.max_map_count is {limit}")]
    MapCount {
        /// How many it has.
        count: usize,
        /// The limit.
        limit: usize,
    },
    /// Segments do not outlive their maker.
    #[error("kernel.shm_rmid_forced is set")]
    RmidForced,
    /// 32-bit code.
    #[error("all its threads run 32-bit code")]
    Not64Bit,
    /// AMX state does not fit in a signal frame unasked.
    #[error("all its threads hold AMX tiles")]
    Amx,
    /// All stacks are tiny or unknown.
    #[error("none of its threads stands on a stack that is known to have room")]
    NoStack,
    /// No XSAVE.
    #[error("this processor or kernel does not offer XSAVE, or its state is larger than {XSAVE_LEN} bytes")]
    NoXsave,
    /// Its mappings are everywhere.
    #[error("no hole of 2 GiB was found in its address space")]
    NoAddress,
    /// No shared segment.
    #[error("no shared segment for it")]
    Segment(#[source] SyscallError),
    /// No descriptor of it.
    #[error("no descriptor of the process")]
    Pidfd(#[source] SyscallError),
    /// Its layout cannot be read.
    #[error(transparent)]
    Maps(#[from] MapsError),
    /// Its /proc files do not open.
    #[error("cannot read {path}")]
    Unreadable {
        /// Which.
        path: String,
        /// Why.
        source: io::Error,
    },
}

/// Everything ready for [`super::Frozen::infect`]: the segment holds the code, nothing of the target was touched.
pub struct Injection {
    pub(super) pid: i32,
    uid: u32,
    pub(super) segment: Segment,
    pub(super) gadgets: Gadgets,
    pub(super) stacks: Stacks,
    pub(super) address: u64,
    pub(super) xfeatures: u64,
    pub(super) xsave_len: u64,
    /// Segments of killed memckpts in the target.
    pub(super) leftovers: Vec<u64>,
    maps: MapsFile,
    pub(super) pidfd: OwnedFd,
}

impl std::fmt::Debug for Injection {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Injection")
            .field("pid", &self.pid)
            .field("address", &self.address)
            .finish_non_exhaustive()
    }
}

impl Injection {
    /// Looks at the running process and makes the segment.
    ///
    /// # Errors
    /// The reason why it should not be infected. Some can only be told of a frozen thread: see
    /// [`super::InfectError::Refused`].
    pub fn prepare(pid: i32) -> Result<Self, InfectRefusal> {
        let unreadable = |file: &str| {
            let path = format!("/proc/{pid}/{file}");
            move |source| InfectRefusal::Unreadable { path, source }
        };
        let status = proc::status(pid, pid).map_err(unreadable("status"))?;
        match status.field("Seccomp") {
            Some("1") => return Err(InfectRefusal::SeccompStrict),
            Some("2") if !may_read_filters() => return Err(InfectRefusal::SeccompUnreadable),
            _ => {}
        }
        if has_shadow_stack(&status) {
            return Err(InfectRefusal::ShadowStack);
        }
        if segment::rmid_is_forced().unwrap_or(false) {
            return Err(InfectRefusal::RmidForced);
        }
        let maps = maps::read(pid)?;
        check_limits(pid, &status, &maps)?;
        let gadgets = Gadgets::find(pid, &maps).ok_or(InfectRefusal::NoGadgets)?;
        let (xfeatures, xsave_len) = extended_state_of_this_cpu().ok_or(InfectRefusal::NoXsave)?;
        let uid =
            status.field("Uid").and_then(|ids| ids.split_whitespace().nth(1)?.parse().ok()).unwrap_or(0);
        if let Err(error) = segment::sweep(pid) {
            tracing::debug!(pid, %error, "orphaned segments not swept");
        }
        Ok(Self {
            pid,
            uid,
            segment: Segment::create(pid, uid).map_err(InfectRefusal::Segment)?,
            gadgets,
            stacks: Stacks::of(&maps),
            address: free_address(&maps, seed()).ok_or(InfectRefusal::NoAddress)?,
            xfeatures,
            xsave_len,
            leftovers: adopt::leftovers(pid, &maps),
            maps: MapsFile::open(pid).map_err(InfectRefusal::Maps)?,
            pidfd: pidfd::open(pid).map_err(InfectRefusal::Pidfd)?,
        })
    }

    /// A second one, for another thread of the same process: with a segment of its own.
    ///
    /// # Errors
    /// As [`Self::prepare`].
    pub fn another(&self) -> Result<Self, InfectRefusal> {
        let maps = maps::read(self.pid)?;
        Ok(Self {
            pid: self.pid,
            uid: self.uid,
            segment: Segment::create(self.pid, self.uid).map_err(InfectRefusal::Segment)?,
            gadgets: self.gadgets,
            stacks: Stacks::of(&maps),
            address: free_address(&maps, seed()).ok_or(InfectRefusal::NoAddress)?,
            xfeatures: self.xfeatures,
            xsave_len: self.xsave_len,
            // The first one's business.
            leftovers: Vec::new(),
            maps: MapsFile::open(self.pid).map_err(InfectRefusal::Maps)?,
            pidfd: pidfd::open(self.pid).map_err(InfectRefusal::Pidfd)?,
        })
    }

    /// Whether nothing lies where the parasite shall. Asked of maps: a read of unmapped memory takes the target's mmap
    /// lock for writing, to look for a stack that may grow (expand_stack(), mm/mmap.c), and the tracker would see that.
    pub(super) fn address_is_free(&self) -> bool {
        let ours = AddrRange::with_len(Addr(self.address), SEGMENT_LEN as u64);
        self.maps.query(ours).is_ok_and(|there| there.is_empty())
    }
}

/// Whether a thread's returns are checked against a second stack (Linux 6.6, `x86_Thread_features`).
pub(super) fn has_shadow_stack(status: &proc::Status) -> bool {
    status.field("x86_Thread_features").is_some_and(|features| features.contains("shstk"))
}

/// PTRACE_SECCOMP_GET_FILTER wants CAP_SYS_ADMIN, and that we have no filter ourselves (kernel/seccomp.c).
fn may_read_filters() -> bool {
    const CAP_SYS_ADMIN: u64 = 1 << 21;
    let me = std::process::id() as i32;
    proc::status(me, me)
        .is_ok_and(|s| s.signals("CapEff") & CAP_SYS_ADMIN != 0 && s.field("Seccomp") == Some("0"))
}

fn check_limits(pid: i32, status: &proc::Status, maps: &[Vma]) -> Result<(), InfectRefusal> {
    /// Others may map something between now and the freeze.
    const SLACK: u64 = 1 << 20;
    let limits = process::resource_limits(pid).unwrap_or_default();
    let limit = limits.get(libc::RLIMIT_AS as usize).and_then(|limit| limit.soft);
    let used = status.number("VmSize").unwrap_or(0) * 1024;
    if let Some(limit) = limit.filter(|limit| used + SEGMENT_LEN as u64 + SLACK > *limit) {
        return Err(InfectRefusal::AddressSpaceLimit { limit });
    }
    let most = fs::read_to_string("/proc/sys/vm/max_map_count").ok().and_then(|v| v.trim().parse().ok());
    match most {
        Some(limit) if maps.len() + 8 > limit => Err(InfectRefusal::MapCount { count: maps.len(), limit }),
        _ => Ok(()),
    }
}

/// Where parasites go: far below where the kernel puts programs (0x55...), libraries and stacks (0x7f...).
pub(super) const PLACES: AddrRange = AddrRange::new(0x1000_0000_0000, 0x5000_0000_0000);

/// A page where nothing lies within a GiB, so that nothing will until the freeze; picked at random, since a killed
/// memckpt's parasite may be about to leave its own.
fn free_address(maps: &[Vma], mut seed: u64) -> Option<u64> {
    const AROUND: u64 = 1 << 30;
    for _ in 0..1000 {
        seed = seed.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(0x1405_7b7e_f767_814f);
        let address = (PLACES.start.get() + (seed >> 16) % PLACES.len()) & !(PAGE_SIZE - 1);
        let around = AddrRange::with_len(Addr(address - AROUND), 2 * AROUND);
        if !maps.iter().any(|vma| vma.range.overlaps(around)) {
            return Some(address);
        }
    }
    None
}

fn seed() -> u64 {
    let mut bytes = [0; 8];
    // SAFETY: getrandom writes eight bytes at most.
    unsafe { libc::getrandom(bytes.as_mut_ptr().cast(), bytes.len(), libc::GRND_NONBLOCK) };
    u64::from_le_bytes(bytes) ^ u64::from(std::process::id())
}

/// The features that XSAVE shall save, and how many bytes they take in the standard format. AMX's tiles are left out:
/// a process that did not ask for them may not have them in a signal frame.
fn extended_state_of_this_cpu() -> Option<(u64, u64)> {
    use std::arch::asm;
    use std::arch::x86_64::{__cpuid, __cpuid_count};
    const OSXSAVE: u32 = 1 << 27;
    const LEGACY_AND_HEADER: u64 = 576;
    if __cpuid(1).ecx & OSXSAVE == 0 {
        return None;
    }
    let (low, high): (u32, u32);
    // SAFETY: the kernel lets user mode read XCR0, as the bit just tested says.
    unsafe { asm!("xgetbv", in("ecx") 0, out("eax") low, out("edx") high, options(nomem, nostack)) };
    let features = (u64::from(high) << 32 | u64::from(low)) & !AMX_STATE;
    let mut len = LEGACY_AND_HEADER;
    for n in (2..63).filter(|n| features >> n & 1 != 0) {
        let component = __cpuid_count(13, n);
        len = len.max(u64::from(component.eax) + u64::from(component.ebx));
    }
    (len + 4 <= XSAVE_LEN as u64).then_some((features, len))
}

/// XTILECFG and XTILEDATA in XCR0.
pub(super) const AMX_STATE: u64 = 3 << 17;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::maps::Prot;

    #[test]
    fn the_address_keeps_its_distance() {
        let busy = Vma {
            range: AddrRange::new(0x1000_0000_0000, 0x3000_0000_0000),
            prot: Prot::empty(),
            shared: false,
            offset: 0,
            dev: (0, 0),
            inode: 0,
            name: String::new(),
        };
        for seed in 0..1000 {
            let address = free_address(std::slice::from_ref(&busy), seed);
            assert!(address.is_some_and(|a| a.is_multiple_of(4096) && a >= 0x3000_4000_0000), "{address:?}");
        }
    }

    #[test]
    fn this_cpu_has_sse_at_least() {
        assert!(extended_state_of_this_cpu().is_some_and(|(features, len)| features & 3 == 3 && len >= 576));
    }
}
