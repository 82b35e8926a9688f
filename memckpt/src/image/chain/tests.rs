use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::symlink;

use proptest::prelude::*;

use crate::addr::PAGE_SIZE;
use crate::image::magic::{INVENTORY, pagemap_name};
use crate::image::pagemap::PagemapImage;
use crate::image::proto::InventoryEntry;
use crate::image::{Image, ImageKind, ImagesDir};

use super::*;

const PID: i32 = 100;

fn inventory() -> Vec<u8> {
    Image::new(ImageKind::Inventory)
        .with(&InventoryEntry { img_version: 2, ..Default::default() })
        .into_bytes()
}

/// One checkpoint: page number to its byte, or `None` when it is left to the parent.
type Pages = BTreeMap<u64, Option<u8>>;

fn write(root: &Path, name: &str, parent: Option<&str>, pages: &Pages) {
    fs::create_dir(root.join(name)).unwrap();
    let mut dir = ImagesDir::open(&root.join(name)).unwrap();
    if let Some(parent) = parent {
        dir.link_parent(Path::new(parent)).unwrap();
    }
    let (_, file) = dir.create_pages().unwrap();
    let mut map = PagemapImage::new(1);
    for (&page, byte) in pages {
        let at = map.bytes();
        let range = AddrRange::new(page * PAGE_SIZE, (page + 1) * PAGE_SIZE);
        let flags = if byte.is_some() { PagemapFlags::PRESENT } else { PagemapFlags::PARENT };
        map.push(range, flags).unwrap();
        if let Some(byte) = byte {
            file.write_at(at, &[*byte; PAGE_SIZE as usize]).unwrap();
        }
    }
    dir.write(&pagemap_name(PID), &map.encode()).unwrap();
    dir.finish(&inventory()).unwrap();
}

pub(super) fn page(number: u64) -> AddrRange {
    AddrRange::new(number * PAGE_SIZE, (number + 1) * PAGE_SIZE)
}

fn byte(chain: &Chain, number: u64) -> Result<u8, ChainError> {
    let mut buffer = vec![0; PAGE_SIZE as usize];
    chain.read(page(number), &mut buffer)?;
    assert!(buffer.iter().all(|b| *b == buffer[0]));
    Ok(buffer[0])
}

pub(super) fn family() -> tempfile::TempDir {
    let tmp = tempfile::tempdir().unwrap();
    write(tmp.path(), "1", None, &Pages::from([(1, Some(11)), (2, Some(12)), (3, Some(13))]));
    write(tmp.path(), "2", Some("../1"), &Pages::from([(1, None), (2, Some(22)), (9, Some(29))]));
    write(tmp.path(), "3", Some("../2"), &Pages::from([(1, None), (2, None), (9, Some(39))]));
    tmp
}

#[test]
fn a_page_comes_from_the_youngest_directory_that_holds_it() {
    let tmp = family();
    let chain = Chain::open(&tmp.path().join("3")).unwrap();
    assert_eq!(chain.pid(), PID);
    assert_eq!(chain.members().len(), 3);
    assert_eq!([1, 2, 9].map(|n| byte(&chain, n).unwrap()), [11, 22, 39]);
    let mut both = vec![0; 2 * PAGE_SIZE as usize];
    chain.read(AddrRange::new(PAGE_SIZE, 3 * PAGE_SIZE), &mut both).unwrap();
    assert_eq!((both[0], both[PAGE_SIZE as usize]), (11, 22));
    assert_eq!(chain.pages(), PageCount(3));
    assert_eq!(chain.lookup(Addr(PAGE_SIZE + 8)).map(|run| (run.member, run.offset)), Some((2, 8)));
}

#[test]
fn a_page_that_the_youngest_leaves_out_is_gone() {
    let tmp = family();
    let chain = Chain::open(&tmp.path().join("3")).unwrap();
    assert!(matches!(byte(&chain, 3), Err(ChainError::NotHeld { address, .. }) if address == page(3).start));
    assert!(chain.lookup(page(3).start).is_none());
}

#[test]
fn a_page_missing_in_the_parent_names_the_member() {
    let tmp = family();
    write(tmp.path(), "4", Some("../3"), &Pages::from([(1, None), (3, None)]));
    let error = Chain::open(&tmp.path().join("4")).unwrap_err();
    assert!(
        matches!(&error, ChainError::MissingInParent { path, address } if path.ends_with("4") && *address == page(3).start),
        "{error}"
    );
    write(tmp.path(), "5", None, &Pages::from([(1, None)]));
    assert!(matches!(Chain::open(&tmp.path().join("5")), Err(ChainError::MissingInParent { .. })));
}

#[test]
fn damaged_members_are_named() {
    let tmp = family();
    let chain = || Chain::open(&tmp.path().join("3")).map(|_| ()).unwrap_err().to_string();
    fs::write(tmp.path().join("1/pages-1.img"), [0; 100]).unwrap();
    assert!(chain().contains("/1: pages-1.img has 100 bytes where the pagemap counts 12288"), "{}", chain());
    fs::remove_file(tmp.path().join("1/pages-1.img")).unwrap();
    assert!(chain().contains("/1: pages-1.img has 0 bytes"), "{}", chain());
    fs::write(tmp.path().join("2/pagemap-100.img"), [0; 100]).unwrap();
    assert!(chain().contains("/2: pagemap-100.img: not a Pagemap image"), "{}", chain());
    fs::remove_file(tmp.path().join("2").join(INVENTORY)).unwrap();
    assert!(chain().contains("/2: holds no complete checkpoint"), "{}", chain());
    fs::remove_dir_all(tmp.path().join("2")).unwrap();
    assert!(chain().contains("../2: cannot be opened"), "{}", chain());
}

#[test]
fn a_cycle_is_seen_and_named() {
    let tmp = family();
    symlink("../3", tmp.path().join("1/parent")).unwrap();
    let error = Chain::open(&tmp.path().join("3")).unwrap_err();
    assert!(matches!(&error, ChainError::Cycle(path) if path.ends_with("3")), "{error}");
}

#[test]
fn a_directory_of_the_chain_cannot_be_its_own_parent() {
    let tmp = family();
    for prev in ["../2", "."] {
        let fresh = tmp.path().join(format!("new{}", prev.len()));
        fs::create_dir(&fresh).unwrap();
        let dir = ImagesDir::open(&fresh).unwrap();
        // A checkpoint appears in it between the two checks.
        fs::write(fresh.join(INVENTORY), inventory()).unwrap();
        let _ = fs::remove_file(tmp.path().join("1/parent"));
        symlink(&fresh, tmp.path().join("1/parent")).unwrap();
        let error = dir.open_parent(Path::new(prev), PID).unwrap_err();
        assert!(matches!(error, crate::image::DirError::InChain { .. }), "{error}");
    }
}

#[test]
fn a_link_in_place_of_an_image_is_not_followed() {
    let tmp = family();
    let pages = tmp.path().join("1/pages-1.img");
    fs::rename(&pages, tmp.path().join("elsewhere")).unwrap();
    symlink("../elsewhere", &pages).unwrap();
    assert!(matches!(Chain::open(&tmp.path().join("3")), Err(ChainError::Read { .. })));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]

    /// Random generations of random pages: the chain gives what a map kept beside says.
    #[test]
    fn the_reassembled_checkpoint_is_the_newest_of_each_page(
        generations in prop::collection::vec(prop::collection::btree_map(0u64..24, any::<Option<u8>>(), 0..20), 1..6),
    ) {
        let tmp = tempfile::tempdir().unwrap();
        let mut truth: BTreeMap<u64, u8> = BTreeMap::new();
        for (n, wanted) in generations.iter().enumerate() {
            // A page can only be left to a parent that has it.
            let pages: Pages =
                wanted.iter().filter(|(p, b)| b.is_some() || truth.contains_key(p)).map(|(p, b)| (*p, *b)).collect();
            let parent = n.checked_sub(1).map(|p| format!("../{p}"));
            write(tmp.path(), &n.to_string(), parent.as_deref(), &pages);
            truth = pages.iter().map(|(p, b)| (*p, b.unwrap_or_else(|| truth[p]))).collect();
        }
        let chain = Chain::open(&tmp.path().join((generations.len() - 1).to_string())).unwrap();
        for n in 0..24 {
            prop_assert_eq!(byte(&chain, n).ok(), truth.get(&n).copied());
        }
        prop_assert_eq!(chain.held().pages().get(), truth.len() as u64);
    }
}
