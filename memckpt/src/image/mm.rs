//! `mm-PID.img`: the layout of an address space.

use crate::addr::AddrRange;
use crate::kernel::maps::{Prot, Vma};

use super::magic::ImageKind;
use super::proto::{MmEntry, VmaEntry};
use super::record::Image;

/// Where an address space has its parts: `/proc/PID/stat`, fields 26 to 28 and 45 to 51; the end of the heap from
/// `/proc/PID/maps`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MmNumbers {
    /// startcode
    pub start_code: u64,
    /// endcode
    pub end_code: u64,
    /// start_data
    pub start_data: u64,
    /// end_data
    pub end_data: u64,
    /// startstack
    pub start_stack: u64,
    /// start_brk
    pub start_brk: u64,
    /// The current break.
    pub brk: u64,
    /// arg_start
    pub arg_start: u64,
    /// arg_end
    pub arg_end: u64,
    /// env_start
    pub env_start: u64,
    /// env_end
    pub env_end: u64,
    /// PR_GET_DUMPABLE; `None` where it is not known.
    pub dumpable: Option<i32>,
}

/// A VMA as CRIU records it.
#[derive(Clone, Copy, Debug)]
pub struct VmaRecord<'a> {
    /// The VMA.
    pub vma: &'a Vma,
    /// CRIU's status bits: `plan::VmaStatus`.
    pub status: u32,
    /// The flags of mmap(2) that it would be made with.
    pub flags: u32,
    /// A bit for each advice of madvise(2) in force, by its number; 0 for none.
    pub madv: u64,
    /// The file of `files.img` that it maps, or the object of `pagemap-shmem-ID.img`; 0 for none.
    pub shmid: u64,
    /// How that file was opened: O_RDONLY, O_WRONLY or O_RDWR.
    pub fdflags: Option<u32>,
}

impl VmaRecord<'_> {
    fn entry(&self) -> VmaEntry {
        let Vma { range, prot, offset, .. } = self.vma;
        let bits =
            [(Prot::READ, libc::PROT_READ), (Prot::WRITE, libc::PROT_WRITE), (Prot::EXEC, libc::PROT_EXEC)];
        VmaEntry {
            start: range.start.get(),
            end: range.end.get(),
            pgoff: *offset,
            shmid: self.shmid,
            prot: bits.iter().filter(|(p, _)| prot.contains(*p)).fold(0, |all, (_, bit)| all | *bit as u32),
            flags: self.flags,
            status: self.status,
            fd: -1,
            madv: (self.madv != 0).then_some(self.madv),
            fdflags: self.fdflags,
        }
    }
}

/// What has no more than a place and a status, as the guard regions that CRIU records after all VMAs since 4.2.
#[must_use]
pub fn bare_entry(range: AddrRange, status: u32) -> VmaEntry {
    VmaEntry { start: range.start.get(), end: range.end.get(), status, fd: -1, ..VmaEntry::default() }
}

/// The address space with `numbers`, the auxiliary vector `auxv` (`/proc/PID/auxv`, without its end marker) and the
/// VMAs in order. Neighbouring `[vvar*]` areas become one, as CRIU has them.
#[must_use]
pub fn mm_entry(numbers: &MmNumbers, auxv: &[u64], vmas: &[VmaRecord<'_>]) -> MmEntry {
    let mut entries: Vec<VmaEntry> = Vec::with_capacity(vmas.len());
    let mut vvar_before = false;
    for record in vmas {
        let vvar = record.vma.name.starts_with("[vvar");
        let entry = record.entry();
        match entries.last_mut() {
            Some(last) if vvar && vvar_before && last.end == entry.start => last.end = entry.end,
            _ => entries.push(entry),
        }
        vvar_before = vvar;
    }
    MmEntry {
        mm_start_code: numbers.start_code,
        mm_end_code: numbers.end_code,
        mm_start_data: numbers.start_data,
        mm_end_data: numbers.end_data,
        mm_start_stack: numbers.start_stack,
        mm_start_brk: numbers.start_brk,
        mm_brk: numbers.brk,
        mm_arg_start: numbers.arg_start,
        mm_arg_end: numbers.arg_end,
        mm_env_start: numbers.env_start,
        mm_env_end: numbers.env_end,
        exe_file_id: 0,
        mm_saved_auxv: auxv.to_vec(),
        vmas: entries,
        dumpable: numbers.dumpable,
        aios: Vec::new(),
        thp_disabled: None,
    }
}

/// The content of `mm-PID.img`.
#[must_use]
pub fn encode(entry: &MmEntry) -> Vec<u8> {
    Image::new(ImageKind::Mm).with(entry).into_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::addr::AddrRange;
    use crate::image::record;

    fn vma(start: u64, end: u64, prot: Prot, name: &str) -> Vma {
        Vma {
            range: AddrRange::new(start, end),
            prot,
            shared: false,
            offset: 0,
            dev: (0, 0),
            inode: 0,
            name: name.to_owned(),
        }
    }

    /// Three areas of a real process as CRIU wrote them, with vvar in the two pieces that kernels since 6.13 have.
    #[test]
    fn areas_are_those_of_criu() {
        let vmas = [
            vma(0x5615_a18f_2000, 0x5615_a191_3000, Prot::READ | Prot::WRITE, "[heap]"),
            vma(0x7fe5_aaaa_9000, 0x7fe5_aaaa_d000, Prot::READ, "[vvar]"),
            vma(0x7fe5_aaaa_d000, 0x7fe5_aaaa_f000, Prot::READ, "[vvar_vclock]"),
            vma(0x7fe5_aaaa_f000, 0x7fe5_aaab_1000, Prot::READ | Prot::EXEC, "[vdso]"),
        ];
        let facts = [(545, 0), (4609, 0x10000), (4609, 0x10000), (521, 0)];
        let records: Vec<_> = vmas
            .iter()
            .zip(facts)
            .map(|(vma, (status, madv))| VmaRecord {
                vma,
                status,
                flags: 0x22,
                madv,
                shmid: 0,
                fdflags: None,
            })
            .collect();
        let numbers = MmNumbers { start_code: 0x5615_927a_e000, dumpable: Some(1), ..Default::default() };
        let entry = mm_entry(&numbers, &[33, 140_624_387_567_616], &records);
        let read: MmEntry = record::single("mm-1.img", ImageKind::Mm, &encode(&entry)).unwrap();
        assert_eq!(read, entry);
        let areas: Vec<_> =
            read.vmas.iter().map(|v| (v.start, v.end, v.prot, v.status, v.fd, v.madv)).collect();
        assert_eq!(
            areas,
            [
                (0x5615_a18f_2000, 0x5615_a191_3000, 3, 545, -1, None),
                (0x7fe5_aaaa_9000, 0x7fe5_aaaa_f000, 1, 4609, -1, Some(0x10000)),
                (0x7fe5_aaaa_f000, 0x7fe5_aaab_1000, 5, 521, -1, None),
            ]
        );
        assert_eq!((read.mm_start_code, read.dumpable), (0x5615_927a_e000, Some(1)));
    }
}
