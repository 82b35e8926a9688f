//! A page that tells whether somebody else cleared the soft-dirty bits.

use super::DirtyError;
use crate::addr::{Addr, AddrRange, PAGE_SIZE};
use crate::kernel::maps::{Prot, Vma};
use crate::kernel::memory::ProcMem;
use crate::kernel::pagemap::{Pagemap, PagemapEntry};
use crate::kernel::zero_page::ZeroFrames;

/// Most pages of one VMA that are looked at for a witness: relocated data is short, and its copied pages come first.
const LOOK_AT: u64 = 512;

/// What the witness says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Nobody has cleared the bits since the witness was armed.
    Undisturbed,
    /// Somebody has: the epoch is over.
    Cleared,
    /// The page is gone or was replaced: it can say nothing, and the epoch cannot be proven by it.
    Lost,
}

/// A page that the target cannot write (a copied page of a read-only private mapping, as relocation leaves behind in every
/// dynamically linked program). Right after our clear we write one of its bytes again, unchanged: it then reads
/// soft-dirty until the next clear, whoever does that.
#[derive(Debug)]
pub struct Witness {
    pagemap: Pagemap,
    addr: Addr,
}

impl Witness {
    /// Finds a witness among `vmas` of process `pid` and arms it. To be done right after the clear, with all threads
    /// stopped. `None`: no such page, or this kernel does not mark it (no soft-dirty).
    ///
    /// # Errors
    /// Memory or pagemap cannot be opened or read.
    pub fn arm(pid: i32, vmas: &[Vma]) -> Result<Option<Self>, DirtyError> {
        let (pagemap, mem) = (Pagemap::open(pid)?, ProcMem::open(pid)?);
        for vma in
            vmas.iter().filter(|vma| !vma.shared && vma.prot == Prot::READ && !vma.name.starts_with("[v"))
        {
            let len = vma.range.len().min(LOOK_AT * PAGE_SIZE);
            let words = pagemap.entries(AddrRange::with_len(vma.range.start, len))?;
            for (i, word) in words.into_iter().enumerate() {
                // In a VMA that is soft-dirty as a whole a page of its own says nothing.
                if !is_own_copy(word) || word.has(PagemapEntry::SOFT_DIRTY) {
                    continue;
                }
                let addr = vma.range.start.saturating_add(i as u64 * PAGE_SIZE);
                let mut byte = [0];
                mem.read_at(addr, &mut byte)?;
                mem.write_at(addr, &byte)?;
                let witness = Self { pagemap, addr };
                return Ok((witness.verdict()? == Verdict::Undisturbed).then_some(witness));
            }
        }
        Ok(None)
    }

    /// Whether the bits have been left alone since [`Self::arm`].
    ///
    /// # Errors
    /// pagemap cannot be read, also because the address space is gone.
    pub fn verdict(&self) -> Result<Verdict, DirtyError> {
        let word = self.pagemap.entry(self.addr)?;
        Ok(match () {
            () if !is_own_copy(word) => Verdict::Lost,
            () if word.has(PagemapEntry::SOFT_DIRTY) => Verdict::Undisturbed,
            () => Verdict::Cleared,
        })
    }

    /// The witness's page.
    #[must_use]
    pub fn addr(&self) -> Addr {
        self.addr
    }
}

/// A private page in memory: writing to it copies nothing.
fn is_own_copy(word: PagemapEntry) -> bool {
    word.has(PagemapEntry::PRESENT) && !word.has(PagemapEntry::FILE) && !ZeroFrames::get().is_zero(word)
}
