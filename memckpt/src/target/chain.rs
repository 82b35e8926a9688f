//! Two signal frames that bring a thread home if we die before the parasite runs, whether or not the segment got
//! attached: the first unmaps it, the second is the thread as it was.

use std::mem::offset_of;

use super::blob::{
    FP_XSTATE_MAGIC2, Frame, NO_STACK_CHANGE, Registers, SEGMENT_LEN, SW_RESERVED, SW_RESERVED_LEN,
    sw_reserved,
};
use super::commit::Host;
use super::gadgets::Gadgets;
use super::registers::resumable;
use super::stack::Place;

/// What goes to the host's place.
pub(super) fn bytes(host: &Host) -> Vec<u8> {
    let injection = &host.injection;
    let (gadgets, place) = (injection.gadgets, &host.place);
    let mut unmap = Registers::from(&host.home);
    unmap.ip = gadgets.syscall;
    unmap.ax = libc::SYS_munmap as u64;
    unmap.di = injection.address;
    unmap.si = SEGMENT_LEN as u64;
    unmap.sp = place.frame;
    let home = Registers::from(&resumable(&host.home));
    let mut bytes = vec![0; place.region.len() as usize];
    let mut put = |address: u64, part: &[u8]| {
        let at = (address - place.region.start.get()) as usize;
        bytes[at..at + part.len()].copy_from_slice(part);
    };
    put(place.chain, as_bytes(&Frame::bringing(&unmap, gadgets.sigreturn, place.xsave, u64::MAX)));
    put(place.frame, as_bytes(&Frame::bringing(&home, gadgets.sigreturn, place.xsave, host.sigmask)));
    put(place.xsave, &extended_state(&host.xstate, injection.xfeatures, injection.xsave_len));
    bytes
}

/// Whether `content`, read from `place`, is what a memckpt that was killed left there: both frames, or, once the
/// parasite ran, the second alone.
pub(super) fn is_abandoned(content: &[u8], place: &Place, gadgets: Gadgets) -> bool {
    let (chain, frame) = content.split_at((place.frame - place.chain) as usize);
    let ours = |bytes: &[u8]| {
        let word = |at: usize| bytes.get(at..at + 8).and_then(|b| b.try_into().ok()).map(u64::from_le_bytes);
        word(offset_of!(Frame, restorer)) == Some(gadgets.sigreturn)
            && word(offset_of!(Frame, stack_flags)) == Some(NO_STACK_CHANGE)
            && word(offset_of!(Frame, fpstate)) == Some(place.xsave)
    };
    ours(frame) && (ours(chain) || chain.iter().all(|&byte| byte == 0))
}

/// The extended state in the form that rt_sigreturn takes.
fn extended_state(xstate: &[u8], features: u64, len: u64) -> Vec<u8> {
    let mut area = xstate.to_vec();
    area.resize(len as usize, 0);
    let sw = &mut area[SW_RESERVED..SW_RESERVED + SW_RESERVED_LEN];
    sw.fill(0);
    for (to, word) in sw.chunks_exact_mut(4).zip(sw_reserved(features, len)) {
        to.copy_from_slice(&word.to_le_bytes());
    }
    area.extend(FP_XSTATE_MAGIC2.to_le_bytes());
    area
}

fn as_bytes(frame: &Frame) -> &[u8] {
    // SAFETY: a Frame is integers without padding between them.
    unsafe { std::slice::from_raw_parts(std::ptr::from_ref(frame).cast(), size_of::<Frame>()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn knows_what_it_left() {
        let gadgets = Gadgets { syscall: 0x1000, sigreturn: 0x2000 };
        let place = Place::below(0x7ffc_0000_5000, 2696);
        let at = |address: u64| (address - place.region.start.get()) as usize;
        let frame = Frame::bringing(&Registers::from(&zeroed()), gadgets.sigreturn, place.xsave, 0);
        let mut content = vec![0; place.region.len() as usize];
        assert!(!is_abandoned(&content, &place, gadgets), "nothing");
        content[at(place.frame)..][..size_of::<Frame>()].copy_from_slice(as_bytes(&frame));
        assert!(is_abandoned(&content, &place, gadgets), "after the parasite ran");
        content[at(place.chain) + 8] = 1;
        assert!(!is_abandoned(&content, &place, gadgets), "somebody else's bytes");
        content[at(place.chain)..][..size_of::<Frame>()].copy_from_slice(as_bytes(&frame));
        assert!(is_abandoned(&content, &place, gadgets), "before the parasite ran");
        let elsewhere = Place::below(place.region.end.get() + 64, 2696);
        assert!(!is_abandoned(&content, &elsewhere, gadgets), "a frame of another place");
    }

    fn zeroed() -> libc::user_regs_struct {
        // SAFETY: integers only.
        unsafe { std::mem::zeroed() }
    }
}
