//! The XSAVE area, in the standard format that ptrace(2) gives (Intel SDM volume 1, 13.4).

use crate::image::proto::{UserX86Fpregs, UserX86Xsave};

/// Bytes of the legacy region, and where the header begins.
const LEGACY: usize = 512;
/// Bytes of the legacy region and the header.
const MINIMUM: usize = 576;
/// Where Linux leaves the mask of enabled features in what ptrace(2) gives (struct _fpx_sw_bytes in the software-reserved bytes of
/// the legacy region, arch/x86/include/uapi/asm/sigcontext.h; user_regset NT_X86_XSTATE).
const ENABLED: usize = 464;

/// x87 and SSE.
const LEGACY_FEATURES: u64 = 3;
const AVX: usize = 2;
const OPMASK: usize = 5;
const ZMM_HI256: usize = 6;
const HI16_ZMM: usize = 7;
const PKRU: usize = 9;
const COMPONENTS: usize = 10;

/// An extended state that is no XSAVE area.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("extended state of {len} bytes is too short for an XSAVE area")]
pub struct XsaveError {
    /// How long it is.
    pub len: usize,
}

/// Where each component is in the standard format; that differs between processors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct XsaveLayout {
    /// Offset and size by component number; a size of 0 where the processor has none.
    components: [(usize, usize); COMPONENTS],
}

impl XsaveLayout {
    /// That of the processor this runs on (CPUID leaf 0xD).
    #[must_use]
    #[cfg(target_arch = "x86_64")]
    pub fn of_this_processor() -> Self {
        let mut components = [(0, 0); COMPONENTS];
        let has_xsave = std::arch::x86_64::__cpuid(0).eax >= 0xd;
        for (n, component) in components.iter_mut().enumerate().skip(AVX).filter(|_| has_xsave) {
            let leaf = std::arch::x86_64::__cpuid_count(0xd, n as u32);
            *component = (leaf.ebx as usize, leaf.eax as usize);
        }
        Self { components }
    }

    /// The bytes of a component, when it is enabled and all there.
    fn component<'a>(&self, xstate: &'a [u8], number: usize) -> Option<&'a [u8]> {
        let enabled = word64(xstate, ENABLED) | word64(xstate, LEGACY);
        let (offset, size) = self.components[number];
        if size == 0 || enabled & (1 << number) == 0 {
            return None;
        }
        xstate.get(offset..offset + size)
    }

    /// The x87, SSE and extended state in CRIU's form.
    ///
    /// # Errors
    /// `xstate` is shorter than the legacy region and the header.
    pub fn fpregs(&self, xstate: &[u8]) -> Result<UserX86Fpregs, XsaveError> {
        if xstate.len() < MINIMUM {
            return Err(XsaveError { len: xstate.len() });
        }
        let component32 = |n| self.component(xstate, n).map(words32).unwrap_or_default();
        let component64 = |n| self.component(xstate, n).map(words64).unwrap_or_default();
        Ok(UserX86Fpregs {
            cwd: half(xstate, 0),
            swd: half(xstate, 2),
            twd: half(xstate, 4),
            fop: half(xstate, 6),
            rip: word64(xstate, 8),
            rdp: word64(xstate, 16),
            mxcsr: word64(xstate, 24) as u32,
            mxcsr_mask: (word64(xstate, 24) >> 32) as u32,
            st_space: words32(&xstate[32..160]),
            xmm_space: words32(&xstate[160..416]),
            padding: Vec::new(),
            xsave: Some(UserX86Xsave {
                xstate_bv: word64(xstate, LEGACY),
                ymmh_space: component32(AVX),
                opmask_reg: component64(OPMASK),
                zmm_upper: component64(ZMM_HI256),
                hi16_zmm: component64(HI16_ZMM),
                pkru: component32(PKRU),
                ..Default::default()
            }),
        })
    }
}

impl XsaveLayout {
    /// Writes what CRIU's form says into `area`, which ptrace(2) gave of a thread on this processor.
    ///
    /// # Errors
    /// In words: a component has another length than it has here, or this processor does not have it.
    pub fn fill(&self, fp: &UserX86Fpregs, area: &mut [u8]) -> Result<(), String> {
        if area.len() < MINIMUM {
            return Err(XsaveError { len: area.len() }.to_string());
        }
        let mut put = |at: usize, bytes: &[u8]| area[at..at + bytes.len()].copy_from_slice(bytes);
        for (at, value) in [(0, fp.cwd), (2, fp.swd), (4, fp.twd), (6, fp.fop)] {
            put(at, &(value as u16).to_le_bytes());
        }
        put(8, &fp.rip.to_le_bytes());
        put(16, &fp.rdp.to_le_bytes());
        put(24, &fp.mxcsr.to_le_bytes());
        for (at, words, count) in [(32, &fp.st_space, 32), (160, &fp.xmm_space, 64)] {
            if words.len() != count {
                return Err(format!("its floating-point state has {} words instead of {count}", words.len()));
            }
            put(at, &words.iter().flat_map(|word| word.to_le_bytes()).collect::<Vec<u8>>());
        }
        let Some(xsave) = &fp.xsave else {
            put(LEGACY, &LEGACY_FEATURES.to_le_bytes());
            return Ok(());
        };
        let narrow = |words: &[u32]| words.iter().flat_map(|word| word.to_le_bytes()).collect::<Vec<u8>>();
        let wide = |words: &[u64]| words.iter().flat_map(|word| word.to_le_bytes()).collect::<Vec<u8>>();
        let components = [
            (AVX, narrow(&xsave.ymmh_space)),
            (OPMASK, wide(&xsave.opmask_reg)),
            (ZMM_HI256, wide(&xsave.zmm_upper)),
            (HI16_ZMM, wide(&xsave.hi16_zmm)),
            (PKRU, narrow(&xsave.pkru)),
        ];
        let mut features = LEGACY_FEATURES;
        for (number, bytes) in components {
            let in_use = xsave.xstate_bv & (1 << number) != 0;
            if bytes.is_empty() || !in_use {
                continue;
            }
            let (offset, size) = self.components[number];
            if size != bytes.len() || offset + size > area.len() {
                return Err(format!(
                    "this processor has no room for its extended state (component {number}, {} bytes)",
                    bytes.len()
                ));
            }
            area[offset..offset + size].copy_from_slice(&bytes);
            features |= 1 << number;
        }
        let features = xsave.xstate_bv & features;
        area[LEGACY..LEGACY + 8].copy_from_slice(&features.to_le_bytes());
        Ok(())
    }
}

fn half(bytes: &[u8], at: usize) -> u32 {
    u32::from(u16::from_le_bytes([bytes[at], bytes[at + 1]]))
}

fn word64(bytes: &[u8], at: usize) -> u64 {
    bytes[at..].first_chunk().map_or(0, |word| u64::from_le_bytes(*word))
}

fn words32(bytes: &[u8]) -> Vec<u32> {
    bytes.as_chunks().0.iter().map(|word| u32::from_le_bytes(*word)).collect()
}

fn words64(bytes: &[u8]) -> Vec<u64> {
    bytes.as_chunks().0.iter().map(|word| u64::from_le_bytes(*word)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Offsets of a processor with AVX-512 and protection keys.
    fn layout() -> XsaveLayout {
        let mut components = [(0, 0); COMPONENTS];
        components[AVX] = (576, 256);
        components[OPMASK] = (832, 64);
        components[ZMM_HI256] = (896, 512);
        components[HI16_ZMM] = (1408, 1024);
        components[PKRU] = (2432, 8);
        XsaveLayout { components }
    }

    fn area(enabled: u64, in_use: u64) -> Vec<u8> {
        let mut bytes = vec![0u8; 2440];
        bytes[0..2].copy_from_slice(&895u16.to_le_bytes());
        bytes[24..28].copy_from_slice(&8064u32.to_le_bytes());
        bytes[28..32].copy_from_slice(&196_607u32.to_le_bytes());
        bytes[160..164].copy_from_slice(&8_388_608u32.to_le_bytes());
        bytes[ENABLED..ENABLED + 8].copy_from_slice(&enabled.to_le_bytes());
        bytes[LEGACY..LEGACY + 8].copy_from_slice(&in_use.to_le_bytes());
        bytes[832..836].copy_from_slice(&2_097_152u32.to_le_bytes());
        bytes[2432] = 0x54;
        bytes
    }

    /// The counts and values are those that CRIU wrote on a processor with AVX-512.
    #[test]
    fn components_have_the_lengths_of_criu() {
        let fp = layout().fpregs(&area(0xe7, 162)).unwrap();
        assert_eq!((fp.cwd, fp.mxcsr, fp.mxcsr_mask), (895, 8064, 196_607));
        assert_eq!((fp.st_space.len(), fp.xmm_space.len(), fp.xmm_space[0]), (32, 64, 8_388_608));
        let xsave = fp.xsave.unwrap();
        assert_eq!(xsave.xstate_bv, 162);
        let lengths = [
            xsave.ymmh_space.len(),
            xsave.opmask_reg.len(),
            xsave.zmm_upper.len(),
            xsave.hi16_zmm.len(),
            xsave.pkru.len(),
        ];
        assert_eq!(lengths, [64, 8, 64, 128, 0]);
        assert_eq!(xsave.opmask_reg[0], 2_097_152);
        assert_eq!(layout().fpregs(&area(0x2e7, 0)).unwrap().xsave.unwrap().pkru, [0x54, 0]);
    }

    #[test]
    fn what_was_read_is_written_back() {
        let area = area(0x2e7, 0x2a2);
        let fp = layout().fpregs(&area).unwrap();
        let mut back = vec![0; area.len()];
        // What ptrace gives has them.
        back[28..32].copy_from_slice(&area[28..32]);
        back[ENABLED..ENABLED + 8].copy_from_slice(&area[ENABLED..ENABLED + 8]);
        layout().fill(&fp, &mut back).unwrap();
        assert_eq!(layout().fpregs(&back).unwrap(), fp);
        let small = XsaveLayout { components: [(0, 0); COMPONENTS] };
        assert!(small.fill(&fp, &mut back).unwrap_err().contains("component 5"));
        assert!(layout().fill(&fp, &mut back[..100]).is_err());
    }

    #[test]
    fn what_is_not_enabled_or_cut_off_is_left_out() {
        let xsave = layout().fpregs(&area(7, 7)).unwrap().xsave.unwrap();
        assert_eq!((xsave.ymmh_space.len(), xsave.opmask_reg.len()), (64, 0));
        let xsave = layout().fpregs(&area(0xe7, 7)[..832]).unwrap().xsave.unwrap();
        assert_eq!((xsave.ymmh_space.len(), xsave.opmask_reg.len()), (64, 0));
        for len in [0, 100, 575] {
            assert_eq!(layout().fpregs(&area(7, 7)[..len]), Err(XsaveError { len }));
        }
    }

    #[test]
    fn avx_follows_the_header_on_every_processor() {
        let (offset, size) = XsaveLayout::of_this_processor().components[AVX];
        assert!((offset, size) == (576, 256) || size == 0, "{offset} {size}");
    }
}
