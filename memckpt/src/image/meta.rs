//! `memckpt.json`: what memckpt knows of a checkpoint and CRIU's images have no field for. CRIU ignores it.

use serde::{Deserialize, Serialize};

use super::audit::Audit;
use crate::addr::{AddrRange, PageCount};
use crate::kernel::sysv_shm::SegmentStat;
use crate::tracker::epoch::{CheckpointId, Epoch, SessionId};

/// The file's name. Not `.img`: it is none of CRIU's.
pub const META: &str = "memckpt.json";
/// The version of [`CheckpointMeta`] written and read here.
pub const META_VERSION: u32 = 1;

/// Whether a checkpoint holds memory only, or more.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum CheckpointKind {
    /// Memory only; the target ran on.
    PreDump,
    /// Memory and the state of the process.
    Dump,
}

/// How the pages left the target.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum PageMode {
    /// By a parasite's vmsplice(2) through pipes.
    Splice,
    /// By reading `/proc/PID/mem`, or process_vm_readv(2), without a parasite.
    Read,
}

/// Which process it was: the PID and when it started, in clock ticks since boot (`/proc/PID/stat`, field 22).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MetaTarget {
    /// PID, in the PID namespace of the dumper.
    pub pid: i32,
    /// Start time in clock ticks since boot.
    pub start_time: u64,
}

/// What a checkpoint counted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Counters {
    /// Pages that were found present or swapped, and decided on one by one.
    pub pages_scanned: PageCount,
    /// Pages in the ranges that the kernel was asked to look at.
    pub entries_read: PageCount,
    /// Pages whose bytes are in this directory.
    pub pages_written: PageCount,
    /// Pages left to the parent.
    pub pages_inherited: PageCount,
    /// Pages of shared memory without a file; in this directory too, beside `pages_written`.
    pub shared_pages_written: PageCount,
    /// Layout events seen since the epoch began.
    pub layout_events: u64,
    /// Chunks of 2 MiB touched since the epoch began; `None` without hints.
    pub chunks_touched: Option<u64>,
    /// Sum of all loss counters. Anything but 0 made the scan a full one.
    pub losses: u64,
}

impl Counters {
    /// Adds what another process of the tree counted.
    pub fn add(&mut self, other: &Self) {
        self.pages_scanned += other.pages_scanned;
        self.entries_read += other.entries_read;
        self.pages_written += other.pages_written;
        self.pages_inherited += other.pages_inherited;
        self.shared_pages_written += other.shared_pages_written;
        self.layout_events += other.layout_events;
        self.losses += other.losses;
        self.chunks_touched = match (self.chunks_touched, other.chunks_touched) {
            (Some(a), Some(b)) => Some(a + b),
            (a, b) => a.or(b),
        };
    }
}

/// How long the steps took, in microseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Timings {
    /// Until all threads stood still.
    pub freezing_us: u64,
    /// While all threads stood still.
    pub frozen_us: u64,
    /// Getting the pages out of the target.
    pub memdump_us: u64,
    /// Writing them to disk.
    pub memwrite_us: u64,
    /// Clearing the dirty state.
    pub clear_us: u64,
}

/// Asynchronous I/O of the target's: whether some may have been under way at the freeze, to land in a page that read clean
/// (docs/soundness.md, row 34).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum AsyncIo {
    /// None.
    #[default]
    None,
    /// It had an io_uring since the checkpoint before: what a closed one has under way ends in the background
    /// (io_ring_exit_work(), io_uring/io_uring.c).
    Ending,
    /// It has an AIO context or an io_uring.
    Present,
}

/// What an incremental checkpoint must know of a process in its parent.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MetaProcess {
    /// Which process.
    pub target: MetaTarget,
    /// The session that tracked it, if one did.
    pub session: Option<SessionId>,
    /// The epoch that the checkpoint's clear began; `None` where nothing was cleared.
    pub epoch: Option<Epoch>,
    /// Whether asynchronous I/O of the process may have been under way.
    #[serde(default)]
    pub async_io: AsyncIo,
    /// Its address space.
    #[serde(default)]
    pub space: MetaSpace,
}

/// What CRIU's images, or some of them, have no field for, of an address space.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct MetaSpace {
    /// Guard regions (MADV_GUARD_INSTALL, Linux 6.13).
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub guards: Vec<AddrRange>,
    /// Areas whose pages are locked as they come (MLOCK_ONFAULT). Of others that are locked all pages are.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub locked_on_fault: Vec<AddrRange>,
}

/// A System V segment that the tree has attached. CRIU's images have one of an IPC namespace only.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MetaSegment {
    /// Its content: that of `pagemap-shmem-OBJECT.img`.
    pub object: u32,
    /// Its number.
    pub id: i32,
    /// What it is.
    #[serde(flatten)]
    pub stat: SegmentStat,
}

/// One checkpoint.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CheckpointMeta {
    /// [`META_VERSION`] of the writer.
    pub version: u32,
    /// The version of memckpt that wrote it.
    pub memckpt: String,
    /// Its name in the chain.
    pub id: CheckpointId,
    /// Memory only, or more.
    pub kind: CheckpointKind,
    /// The checkpoint in the `parent` directory.
    pub parent: Option<CheckpointId>,
    /// The session that tracked the target, if one did.
    pub session: Option<SessionId>,
    /// The epoch that this checkpoint's clear began; `None` where nothing was cleared.
    pub epoch: Option<Epoch>,
    /// Which dirty source decided, as `--tracker` names it; `None` when everything was dumped.
    pub tracker: Option<String>,
    /// How far hints narrowed the scan.
    pub hint_mode: Option<String>,
    /// How the pages left the target.
    pub page_mode: PageMode,
    /// Which process it is of: the root of the tree.
    pub target: MetaTarget,
    /// `/proc/sys/kernel/random/boot_id`: PIDs and start times mean nothing in another boot.
    pub boot_id: String,
    /// When the target was frozen, in milliseconds since 1970.
    pub taken_unix_ms: u64,
    /// Whether asynchronous I/O may have been under way.
    #[serde(default)]
    pub async_io: AsyncIo,
    /// Its address space.
    #[serde(default)]
    pub space: MetaSpace,
    /// Whether there are checksums of its pages.
    #[serde(default)]
    pub checksums: bool,
    /// The System V segments that the tree has attached.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub segments: Vec<MetaSegment>,
    /// The root's descendants.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub descendants: Vec<MetaProcess>,
    /// What it counted, over all processes.
    #[serde(default)]
    pub counters: Counters,
    /// How long it took.
    #[serde(default)]
    pub timings: Timings,
    /// What `--audit` looked at; nothing was wrong.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub audit: Option<Audit>,
    /// What a user should know of it: weaker modes and why.
    #[serde(default)]
    pub notes: Vec<String>,
}

/// A `memckpt.json` that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum MetaError {
    /// Not the JSON expected.
    #[error("{META} is damaged: {0}")]
    Json(#[from] serde_json::Error),
    /// Written by a later memckpt.
    #[error("{META} has version {0}, this memckpt reads up to {META_VERSION}")]
    Version(u32),
}

impl CheckpointMeta {
    /// What it says of process `pid`, if it holds that.
    #[must_use]
    pub fn process(&self, pid: i32) -> Option<MetaProcess> {
        if self.target.pid == pid {
            let Self { target, session, epoch, async_io, space, .. } = self.clone();
            return Some(MetaProcess { target, session, epoch, async_io, space });
        }
        self.descendants.iter().find(|process| process.target.pid == pid).cloned()
    }

    /// The file's content.
    ///
    /// # Errors
    /// None in practice: no key or value here can fail to become JSON.
    pub fn encode(&self) -> Result<Vec<u8>, MetaError> {
        let mut text = serde_json::to_vec_pretty(self)?;
        text.push(b'\n');
        Ok(text)
    }

    /// Reads the file's content.
    ///
    /// # Errors
    /// It is damaged, or of a later version.
    pub fn decode(bytes: &[u8]) -> Result<Self, MetaError> {
        #[derive(Deserialize)]
        struct Version {
            version: u32,
        }
        let Version { version } = serde_json::from_slice(bytes)?;
        if version > META_VERSION {
            return Err(MetaError::Version(version));
        }
        Ok(serde_json::from_slice(bytes)?)
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// A checkpoint of process 100 for tests.
    pub(crate) fn sample() -> CheckpointMeta {
        CheckpointMeta {
            version: META_VERSION,
            memckpt: "0.1.0".into(),
            id: "00112233445566778899aabbccddeeff".parse().unwrap(),
            kind: CheckpointKind::PreDump,
            parent: None,
            session: None,
            epoch: Some(Epoch(2)),
            tracker: Some("soft-dirty".into()),
            hint_mode: Some("complete".into()),
            page_mode: PageMode::Splice,
            target: MetaTarget { pid: 100, start_time: 12345 },
            boot_id: "b".into(),
            taken_unix_ms: 1_700_000_000_000,
            async_io: AsyncIo::Ending,
            space: MetaSpace { guards: vec![AddrRange::new(0x1000, 0x2000)], ..MetaSpace::default() },
            checksums: false,
            segments: Vec::new(),
            descendants: Vec::new(),
            counters: Counters { pages_written: PageCount(3), ..Counters::default() },
            timings: Timings { frozen_us: 900, ..Timings::default() },
            audit: None,
            notes: vec!["one".into()],
        }
    }

    #[test]
    fn it_comes_back_and_damage_is_an_error() {
        let bytes = sample().encode().unwrap();
        assert_eq!(CheckpointMeta::decode(&bytes).unwrap(), sample());
        for cut in 0..bytes.len() - 2 {
            assert!(CheckpointMeta::decode(&bytes[..cut]).is_err());
        }
    }

    #[test]
    fn a_later_version_is_refused_by_number_and_unknown_fields_are_not() {
        let mut value = serde_json::to_value(sample()).unwrap();
        value["something"] = 1.into();
        assert_eq!(CheckpointMeta::decode(&serde_json::to_vec(&value).unwrap()).unwrap(), sample());
        value["version"] = 9.into();
        value["kind"] = "from the future".into();
        let error = CheckpointMeta::decode(&serde_json::to_vec(&value).unwrap()).unwrap_err();
        assert!(matches!(error, MetaError::Version(9)), "{error}");
    }
}
