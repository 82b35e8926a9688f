//! A whole directory of images, read as a restore and as `memckpt show` do.
#![no_main]

use std::path::PathBuf;
use std::sync::OnceLock;

use libfuzzer_sys::fuzz_target;
use memckpt::image::{Chain, Summary};
use memckpt::restore;
use tempfile::TempDir;

/// Made and removed a thousand times a second: no disk should see that.
fn place() -> PathBuf {
    static PLACE: OnceLock<PathBuf> = OnceLock::new();
    let place = || {
        let memory = PathBuf::from("/dev/shm");
        if memory.is_dir() { memory } else { std::env::temp_dir() }
    };
    PLACE.get_or_init(place).clone()
}

fuzz_target!(|bytes: &[u8]| {
    let directory = TempDir::with_prefix_in("memckpt-fuzz-", place()).expect("a directory");
    memckpt_fuzz::unpack(bytes, directory.path());
    let _ = restore::read(directory.path(), true);
    let _ = Chain::open(directory.path()).and_then(|chain| Summary::of(&chain));
});
