//! The parasite's code, and the layout of the segment that it shares with us.

#[path = "../../parasite/src/layout.rs"]
#[allow(missing_docs, unreachable_pub)]
mod layout;

pub(crate) use layout::Call;
pub(super) use layout::*;

/// Flat and position-independent; starts at its first byte. Built by `build.rs`.
pub(super) static CODE: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/parasite.bin"));

/// `adopt.rs` finds the segment by the page that its code runs in.
const _: () = assert!(CODE.len() <= CODE_LEN && CODE.len() <= crate::addr::PAGE_SIZE as usize);
const _: () = assert!(size_of::<Registers>() == size_of::<libc::user_regs_struct>());

impl From<&libc::user_regs_struct> for Registers {
    fn from(regs: &libc::user_regs_struct) -> Self {
        // SAFETY: both are the kernel's struct user_regs_struct: 27 integers of 64 bits in the same order.
        unsafe { std::mem::transmute_copy(regs) }
    }
}

impl From<&Registers> for libc::user_regs_struct {
    fn from(regs: &Registers) -> Self {
        // SAFETY: as above.
        unsafe { std::mem::transmute_copy(regs) }
    }
}
