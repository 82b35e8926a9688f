//! `inventory.img`: what makes a directory a checkpoint.

use super::magic::ImageKind;
use super::meta::PageMode;
use super::proto::{InventoryEntry, LsmType, TaskKobjIdsEntry};
use super::record::Image;

/// The format version written since CRIU 1.
const IMG_VERSION: u32 = 2;

/// CRIU's enum NETWORK_LOCK_METHOD: iptables is 0.
const NETWORK_LOCK_NFTABLES: u32 = 1;

/// What an inventory says.
#[derive(Clone, Debug, Default)]
pub struct Inventory {
    /// How a pre-dump took its pages; `None` for a dump.
    pub pre_dump_mode: Option<PageMode>,
    /// Time since boot in microseconds (`/proc/uptime`). A child is refused when its process started later.
    pub uptime_us: u64,
    /// The kernel objects of the root task; a dump that can be restored has them.
    pub root_ids: Option<TaskKobjIdsEntry>,
    /// The checkpoint's name, as `dump_criu_run_id`.
    pub run_id: Option<String>,
    /// The packets of its TCP connections are dropped, by nf_tables, until it is restored.
    pub blocks_connections: bool,
}

impl Inventory {
    /// The content of `inventory.img`.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let entry = InventoryEntry {
            img_version: IMG_VERSION,
            fdinfo_per_id: Some(true),
            root_ids: self.root_ids.clone(),
            ns_per_id: Some(true),
            root_cg_set: Some(1),
            lsmtype: Some(LsmType::NoLsm as i32),
            dump_uptime: Some(self.uptime_us),
            pre_dump_mode: self.pre_dump_mode.map(|mode| match mode {
                PageMode::Splice => 1,
                PageMode::Read => 2,
            }),
            dump_criu_run_id: self.run_id.clone(),
            network_lock_method: self.blocks_connections.then_some(NETWORK_LOCK_NFTABLES),
            ..Default::default()
        };
        Image::new(ImageKind::Inventory).with(&entry).into_bytes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::record;

    #[test]
    fn it_says_what_readers_look_for_first() {
        let inventory = Inventory { pre_dump_mode: Some(PageMode::Read), uptime_us: 5, ..Default::default() };
        let read: InventoryEntry =
            record::single("inventory.img", ImageKind::Inventory, &inventory.encode()).unwrap();
        assert_eq!((read.img_version, read.fdinfo_per_id, read.ns_per_id), (2, Some(true), Some(true)));
        assert_eq!((read.root_cg_set, read.pre_dump_mode, read.dump_uptime), (Some(1), Some(2), Some(5)));
        assert_eq!(Inventory::default().encode()[..4], [0x16, 0x31, 0x31, 0x58]);
    }
}
