//! Open files: the descriptors of a tree, what its mappings map, its executables and directories, and what only the kernel holds of
//! them.
//!
//! Everything is looked at through copies of the target's descriptors (pidfd_getfd(2)), which are the same open files: nothing
//! here moves a position, takes from a pipe or a queue, or sets a flag. The same look is taken twice: before the freeze, so that what
//! is not covered is refused while the tree runs untouched, and in it, for the images.
//!
//! A dump that ends the tree is refused for what is not covered. One that leaves it alive says what is missing, each by its name:
//! nothing is lost then but the use of that checkpoint for a restore.

use std::collections::{BTreeMap, HashMap};

use crate::addr::{Addr, AddrRange};
use crate::image::proto::TaskKobjIdsEntry;
use crate::image::{ImagesDir, OpenFiles};

use super::connections::Streams;
use super::error::DumpError;
use super::layout::Layout;
use super::queues::Queues;
use super::request::Request;
use super::shared::SharedObjects;

mod collector;
mod directories;
mod event;
mod lock;
mod mapping;
mod memfd;
mod namespace;
mod path;
mod pipe;
mod refusal;
mod socket;
mod terminal;

use collector::Collector;

pub(super) use refusal::refuse_descriptor;

/// One process of the tree.
#[derive(Clone, Copy)]
pub(super) struct Task<'a> {
    pub(super) pid: i32,
    pub(super) layout: &'a Layout,
}

/// What was read of a frozen tree's sockets: established connections, and messages.
pub(super) type Sockets<'a> = (&'a Streams, &'a Queues);

/// What a mapping of a file maps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Mapped {
    /// The file's number in `files.img`.
    pub(super) id: u32,
    /// How it was opened: O_RDONLY, O_WRONLY or O_RDWR.
    pub(super) flags: u32,
}

/// The open files of a tree.
#[derive(Default)]
pub(super) struct Files {
    taken: OpenFiles,
    /// The kernel objects that each process has, by number.
    ids: BTreeMap<i32, TaskKobjIdsEntry>,
    executables: HashMap<i32, u32>,
    mappings: HashMap<(i32, Addr), Mapped>,
    notes: Vec<String>,
}

impl Files {
    /// Looks at the open files of `tasks` while they run, and opens what must be open before the freeze.
    ///
    /// # Errors
    /// [`DumpError::Refused`] if any of them cannot be captured. What has changed between two looks is no error here.
    pub(super) fn prepare(
        tasks: &[Task<'_>],
        request: &Request,
        shared: &mut SharedObjects,
        images: &mut ImagesDir,
    ) -> Result<(), DumpError> {
        match Self::look(tasks, request, None, shared, images) {
            // A descriptor that was closed meanwhile, or a process that has ended; in the freeze there is none.
            Err(error @ (DumpError::Syscall(_) | DumpError::Process(_))) => {
                tracing::debug!("descriptors before the freeze: {error}");
                Ok(())
            }
            other => other.map(drop),
        }
    }

    /// Takes the open files of `tasks`, which stand still, and whose established connections and queues of messages were read.
    ///
    /// # Errors
    /// [`DumpError::Refused`], or a system call fails.
    pub(super) fn collect(
        tasks: &[Task<'_>],
        request: &Request,
        sockets: Sockets<'_>,
        shared: &mut SharedObjects,
        images: &mut ImagesDir,
    ) -> Result<Self, DumpError> {
        Self::look(tasks, request, Some(sockets), shared, images)
    }

    fn look(
        tasks: &[Task<'_>],
        request: &Request,
        sockets: Option<Sockets<'_>>,
        shared: &mut SharedObjects,
        images: &mut ImagesDir,
    ) -> Result<Self, DumpError> {
        let mut collector = Collector::new(request, sockets, shared, images);
        for task in tasks {
            collector.unless_refused(namespace::same_as_ours(task.pid))?;
        }
        let mut files = Self { ids: namespace::objects(tasks)?, ..Self::default() };
        let mut done = Vec::new();
        for task in tasks {
            let ids = &files.ids[&task.pid];
            if !done.contains(&ids.files_id) {
                done.push(ids.files_id);
                let table = collector.table(task.pid)?;
                files.taken.descriptors.push((ids.files_id, table));
            }
        }
        collector.connect()?;
        for task in tasks {
            let executable = collector.executable(task.pid);
            if let Some(id) = collector.unless_refused(executable)? {
                files.executables.insert(task.pid, id);
            }
            let directories = collector.directories(task.pid);
            if let Some(directories) = collector.unless_refused(directories)? {
                files.taken.directories.push((task.pid, directories));
            }
            for (vma, class, _) in task.layout.iter() {
                let mapped = collector.mapping(task.pid, vma, class);
                if let Some(mapped) = collector.unless_refused(mapped)?.flatten() {
                    files.mappings.insert((task.pid, vma.range.start), mapped);
                }
            }
        }
        let (taken, notes) = collector.finish();
        let descriptors = std::mem::take(&mut files.taken.descriptors);
        let directories = std::mem::take(&mut files.taken.directories);
        let ids = files.ids.iter().map(|(pid, ids)| (*pid, ids.clone())).collect();
        files.taken = OpenFiles { descriptors, directories, ids, ..taken };
        files.notes = notes;
        Ok(files)
    }

    /// Writes the images: `files.img` and those beside it.
    ///
    /// # Errors
    /// As [`ImagesDir::write`].
    pub(super) fn write(&self, images: &mut ImagesDir) -> Result<(), DumpError> {
        Ok(self.taken.write(images)?)
    }

    /// The number of the executable of `pid`.
    pub(super) fn executable(&self, pid: i32) -> u32 {
        self.executables.get(&pid).copied().unwrap_or(0)
    }

    /// What the mapping of `pid` at `range` maps.
    pub(super) fn mapping(&self, pid: i32, range: AddrRange) -> Option<Mapped> {
        self.mappings.get(&(pid, range.start)).copied()
    }

    /// What the inventory says of the dumper's own kernel objects, from which those of the tree are told.
    pub(super) fn root_objects() -> TaskKobjIdsEntry {
        namespace::ours()
    }

    /// What the user should know.
    pub(super) fn notes(&self) -> &[String] {
        &self.notes
    }
}
