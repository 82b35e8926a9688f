//! What a fuzzer's bytes are taken for.

use std::fs::{self, File};
use std::os::unix::fs::symlink;
use std::path::Path;

/// The bytes of a page.
const PAGE: u64 = 4096;
/// The most pages in a file of them. They are holes: only their number counts.
const PAGES: u64 = 1 << 14;

/// Makes the files that `bytes` hold in `directory`, as many as there are. Each is: the length of its name (1 byte), the name, the length of its
/// content (4 bytes, the lowest first), the content. That of pages-N.img is the number of pages; a link named parent leads to the directory
/// itself, or nowhere. `cargo xtask fuzz` packs real checkpoints so.
pub fn unpack(mut bytes: &[u8], directory: &Path) {
    while let Some((name, content, rest)) = file(bytes) {
        bytes = rest;
        let name = String::from_utf8_lossy(name);
        if name.contains(['/', '\0']) || name.is_empty() || name.starts_with('.') {
            continue;
        }
        let path = directory.join(&*name);
        if name == "parent" {
            let _ = symlink(if content.is_empty() { "nowhere" } else { "." }, path);
        } else if name.starts_with("pages-") {
            let pages = content.first_chunk().map_or(0, |count| u64::from(u32::from_le_bytes(*count)));
            let _ = File::create(path).and_then(|file| file.set_len(pages.min(PAGES) * PAGE));
        } else {
            let _ = fs::write(path, content);
        }
    }
}

/// Name and content of the first file, and what follows.
fn file(bytes: &[u8]) -> Option<(&[u8], &[u8], &[u8])> {
    let (length, rest) = bytes.split_first()?;
    let (name, rest) = rest.split_at_checked(usize::from(*length))?;
    let (length, rest) = rest.split_first_chunk()?;
    let (content, rest) = rest.split_at(rest.len().min(u32::from_le_bytes(*length) as usize));
    Some((name, content, rest))
}
