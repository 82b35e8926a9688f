//! Two signal frames that bring a thread home if we die before the parasite runs, whether or not the segment got
//! attached: the first unmaps it, the second is the thread as it was.

use super::blob::{
    FP_XSTATE_MAGIC2, Frame, Registers, SEGMENT_LEN, SW_RESERVED, SW_RESERVED_LEN, sw_reserved,
};
use super::commit::Host;
use super::registers::resumable;

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
