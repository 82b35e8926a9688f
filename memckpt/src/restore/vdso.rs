//! The kernel's own areas: vDSO and its variables. Every process has those of this boot; they go where the old ones were.

use crate::addr::{Addr, AddrRange};
use crate::image::Chain;
use crate::image::proto::VmaEntry;
use crate::kernel::maps::{self, Vma};
use crate::kernel::memory::ProcMem;
use crate::plan::classify::VmaStatus;

use super::batch::Batch;
use super::checkpoint::range;
use super::error::{Refusal, RestoreError};
use super::memory::status;

/// `syscall`
const SYSCALL: [u8; 2] = [0x0f, 0x05];

/// Where they are in this process, and so in every one that it forks.
#[derive(Debug)]
pub(super) struct KernelAreas {
    areas: Vec<AddrRange>,
    /// The vDSO, within them.
    vdso: AddrRange,
    code: Vec<u8>,
}

impl KernelAreas {
    pub(super) fn ours() -> Result<Self, RestoreError> {
        let pid = std::process::id() as i32;
        let maps = maps::read(pid)?;
        let named = |vma: &&Vma| vma.name == "[vdso]" || vma.name.starts_with("[vvar");
        let areas: Vec<&Vma> = maps.iter().filter(named).collect();
        let vdso = areas.iter().find(|vma| vma.name == "[vdso]").map(|vma| vma.range);
        let Some(vdso) = vdso else {
            return Err(Refusal::Checkpoint("this kernel was started without a vDSO (vdso=0)".into()).into());
        };
        let mut code = vec![0; vdso.len() as usize];
        ProcMem::open(pid).and_then(|mem| mem.read_at(vdso.start, &mut code))?;
        Ok(Self { areas: areas.iter().map(|vma| vma.range).collect(), vdso, code })
    }

    /// From the first to the last.
    fn span(&self) -> AddrRange {
        let start = self.areas.iter().map(|area| area.start).min().unwrap_or_default();
        let end = self.areas.iter().map(|area| area.end).max().unwrap_or_default();
        AddrRange { start, end }
    }

    /// Where the first begins here.
    pub(super) fn start(&self) -> Addr {
        self.span().start
    }

    /// Bytes from the first to the last.
    pub(super) fn len(&self) -> u64 {
        self.span().len()
    }

    pub(super) fn ranges(&self) -> impl Iterator<Item = AddrRange> {
        self.areas.iter().copied()
    }

    /// Moves them so that the first begins at `to`, with the distances that they have. `from` is where it begins now.
    pub(super) fn move_to(&self, from: Addr, to: Addr, batch: &mut Batch<'_>) -> Result<(), RestoreError> {
        let span = self.span();
        for area in &self.areas {
            let offset = area.start.get() - span.start.get();
            let (old, new, len) = (from.get() + offset, to.get() + offset, area.len());
            let flags = (libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED) as u64;
            batch.call_for(new as i64, "mremap", libc::SYS_mremap, [old, len, len, flags, new])?;
        }
        Ok(())
    }

    /// Where they begin in a process with these areas; absent where it has none of them.
    pub(super) fn place_in(
        &self,
        pid: i32,
        vmas: &[VmaEntry],
        memory: &Chain,
    ) -> Result<Option<Addr>, RestoreError> {
        let with = |bit| vmas.iter().find(|vma| status(vma).contains(bit)).map(range);
        let (vdso, vvar) = (with(VmaStatus::VDSO), with(VmaStatus::VVAR));
        let Some(vdso) = vdso else { return Ok(None) };
        let start = vvar.map_or(vdso.start, |vvar| vvar.start.min(vdso.start));
        let offset = self.vdso.start.get() - self.span().start.get();
        let same_shape = vdso.len() == self.vdso.len()
            && vdso.start.get().checked_sub(start.get()) == Some(offset)
            && vvar.is_some_and(|vvar| vvar.len() + vdso.len() == self.len());
        let mut code = vec![0; vdso.len() as usize];
        let known = memory.read(vdso, &mut code).is_ok();
        if !same_shape || known && code != self.code {
            let what =
                "its vDSO is another kernel's: restore it under the kernel that it was dumped under".into();
            return Err(Refusal::State { pid, what }.into());
        }
        Ok(Some(start))
    }

    /// A `syscall` instruction in the vDSO, if they begin at `start`.
    pub(super) fn syscall(&self, start: Addr) -> Option<u64> {
        let at = self.code.windows(2).position(|bytes| bytes == SYSCALL)?;
        Some(start.get() + (self.vdso.start.get() - self.span().start.get()) + at as u64)
    }
}
