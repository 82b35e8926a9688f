//! A 32-bit program, made by hand: few machines have gcc's 32-bit libraries.

/// An ELF file for i386 that calls pause() for ever.
#[must_use]
pub fn pausing() -> Vec<u8> {
    const BASE: u32 = 0x0804_8000;
    const HEADERS: u32 = 52 + 32;
    // mov eax, 29 (pause); int 0x80; jmp back
    let code: [u8; 9] = [0xb8, 29, 0, 0, 0, 0xcd, 0x80, 0xeb, 0xf7];
    let size = HEADERS + 9;
    let mut elf = b"\x7fELF\x01\x01\x01\0\0\0\0\0\0\0\0\0".to_vec();
    let half = |elf: &mut Vec<u8>, values: &[u16]| values.iter().for_each(|v| elf.extend(v.to_le_bytes()));
    let word = |elf: &mut Vec<u8>, values: &[u32]| values.iter().for_each(|v| elf.extend(v.to_le_bytes()));
    half(&mut elf, &[2, 3]); // ET_EXEC, EM_386
    word(&mut elf, &[1, BASE + HEADERS, 52, 0, 0]); // version, entry, program headers, no sections, flags
    half(&mut elf, &[52, 32, 1, 0, 0, 0]);
    word(&mut elf, &[1, 0, BASE, BASE, size, size, 5, 4096]); // PT_LOAD, r-x
    elf.extend(code);
    elf
}
