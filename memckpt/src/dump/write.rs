//! After the thaw: the images, and the inventory last. Then the end of the tree, if it is to end.

use std::time::{Instant, SystemTime, UNIX_EPOCH};

use crate::addr::PageCount;
use crate::image::checksums::CHECKSUMS;
use crate::image::magic::{
    ImageKind, PSTREE, SECCOMP, STATS_DUMP, core_name, mm_name, pagemap_name, pagemap_shmem_name,
};
use crate::image::meta::{self, CheckpointKind, Counters, META, META_VERSION, MetaProcess};
use crate::image::pagemap::{PagemapFlags, PagemapImage};
use crate::image::{CheckpointMeta, Checksums, Image, ImagesDir, core, inventory, mm, pstree, stats};
use crate::kernel::process;
use crate::kernel::status::Stat;
use crate::plan::{PageAction, PlannedRun, VmaClass, VmaStatus};
use crate::target::{FreezeError, Zombie};
use crate::tracker::agent::HintMode;

use super::error::DumpError;
use super::files::Files;
use super::process::CapturedProcess;
use super::request::{CriuVersion, Kind, PageMode, Request};
use super::shared::SharedObjects;
use super::task::State;
use super::{Captured, micros, state};

impl Captured {
    /// Writes the images; makes the checkpoint whole; lets the session go if nobody wants it any more.
    pub(super) fn write(mut self, request: &Request) -> Result<CheckpointMeta, DumpError> {
        let writing = Instant::now();
        let mut checksums = Checksums::new();
        for process in &mut self.processes {
            let runs = process.compose()?;
            let inherited = runs.iter().filter(|run| run.action == PageAction::Inherit);
            process.counters.pages_inherited = inherited.map(|run| run.range.pages()).sum();
            let name = pagemap_name(process.target.pid);
            let pagemap = pagemap(&name, process.pages_id, &runs)?;
            self.images.write(&name, &pagemap.encode())?;
            checksums.add(name, &pagemap, &process.pages)?;
        }
        if let (Some(prev), true) = (&request.prev_images_dir, self.has_parent()) {
            self.images.link_parent(prev)?;
        }
        let shared_pages = self.write_shared(&mut checksums)?;
        if request.kind == Kind::Dump {
            self.files.write(&mut self.images)?;
            self.notes.extend_from_slice(self.files.notes());
            self.notes.extend(self.shared.segments().iter().map(|segment| {
                format!(
                    "System V segment {} comes back with memckpt restore; criu restore does not make it",
                    segment.id
                )
            }));
            self.write_tree(request.files.criu_version)?;
        }
        self.images.write(CHECKSUMS, &checksums.encode().map_err(|e| DumpError::encode(CHECKSUMS, e))?)?;
        self.timings.memwrite_us = micros(writing);
        if !self.doomed.is_empty() {
            self.timings.frozen_us = micros(self.stopped);
        }

        let meta = self.meta(request, shared_pages)?;
        self.write_stats(&meta, request)?;
        self.images.write(META, &meta.encode().map_err(|e| DumpError::encode(META, e))?)?;
        let inventory = inventory::Inventory {
            pre_dump_mode: (request.kind == Kind::PreDump).then_some(meta.page_mode),
            uptime_us: state::uptime_us()?,
            root_ids: (request.kind == Kind::Dump).then(Files::root_objects),
            run_id: Some(self.checkpoint.to_string()),
            blocks_connections: self.connections.are_blocked(),
        };
        self.images.finish(&inventory.encode())?;

        if !self.doomed.is_empty() {
            for process in self.doomed {
                process.kill()?;
            }
            self.connections.end(&self.checkpoint.to_string(), request);
            request.tell_release();
        }
        if request.kind == Kind::Dump && !request.track_mem {
            for process in self.processes {
                process.tracking.end(process.target.pid)?;
            }
        }
        Ok(meta)
    }

    /// Whether anything may be left to the parent.
    fn has_parent(&self) -> bool {
        self.processes.iter().any(|process| process.parent.is_some())
    }

    /// The content of shared memory without a file; how many pages there are.
    fn write_shared(&mut self, checksums: &mut Checksums) -> Result<PageCount, DumpError> {
        for (id, image, pages) in self.shared.images() {
            let name = pagemap_shmem_name(id);
            self.images.write(&name, &image.encode())?;
            checksums.add(name, image, pages)?;
        }
        Ok(self.shared.pages())
    }

    /// What a dump holds beyond memory: the tree, and of each process the address space and each thread's registers.
    fn write_tree(&mut self, criu_version: CriuVersion) -> Result<(), DumpError> {
        let states = self.processes.iter().filter_map(|process| process.state.as_ref());
        let mut tree: Vec<pstree::Process> = states.map(|state| state.process.clone()).collect();
        for Zombie { pid, stat } in &self.zombies {
            let Stat { ppid, pgid, sid, .. } = *stat;
            tree.push(pstree::Process { pid: *pid, ppid, pgid, sid, threads: vec![*pid] });
            let entry = core::zombie(&stat.comm, stat.exit_code);
            self.images.write(&core_name(*pid), &core::encode(&entry))?;
        }
        self.images.write(PSTREE, &pstree::encode(&tree))?;
        if let Some(entry) = self.filters.entry() {
            self.images.write(SECCOMP, &Image::new(ImageKind::Seccomp).with(entry).into_bytes())?;
        }
        for process in &self.processes {
            if let Some(state) = &process.state {
                let images = &mut self.images;
                write_process(process, state, &self.files, &self.shared, criu_version, images)?;
            }
        }
        Ok(())
    }

    fn write_stats(&mut self, meta: &CheckpointMeta, request: &Request) -> Result<(), DumpError> {
        let bytes = stats::encode(&meta.counters, &meta.timings);
        match &request.work_dir {
            None => Ok(self.images.write(STATS_DUMP, &bytes)?),
            Some(dir) => {
                let path = dir.join(STATS_DUMP);
                Ok(std::fs::write(&path, bytes)
                    .map_err(|e| crate::kernel::SyscallError::new("write", path.display().to_string(), e))?)
            }
        }
    }

    fn meta(&self, request: &Request, shared_pages: PageCount) -> Result<CheckpointMeta, DumpError> {
        let Some((root, descendants)) = self.processes.split_first() else {
            return Err(FreezeError::Gone { pid: request.pid }.into());
        };
        let mut counters = Counters { shared_pages_written: shared_pages, ..Counters::default() };
        self.processes.iter().for_each(|process| counters.add(&process.counters));
        let mut audit = root.audit.clone();
        if let Some(audit) = &mut audit {
            descendants.iter().filter_map(|process| process.audit.clone()).for_each(|more| audit.add(more));
        }
        let MetaProcess { target, session, epoch, async_io, space } = root.meta();
        let spliced = |process: &CapturedProcess| process.mode == PageMode::Splice;
        Ok(CheckpointMeta {
            version: META_VERSION,
            memckpt: env!("CARGO_PKG_VERSION").to_owned(),
            id: self.checkpoint.clone(),
            kind: match request.kind {
                Kind::PreDump => CheckpointKind::PreDump,
                Kind::Dump => CheckpointKind::Dump,
            },
            parent: self.processes.iter().find_map(|process| Some(process.parent.as_ref()?.id.clone())),
            session,
            epoch,
            tracker: root.tracking.tracker().map(|t| t.to_string()),
            hint_mode: root.tracking.info().map(|i| match (&i.hint_mode, &root.known.full_scan) {
                (HintMode::Complete, None) => "complete".to_owned(),
                (HintMode::Complete, Some(reason)) => format!("complete, but all was scanned: {reason}"),
                // The session's notes say what is missing.
                (HintMode::Incomplete { .. }, _) => "incomplete".to_owned(),
                (HintMode::None, _) => "none".to_owned(),
            }),
            page_mode: match self.processes.iter().all(spliced) {
                true => meta::PageMode::Splice,
                false => meta::PageMode::Read,
            },
            target,
            boot_id: process::boot_id()?,
            taken_unix_ms: SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_millis() as u64),
            async_io,
            space,
            checksums: true,
            segments: self.shared.segments(),
            descendants: descendants.iter().map(CapturedProcess::meta).collect(),
            counters,
            audit,
            timings: self.timings,
            notes: self.notes.clone(),
        })
    }
}

/// The address space and the threads of a process.
fn write_process(
    process: &CapturedProcess,
    state: &State,
    files: &Files,
    shared: &SharedObjects,
    criu_version: CriuVersion,
    images: &mut ImagesDir,
) -> Result<(), DumpError> {
    let pid = process.target.pid;
    let vmas: Vec<mm::VmaRecord<'_>> = process
        .layout
        .iter()
        .map(|(vma, class, facts)| {
            let mapped = files.mapping(pid, vma.range);
            let object = match class {
                VmaClass::SharedAnon(kind) => shared.id(vma, kind),
                _ => None,
            };
            mm::VmaRecord {
                vma,
                status: class.status(vma).bits(),
                flags: class.map_flags(vma, facts),
                madv: match class {
                    VmaClass::Private(_) | VmaClass::SharedFile | VmaClass::SharedAnon(_) => {
                        process.layout.advice(vma)
                    }
                    // The kernel's own, which it marks as it likes.
                    _ => 0,
                },
                shmid: mapped.map(|file| file.id).or(object).map_or(0, u64::from),
                fdflags: mapped.map(|file| file.flags),
            }
        })
        .collect();
    let mut entry = mm::mm_entry(&state.mm, &state.auxv, &vmas);
    if criu_version == CriuVersion::V4_2 {
        let guard = |range| mm::bare_entry(range, VmaStatus::GUARD.bits());
        entry.vmas.extend(process.guards().iter().map(guard));
    }
    entry.exe_file_id = files.executable(pid);
    entry.thp_disabled = state.thp_disabled.then_some(true);
    images.write(&mm_name(pid), &mm::encode(&entry))?;

    let xsave = core::XsaveLayout::of_this_processor();
    for (n, registers) in process.registers.iter().enumerate() {
        let Some(thread) = state.thread(n, registers) else { continue };
        let task = (registers.tid == pid).then_some(&state.task);
        let name = core_name(registers.tid);
        let entry = core::core_entry(&thread, task, &xsave).map_err(|e| DumpError::encode(&*name, e))?;
        images.write(&name, &core::encode(&entry))?;
    }
    Ok(())
}

/// The pagemap image `name`.
fn pagemap(name: &str, pages_id: u32, runs: &[PlannedRun]) -> Result<PagemapImage, DumpError> {
    let mut image = PagemapImage::new(pages_id);
    for run in runs {
        let mut flags = match run.action {
            PageAction::Dump => PagemapFlags::PRESENT,
            PageAction::Inherit => PagemapFlags::PARENT,
        };
        flags.set(PagemapFlags::LAZY, run.lazy && run.action == PageAction::Dump);
        image.push(run.range, flags).map_err(|e| DumpError::encode(name, e))?;
    }
    Ok(image)
}
