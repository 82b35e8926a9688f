//! Setting chunk bits in the active buffer.
//!
//! User space flips buffers by storing `active` and then waiting until nobody writes the old one:
//!
//! ```text
//! program                              user space
//! a = active
//! bit set in buffer a? done (the fault happened before the flip, and is in its buffer)
//! writers[a] += 1   (locked)
//!                                      active = !a   (locked)
//! active still a?                      writers[a] == 0?
//!   yes: set summary, set bit            no: wait
//!   no:  writers[a] -= 1, start over     yes: buffer a is final
//! writers[a] -= 1   (locked)
//! ```
//! Both sides store before they load, with full barriers: one of them sees the other. This waits nanoseconds where
//! an RCU grace period waits milliseconds, and nobody waits for programs that only found their bit set.

use core::intrinsics::{AtomicOrdering, atomic_or};
use core::ptr::read_volatile;

use memckpt_ebpf::{
    ADDRESS_BITS, CHUNK_SHIFT, Control, MAX_RANGE_WORDS, Record, SUMMARY_SHIFT, SUMMARY_WORDS, WORD_SHIFT,
    WORDS, loss, source,
};

use crate::maps::{SUMMARY, TOUCHED, bump, emit, lose, unbump};

const ATTEMPTS: u32 = 4;

#[inline(always)]
fn active(control: *mut Control) -> u32 {
    // SAFETY: the control page.
    unsafe { (read_volatile(&raw const (*control).active) & 1) as u32 }
}

#[inline(always)]
fn writers(control: *mut Control, buffer: u32) -> *mut u64 {
    // SAFETY: the control page; branches, so that the verifier sees constant offsets.
    unsafe {
        if buffer == 0 { &raw mut (*control).writers[0].value } else { &raw mut (*control).writers[1].value }
    }
}

/// Sets `bits` in `word` of `buffer`, and before that the summary, so that whoever sees the bit sees the summary.
#[inline(always)]
fn set(buffer: u32, word: u32, bits: u64) {
    let gib = word >> (SUMMARY_SHIFT - WORD_SHIFT);
    if let Some(summary) = SUMMARY.get_ptr_mut(buffer * SUMMARY_WORDS + (gib >> 6)) {
        let bit = 1u64 << (gib & 63);
        // SAFETY: an element of a live map.
        unsafe {
            if read_volatile(summary) & bit == 0 {
                atomic_or::<u64, u64, { AtomicOrdering::SeqCst }>(summary, bit);
            }
        }
    }
    if let Some(slot) = TOUCHED.get_ptr_mut(buffer * WORDS + word) {
        // SAFETY: an element of a live map.
        unsafe { atomic_or::<u64, u64, { AtomicOrdering::SeqCst }>(slot, bits) };
    }
}

#[inline(always)]
fn is_set(buffer: u32, word: u32, bits: u64) -> bool {
    match TOUCHED.get_ptr_mut(buffer * WORDS + word) {
        // SAFETY: an element of a live map.
        Some(slot) => unsafe { read_volatile(slot) & bits == bits },
        None => false,
    }
}

/// Marks the chunk of `address`.
#[inline(always)]
pub fn mark(control: *mut Control, address: u64) {
    if address >> ADDRESS_BITS != 0 {
        lose(control, loss::HIGH_ADDRESS);
        return;
    }
    let word = (address >> WORD_SHIFT) as u32;
    let bit = 1u64 << ((address >> CHUNK_SHIFT) & 63);
    for _ in 0..ATTEMPTS {
        let buffer = active(control);
        if is_set(buffer, word, bit) {
            return;
        }
        let writers = writers(control, buffer);
        bump(writers);
        let current = active(control) == buffer;
        if current {
            set(buffer, word, bit);
        }
        unbump(writers);
        if current {
            return;
        }
    }
    lose(control, loss::FLIP);
}

/// Marks the chunks of `start..end`.
#[inline(always)]
pub fn mark_range(control: *mut Control, start: u64, end: u64) {
    if end <= start {
        return;
    }
    if (end - 1) >> ADDRESS_BITS != 0 {
        lose(control, loss::HIGH_ADDRESS);
        return;
    }
    let (first_chunk, last_chunk) = (start >> CHUNK_SHIFT, (end - 1) >> CHUNK_SHIFT);
    if first_chunk == last_chunk {
        mark(control, start);
        return;
    }
    let (first, last) = (first_chunk >> 6, last_chunk >> 6);
    if last - first >= MAX_RANGE_WORDS {
        emit(control, Record { source: source::ZAP, args: [start, end, 0, 0, 0, 0], ..Record::default() });
        return;
    }
    for _ in 0..ATTEMPTS {
        let buffer = active(control);
        let writers = writers(control, buffer);
        bump(writers);
        let current = active(control) == buffer;
        if current {
            for i in 0..MAX_RANGE_WORDS {
                let word = first + i;
                if word > last {
                    break;
                }
                let mut bits = u64::MAX;
                if word == first {
                    bits &= u64::MAX << (first_chunk & 63);
                }
                if word == last {
                    bits &= u64::MAX >> (63 - (last_chunk & 63));
                }
                if !is_set(buffer, word as u32, bits) {
                    set(buffer, word as u32, bits);
                }
            }
        }
        unbump(writers);
        if current {
            return;
        }
    }
    lose(control, loss::FLIP);
}
