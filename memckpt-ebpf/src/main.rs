//! memckpt's BPF programs: built by `cargo xtask ebpf`, loaded by `memckpt::tracker::agent`.
//!
//! Every program asks first whether the mm at hand is the target's, by the mm that the kernel passes and not by the
//! thread that runs: others write into the target too.
#![no_std]
#![no_main]
#![allow(internal_features)]
// A binary: `pub` reaches no further than the crate, and its modules say what the programs do.
#![allow(unreachable_pub, missing_docs)]
#![feature(core_intrinsics)]

mod calls;
mod capture;
mod end;
mod faults;
mod foreign;
mod generation;
mod locks;
mod maps;
mod mark;
mod nr;
mod regs;
mod remote;
mod rings;
mod zaps;

#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}

/// The helpers that read kernel memory are for GPL-compatible programs only.
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
