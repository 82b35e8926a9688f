//! The text of `/proc/PID/maps`, part of which is names that the target chooses.
#![no_main]

use libfuzzer_sys::fuzz_target;
use memckpt::kernel::maps;

fuzz_target!(|bytes: &[u8]| {
    let _ = maps::parse(bytes);
});
