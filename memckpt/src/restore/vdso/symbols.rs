//! The functions of a vDSO: an ELF file of which all is in memory, its table of sections, too.

use std::collections::BTreeMap;

/// ELF64, little-endian (elf(5)).
const IDENTITY: [u8; 6] = [0x7f, b'E', b'L', b'F', 2, 1];
/// Where the header tells of the sections.
const SECTIONS: usize = 0x28;
const SECTION_SIZE: usize = 0x3a;
const SECTION_COUNT: usize = 0x3c;
/// SHT_DYNSYM
const DYNAMIC_SYMBOLS: u32 = 11;
/// The size of a symbol.
const SYMBOL: usize = 24;
/// STT_FUNC
const FUNCTION: u8 = 2;

/// Offsets of the functions, by their names; `None` where the image is not what it should be.
pub(super) fn functions(image: &[u8]) -> Option<BTreeMap<&[u8], usize>> {
    if !image.starts_with(&IDENTITY) {
        return None;
    }
    let sections = usize::try_from(word(image, SECTIONS)?).ok()?;
    let (size, count) = (half(image, SECTION_SIZE)?, half(image, SECTION_COUNT)?);
    let section = |n: usize| image.get(sections.checked_add(n.checked_mul(size.into())?)?..);
    let content = |section: &[u8]| {
        let (offset, len) = (word(section, 0x18)?, word(section, 0x20)?);
        image.get(usize::try_from(offset).ok()?..)?.get(..usize::try_from(len).ok()?)
    };
    let table = (0..count.into()).filter_map(section).find(|s| int(s, 4) == Some(DYNAMIC_SYMBOLS))?;
    let symbols = content(table)?;
    let names = content(section(int(table, 0x28)? as usize)?)?;
    let mut functions = BTreeMap::new();
    for symbol in symbols.chunks_exact(SYMBOL) {
        let (name, kind, section) = (int(symbol, 0)?, symbol[4] & 15, half(symbol, 6)?);
        let offset = usize::try_from(word(symbol, 8)?).ok()?;
        // Section 0: a function that is elsewhere.
        if kind == FUNCTION && section != 0 && offset < image.len() {
            let name = names.get(name as usize..)?.split(|byte| *byte == 0).next()?;
            functions.insert(name, offset);
        }
    }
    Some(functions)
}

fn half(bytes: &[u8], at: usize) -> Option<u16> {
    bytes.get(at..)?.first_chunk().copied().map(u16::from_le_bytes)
}

fn int(bytes: &[u8], at: usize) -> Option<u32> {
    bytes.get(at..)?.first_chunk().copied().map(u32::from_le_bytes)
}

fn word(bytes: &[u8], at: usize) -> Option<u64> {
    bytes.get(at..)?.first_chunk().copied().map(u64::from_le_bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::maps;
    use crate::kernel::memory::ProcMem;

    #[test]
    fn those_of_this_kernel_are_found() {
        let pid = std::process::id().cast_signed();
        let maps = maps::read(pid).unwrap();
        let Some(vdso) = maps.iter().find(|vma| vma.name == "[vdso]") else { return };
        let mut image = vec![0; vdso.range.len() as usize];
        ProcMem::open(pid).unwrap().read_at(vdso.range.start, &mut image).unwrap();
        let functions = functions(&image).unwrap();
        for name in ["__vdso_clock_gettime", "__vdso_gettimeofday", "__vdso_time", "__vdso_getcpu"] {
            assert!(functions.contains_key(name.as_bytes()), "{name}");
        }
        for cut in [0, 5, 63, 200, image.len() / 2] {
            // Whatever comes of it.
            let _ = super::functions(&image[..cut]);
        }
    }
}
