//! The ELF kernel inside a bzImage. QEMU enters it directly by its PVH note, which saves the guest the
//! decompression: emulated, that is seconds.

use std::io::Write as _;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

/// Magic bytes of a compressed payload and the command that unpacks it. Trailing bytes follow the payload: xz must be
/// told to stop, zstd complains after having written everything.
const PAYLOADS: [(&[u8], &[&str]); 3] = [
    (b"\x28\xb5\x2f\xfd", &["zstd", "-dc"]),
    (b"\xfd7zXZ\0", &["xz", "-dc", "--single-stream"]),
    (b"\x1f\x8b\x08", &["gzip", "-dc"]),
];

/// Finds the payload of `bzimage` that unpacks to an ELF file, and returns that.
pub(crate) fn extract(bzimage: &[u8]) -> Result<Vec<u8>> {
    for (magic, command) in PAYLOADS {
        for at in positions(bzimage, magic) {
            let unpacked = unpack(command, &bzimage[at..])?;
            if unpacked.starts_with(b"\x7fELF") {
                return Ok(unpacked);
            }
        }
    }
    bail!("no zstd, xz or gzip payload in the kernel image unpacks to an ELF file")
}

fn positions<'a>(bytes: &'a [u8], magic: &'a [u8]) -> impl Iterator<Item = usize> + 'a {
    bytes.windows(magic.len()).enumerate().filter(move |(_, window)| *window == magic).map(|(at, _)| at)
}

/// What `command` makes of `input`, whatever its exit code.
fn unpack(command: &[&str], input: &[u8]) -> Result<Vec<u8>> {
    let mut child = Command::new(command[0])
        .args(&command[1..])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .with_context(|| format!("cannot start {}", command[0]))?;
    let mut stdin = child.stdin.take().context("the child has no standard input")?;
    std::thread::scope(|scope| {
        // It stops reading at the payload's end: a broken pipe is no error here.
        scope.spawn(move || drop(stdin.write_all(input)));
        Ok(child.wait_with_output().with_context(|| format!("wait for {}", command[0]))?.stdout)
    })
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_payload_that_unpacks_to_elf_is_found_behind_others() {
        let gzip = |content: &[u8]| super::unpack(&["gzip", "-c"], content).unwrap();
        let image =
            [b"MZ boot code \x1f\x8b\x08 no gzip".to_vec(), gzip(b"\x7fELF kernel"), b"tail".to_vec()];
        assert_eq!(super::extract(&image.concat()).unwrap(), b"\x7fELF kernel");
        assert!(super::extract(b"MZ nothing").is_err());
    }
}
