//! After the thaw: the images, and the inventory last.

use std::time::{Instant, SystemTime, UNIX_EPOCH};

use crate::image::magic::{STATS_DUMP, core_name, mm_name, pagemap_name, pagemap_shmem_name};
use crate::image::meta::{self, CheckpointKind, META, META_VERSION, MetaTarget};
use crate::image::pagemap::{PagemapFlags, PagemapImage};
use crate::image::{CheckpointMeta, core, inventory, mm, pstree, stats};
use crate::kernel::process;
use crate::plan::{self, Evidence, PageAction, PlannedRun, VmaClass};
use crate::tracker::agent::HintMode;

use super::error::DumpError;
use super::request::{Kind, PageMode, Request};
use super::{Captured, micros, state};

/// The number in `pages-N.img`: there is one process.
pub(super) const PAGES_ID: u32 = 1;

impl Captured {
    /// Writes the images; makes the checkpoint whole; lets the session go if nobody wants it any more.
    pub(super) fn write(mut self, request: &Request) -> Result<CheckpointMeta, DumpError> {
        let writing = Instant::now();
        let runs = self.compose()?;
        let inherited = runs.iter().filter(|run| run.action == PageAction::Inherit);
        self.counters.pages_inherited = inherited.map(|run| run.range.pages()).sum();
        self.write_pagemap(&runs)?;
        if let (Some(prev), Some(_)) = (&request.prev_images_dir, &self.parent) {
            self.images.link_parent(prev)?;
        }
        if request.kind == Kind::Dump {
            self.write_shared()?;
            self.write_process()?;
            self.notes.push(
                "holds memory and registers only: no descriptors, credentials, signals or timers yet".into(),
            );
        }
        self.timings.memwrite_us = micros(writing);

        let meta = self.meta(request)?;
        self.write_stats(request)?;
        self.images.write(META, &meta.encode().map_err(|e| DumpError::encode(META, e))?)?;
        let inventory = inventory::Inventory {
            pre_dump_mode: (request.kind == Kind::PreDump).then_some(meta.page_mode),
            uptime_us: state::uptime_us()?,
            root_ids: (request.kind == Kind::Dump).then(state::kernel_objects),
            run_id: Some(self.checkpoint.to_string()),
        };
        self.images.finish(&inventory.encode())?;

        if request.kind == Kind::Dump && !request.track_mem {
            self.tracking.end(self.target.pid)?;
        }
        Ok(meta)
    }

    /// Every page of the checkpoint, own or inherited.
    fn compose(&self) -> Result<Vec<PlannedRun>, DumpError> {
        Ok(plan::compose(&Evidence {
            areas: &self.layout.areas,
            scanned: &self.scanned,
            pages: &self.states,
            parent: self.parent.as_ref().map(|p| &p.held),
            changed: &self.known.changed,
            doubtful: &self.known.doubtful,
            tracking: self.known.broken.is_none(),
        })?)
    }

    fn write_pagemap(&mut self, runs: &[PlannedRun]) -> Result<(), DumpError> {
        let name = pagemap_name(self.target.pid);
        let mut image = PagemapImage::new(PAGES_ID);
        for run in runs {
            let mut flags = match run.action {
                PageAction::Dump => PagemapFlags::PRESENT,
                PageAction::Inherit => PagemapFlags::PARENT,
            };
            flags.set(PagemapFlags::LAZY, run.lazy && run.action == PageAction::Dump);
            image.push(run.range, flags).map_err(|e| DumpError::encode(&*name, e))?;
        }
        Ok(self.images.write(&name, &image.encode())?)
    }

    fn write_shared(&mut self) -> Result<(), DumpError> {
        for (id, image) in self.shared.images() {
            self.images.write(&pagemap_shmem_name(id), &image.encode())?;
        }
        self.counters.shared_pages_written = self.shared.pages();
        Ok(())
    }

    /// What a dump holds beyond memory: the tree, the address space, each thread's registers.
    fn write_process(&mut self) -> Result<(), DumpError> {
        let pid = self.target.pid;
        let threads: Vec<i32> = self.registers.iter().map(|r| r.tid).collect();
        self.images
            .write(crate::image::magic::PSTREE, &pstree::encode_single(&state::process(pid, threads)?))?;

        let vmas: Vec<mm::VmaRecord<'_>> = self
            .layout
            .iter()
            .map(|(vma, class, facts)| mm::VmaRecord {
                vma,
                status: class.status(vma).bits(),
                flags: class.map_flags(vma, facts),
                madv: 0,
                shmid: match class {
                    VmaClass::SharedAnon(kind) => self.shared.id(vma, kind).map_or(0, u64::from),
                    _ => 0,
                },
            })
            .collect();
        let entry = mm::mm_entry(&state::mm_numbers(pid, &self.layout.vmas)?, &state::auxv(pid)?, &vmas);
        self.images.write(&mm_name(pid), &mm::encode(&entry))?;

        let xsave = core::XsaveLayout::of_this_processor();
        for registers in &self.registers {
            let task = (registers.tid == pid).then(|| state::task(pid)).transpose()?;
            let thread = state::thread(pid, registers)?;
            let name = core_name(registers.tid);
            let entry =
                core::core_entry(&thread, task.as_ref(), &xsave).map_err(|e| DumpError::encode(&*name, e))?;
            self.images.write(&name, &core::encode(&entry))?;
        }
        Ok(())
    }

    fn write_stats(&mut self, request: &Request) -> Result<(), DumpError> {
        let bytes = stats::encode(&self.counters, &self.timings);
        match &request.work_dir {
            None => Ok(self.images.write(STATS_DUMP, &bytes)?),
            Some(dir) => {
                let path = dir.join(STATS_DUMP);
                Ok(std::fs::write(&path, bytes)
                    .map_err(|e| crate::kernel::SyscallError::new("write", path.display().to_string(), e))?)
            }
        }
    }

    fn meta(&self, request: &Request) -> Result<CheckpointMeta, DumpError> {
        let info = self.tracking.info();
        Ok(CheckpointMeta {
            version: META_VERSION,
            memckpt: env!("CARGO_PKG_VERSION").to_owned(),
            id: self.checkpoint.clone(),
            kind: match request.kind {
                Kind::PreDump => CheckpointKind::PreDump,
                Kind::Dump => CheckpointKind::Dump,
            },
            parent: self.parent.as_ref().map(|p| p.meta.id.clone()),
            session: info.map(|i| i.session.clone()),
            epoch: self.epoch,
            tracker: self.tracking.tracker().map(|t| t.to_string()),
            hint_mode: info.map(|i| match (&i.hint_mode, &self.known.full_scan) {
                (HintMode::Complete, None) => "complete".to_owned(),
                (HintMode::Complete, Some(reason)) => format!("complete, but all was scanned: {reason}"),
                // The session's notes say what is missing.
                (HintMode::Incomplete { .. }, _) => "incomplete".to_owned(),
                (HintMode::None, _) => "none".to_owned(),
            }),
            page_mode: match self.mode {
                PageMode::Splice => meta::PageMode::Splice,
                PageMode::Read => meta::PageMode::Read,
            },
            target: MetaTarget { pid: self.target.pid, start_time: self.target.start_time },
            boot_id: process::boot_id()?,
            taken_unix_ms: SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_millis() as u64),
            counters: self.counters,
            audit: self.audit.clone(),
            timings: self.timings,
            notes: self.notes.clone(),
        })
    }
}
