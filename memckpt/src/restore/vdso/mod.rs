//! The kernel's own areas: vDSO and its variables. Every process has those of this boot. They go where the old ones were; or, if those
//! were another kernel's, elsewhere, and the functions of the old vDSO lead to them: programs have found them once and for all.

mod symbols;

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
use super::task::Task;

/// `movabs r11, ADDRESS; jmp r11`: r11 is nobody's across a call.
const JUMP: [u8; 13] = [0x49, 0xbb, 0, 0, 0, 0, 0, 0, 0, 0, 0x41, 0xff, 0xe3];
/// Where the address is in it.
const JUMP_TO: usize = 2;

/// Where the kernel's areas are in a process, and what is where they were.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Place {
    /// Where the first begins.
    pub(super) start: Addr,
    /// The vDSO of another kernel, whose functions lead to ours.
    pub(super) old: Option<OldVdso>,
}

/// A vDSO of another kernel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct OldVdso {
    range: AddrRange,
    code: Vec<u8>,
    /// Where its variables were. All zeroes, they say that there is no clock to be read without a system call
    /// (VDSO_CLOCKMODE_NONE, include/vdso/datapage.h); for what was not made to lead elsewhere.
    variables: Vec<AddrRange>,
}

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

    /// Takes them out of a process in which they begin at `at`.
    pub(super) fn unmap(&self, at: Addr, task: Task<'_>) -> Result<(), RestoreError> {
        for area in &self.areas {
            let start = at.get() + (area.start.get() - self.span().start.get());
            task.call_itself("munmap", libc::SYS_munmap, [start, area.len(), 0, 0, 0, 0])?;
        }
        Ok(())
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

    /// Where they shall be in a process with these areas: `home` where those were another kernel's. Absent where it has none of them.
    pub(super) fn place_in(
        &self,
        pid: i32,
        vmas: &[VmaEntry],
        memory: &Chain,
        home: Addr,
    ) -> Result<Option<Place>, RestoreError> {
        let with = |bit| vmas.iter().filter(move |vma| status(vma).contains(bit)).map(range);
        let Some(vdso) = with(VmaStatus::VDSO).next() else { return Ok(None) };
        let variables: Vec<AddrRange> = with(VmaStatus::VVAR).collect();
        let first = variables.iter().map(|range| range.start).min();
        let start = first.map_or(vdso.start, |first| first.min(vdso.start));
        let offset = self.vdso.start.get() - self.span().start.get();
        let same_shape = vdso.len() == self.vdso.len()
            && vdso.start.get().checked_sub(start.get()) == Some(offset)
            && variables.iter().map(|range| range.len()).sum::<u64>() + vdso.len() == self.len();
        let mut code = vec![0; vdso.len() as usize];
        let known = memory.read(vdso, &mut code).is_ok();
        if same_shape && (!known || code == self.code) {
            return Ok(Some(Place { start, old: None }));
        }
        let refused = |what: &str| RestoreError::from(Refusal::State { pid, what: what.to_owned() });
        if !known {
            return Err(refused(
                "its vDSO is another kernel's, and not in the images: restore it under the kernel that it was dumped under",
            ));
        }
        let target = home.get() + offset;
        redirect(&mut code, &self.code, target)
            .ok_or_else(|| refused("its vDSO is another kernel's, and cannot be read"))?;
        Ok(Some(Place { start: home, old: Some(OldVdso { range: vdso, code, variables }) }))
    }
}

impl OldVdso {
    /// Whether an instruction is within it.
    pub(super) fn contains(&self, address: u64) -> bool {
        self.range.contains(Addr(address))
    }

    /// Has a task map it.
    pub(super) fn map(&self, task: Task<'_>, batch: &mut Batch<'_>) -> Result<(), RestoreError> {
        let (read, write, execute) =
            (libc::PROT_READ as u64, libc::PROT_WRITE as u64, libc::PROT_EXEC as u64);
        let flags = (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED_NOREPLACE) as u64;
        let all = self.variables.iter().map(|range| (*range, read)).chain([(self.range, read | write)]);
        for (range, prot) in all {
            let (start, len) = (range.start.get(), range.len());
            let args = [start, len, prot, flags, u64::MAX, 0];
            batch.call_for(start as i64, "mmap", libc::SYS_mmap, args)?;
        }
        batch.flush()?;
        ProcMem::open(task.tid())?.write_at(self.range.start, &self.code)?;
        let args = [self.range.start.get(), self.range.len(), read | execute];
        batch.call("mprotect", libc::SYS_mprotect, args)
    }

    /// Has a task unmap it.
    pub(super) fn unmap(&self, batch: &mut Batch<'_>) -> Result<(), RestoreError> {
        for range in self.variables.iter().chain([&self.range]) {
            batch.call("munmap", libc::SYS_munmap, [range.start.get(), range.len()])?;
        }
        Ok(())
    }
}

/// Makes each function of `old` a jump to that of `new`, which lies at `target`. `None`: one of them cannot be read. What only the old
/// one has goes on to run, and finds no clock.
fn redirect(old: &mut [u8], new: &[u8], target: u64) -> Option<()> {
    let ours = symbols::functions(new)?;
    let theirs = symbols::functions(old)?;
    let jumps = theirs.iter().filter_map(|(name, at)| Some((*at, target + *ours.get(name)? as u64)));
    for (at, to) in jumps.collect::<Vec<_>>() {
        let jump = old.get_mut(at..at + JUMP.len())?;
        jump.copy_from_slice(&JUMP);
        jump[JUMP_TO..JUMP_TO + 8].copy_from_slice(&to.to_le_bytes());
    }
    Some(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_functions_of_an_old_one_lead_to_ours() {
        let ours = KernelAreas::ours().unwrap();
        let mut old = ours.code.clone();
        redirect(&mut old, &ours.code, 0x7000_0000).unwrap();
        let functions = symbols::functions(&ours.code).unwrap();
        let at = functions[&b"__vdso_time"[..]];
        assert_eq!(old[at..at + 2], JUMP[..2]);
        let to = u64::from_le_bytes(*old[at + 2..].first_chunk().unwrap());
        assert_eq!(to, 0x7000_0000 + at as u64);
        assert_eq!(redirect(&mut [0; 4096], &ours.code, 0), None);
    }
}
