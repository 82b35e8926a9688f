use std::collections::BTreeMap;
use std::io::{self, Read, Write};
use std::path::Path;
use std::process::{Child, Command, Stdio};

use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;

use super::*;
use crate::image::magic::{ImageKind, pagemap_name};
use crate::image::pagemap::{PagemapFlags, PagemapImage};
use crate::image::proto::InventoryEntry;
use crate::image::{Image, ImagesDir};
use crate::kernel::maps::Prot;
use crate::kernel::memory::ProcMem;

/// Pages by number, with the byte that fills each and its flags.
struct FakeMemory(BTreeMap<u64, (u8, PageFlags)>);

impl Memory for FakeMemory {
    fn pages(&self, range: AddrRange) -> Result<Vec<PageRun>, SyscallError> {
        let state =
            |page: AddrRange| self.0.get(&(page.start.get() / PAGE_SIZE)).map(|(_, flags)| (page, *flags));
        Ok(pages_of(range).filter_map(state).map(|(range, flags)| PageRun { range, flags }).collect())
    }

    fn read(&self, range: AddrRange, buffer: &mut [u8]) -> Result<(), SyscallError> {
        for (page, bytes) in pages_of(range).zip(buffer.chunks_mut(PAGE_SIZE as usize)) {
            let byte = match self.0.get(&(page.start.get() / PAGE_SIZE)) {
                Some((0xee, _)) => {
                    return Err(SyscallError::new("pread", "fake", io::Error::other("unreadable")));
                }
                Some((byte, _)) => *byte,
                None => 0,
            };
            bytes.fill(byte);
        }
        Ok(())
    }
}

fn page(n: u64) -> AddrRange {
    AddrRange::new(n * PAGE_SIZE, (n + 1) * PAGE_SIZE)
}

fn write_chain(dir: &Path, pages: &[(AddrRange, Vec<u8>)]) -> Chain {
    let mut images = ImagesDir::open(dir).unwrap();
    let (_, file) = images.create_pages().unwrap();
    let mut map = PagemapImage::new(1);
    for (range, bytes) in pages {
        file.write_at(map.bytes(), bytes).unwrap();
        map.push(*range, PagemapFlags::PRESENT).unwrap();
    }
    images.write(&pagemap_name(7), &map.encode()).unwrap();
    let inventory = InventoryEntry { img_version: 2, ..Default::default() };
    images.finish(&Image::new(ImageKind::Inventory).with(&inventory).into_bytes()).unwrap();
    Chain::open(dir).unwrap()
}

fn vma(first: u64, end: u64, name: &str, inode: u64) -> Vma {
    Vma {
        range: AddrRange::new(first * PAGE_SIZE, end * PAGE_SIZE),
        prot: Prot::READ,
        shared: false,
        offset: 0,
        dev: (0, u32::from(inode != 0)),
        inode,
        name: name.to_owned(),
    }
}

#[test]
fn each_kind_of_difference_is_found_and_nothing_else() {
    const PRESENT: PageFlags = PageFlags::PRESENT;
    let tmp = tempfile::tempdir().unwrap();
    let full = |byte: u8| vec![byte; PAGE_SIZE as usize];
    let chain = write_chain(
        tmp.path(),
        &[
            (page(1), full(1)),
            (page(2), full(2)),
            (page(3), full(3)),
            (page(20), full(5)),
            (page(30), full(6)),
        ],
    );
    let memory = FakeMemory(BTreeMap::from([
        (1, (1, PRESENT)),
        (2, (9, PRESENT)),               // other bytes
        (3, (0xee, PRESENT)),            // unreadable
        (4, (0, PRESENT)),               // a page of zeroes: as good as absent
        (5, (5, PRESENT)),               // not in the checkpoint
        (6, (0xee, PageFlags::SWAPPED)), // a guard page
        (20, (5, PRESENT)),
        (21, (8, PRESENT | PageFlags::FILE)), // a file's page, not copied
        (22, (0, PRESENT)),                   // a private copy of a file's page, all zeroes
    ]));
    let vmas = [vma(1, 10, "", 0), vma(20, 24, "/lib/x", 4)];
    let found = compare_with(&memory, &vmas, &chain).unwrap();
    let told: Vec<_> = found.differences.iter().map(|d| (d.address.get() / PAGE_SIZE, d.kind)).collect();
    assert_eq!(
        told,
        [
            (2, DifferenceKind::Bytes),
            (3, DifferenceKind::NotInProcess),
            (5, DifferenceKind::NotInCheckpoint),
            (22, DifferenceKind::NotInCheckpoint),
            (30, DifferenceKind::NotInProcess),
        ]
    );
    assert_eq!(found.differences[3].vma, "/lib/x");
    assert_eq!((found.pages_compared, found.pages_zero), (PageCount(4), PageCount(1)));
    assert!(!found.is_exact());
}

/// A process that has come up and then was stopped; killed at the end.
struct Stopped(Child);

impl Stopped {
    fn start() -> Self {
        let mut child = Command::new("cat").stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let mut echo = [0];
        child.stdin.as_mut().unwrap().write_all(b"!").unwrap();
        child.stdout.as_mut().unwrap().read_exact(&mut echo).unwrap();
        let pid = Pid::from_raw(child.id() as i32);
        nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGSTOP).unwrap();
        let status = waitpid(pid, Some(WaitPidFlag::WUNTRACED)).unwrap();
        assert!(matches!(status, WaitStatus::Stopped(..)), "{status:?}");
        Self(child)
    }

    fn pid(&self) -> i32 {
        self.0.id() as i32
    }
}

impl Drop for Stopped {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn a_copy_of_a_process_is_exact_until_a_byte_changes() {
    let target = Stopped::start();
    let memory = LiveMemory::open(target.pid()).unwrap();
    let mut pages = Vec::new();
    for vma in maps::read(target.pid()).unwrap() {
        let runs = match classify(&vma, VmaFacts::default()).handling() {
            Handling::Nothing => continue,
            Handling::Whole => vec![PageRun { range: vma.range, flags: PageFlags::PRESENT }],
            Handling::Tracked | Handling::Always => memory.pages(vma.range).unwrap(),
        };
        for run in runs.iter().filter(|run| !run.flags.contains(PageFlags::FILE)) {
            let mut bytes = vec![0; run.range.len() as usize];
            memory.read(run.range, &mut bytes).unwrap();
            pages.push((run.range, bytes));
        }
    }
    let tmp = tempfile::tempdir().unwrap();
    let chain = write_chain(tmp.path(), &pages);
    let found = compare(target.pid(), &chain).unwrap();
    assert!(found.is_exact(), "{found:?}");
    assert!(found.pages_compared.get() > 10);

    let (range, bytes) = pages.iter().find(|(_, bytes)| bytes.iter().any(|b| *b != 0)).unwrap();
    let live = ProcMem::open(target.pid()).unwrap();
    live.write_at(range.start.saturating_add(77), &[bytes[77] ^ 1]).unwrap();
    let found = compare(target.pid(), &chain).unwrap();
    assert_eq!(found.pages_different, PageCount(1));
    assert_eq!(found.differences[0].address, range.start.saturating_add(77));
    assert_eq!(found.differences[0].kind, DifferenceKind::Bytes);
}
