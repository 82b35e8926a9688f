//! The dump, readable as a list of steps: prepare, freeze, look, grab, begin the next epoch, thaw, write. A tree that is to be
//! ended stands until the checkpoint is whole, and is let go if that fails.

use std::time::{Duration, Instant};

use crate::image::meta::Timings;
use crate::image::{Audit, CheckpointMeta, ImagesDir};
use crate::kernel::cgroup::Cgroup;
use crate::kernel::memory::ProcMem;
use crate::kernel::process::TargetId;
use crate::kernel::{maps, status};
use crate::target::{Frozen, FrozenTree, Zombie, descendants, on_tracer_thread};
use crate::tracker::epoch::CheckpointId;

mod audit;
mod connections;
mod error;
mod files;
mod layout;
mod pages;
mod parent;
mod process;
mod queues;
pub mod refuse;
mod request;
mod restless;
mod shared;
mod state;
mod task;
mod tracking;
mod write;

pub use error::DumpError;
pub use refuse::Refusal;
pub use request::{Afterwards, CriuVersion, FileOptions, Kind, PageMode, Request};

use connections::Connections;
use files::{Files, Task};
use layout::Layout;
use process::{CapturedProcess, PreparedProcess};
use queues::Queues;
use shared::SharedObjects;
use task::Filters;
use tracking::Tracking;

/// Audits the session of process `pid`, which stands still meanwhile: the layout that it knows, and whether every page that
/// changed lies where its hints say. Nothing is cleared; the session goes on.
///
/// # Errors
/// [`DumpError::Audit`] if anything is wrong; there is no session; the process cannot be frozen.
pub fn audit_session(pid: i32, timeout: Duration) -> Result<Audit, DumpError> {
    on_tracer_thread(|| audit::session(pid, timeout))
}

/// Takes one checkpoint.
///
/// # Errors
/// See [`DumpError`]. Whatever the error, the target lives on, the parent is intact, and the images directory holds no
/// `inventory.img` and so does not look complete.
pub fn run(request: &Request) -> Result<CheckpointMeta, DumpError> {
    // A thread that did not stop in time cannot be detached from; it is released when its tracer, a thread, ends.
    on_tracer_thread(|| Prepared::new(request)?.capture(request)?.write(request))
}

/// Everything that needs no freeze.
struct Prepared {
    checkpoint: CheckpointId,
    images: ImagesDir,
    cgroup: Option<Cgroup>,
    /// The root first.
    processes: Vec<PreparedProcess>,
    shared: SharedObjects,
    notes: Vec<String>,
}

/// What was taken while the tree stood still.
struct Captured {
    checkpoint: CheckpointId,
    images: ImagesDir,
    /// Parents before their children, the root first.
    processes: Vec<CapturedProcess>,
    zombies: Vec<Zombie>,
    filters: Filters,
    shared: SharedObjects,
    files: Files,
    connections: Connections,
    stopped: Instant,
    /// Those that are to be ended once the checkpoint is whole.
    doomed: Vec<Frozen>,
    timings: Timings,
    notes: Vec<String>,
}

impl Prepared {
    fn new(request: &Request) -> Result<Self, DumpError> {
        let root = refuse::process(request)?;
        let cgroup = refuse::cgroup(request)?;
        let mut images = ImagesDir::open(&request.images_dir)?;
        let mut notes = Vec::new();

        // Whatever is refused is refused before any process is touched.
        let mut found = vec![Found::at(root, request, &images)?];
        for pid in descendants(request.pid)?.into_iter().skip(1) {
            let looked_at = match refuse::checkable(pid) {
                // As vfork(2) makes them: its parent stops no sooner than it has called exec, or ended.
                Err(Refusal::SharedMm { .. }) => continue,
                looked_at => looked_at.map_err(DumpError::from),
            };
            let looked_at = looked_at.and_then(|target| Found::at(target, request, &images));
            found.extend(unless_gone(pid, looked_at)?);
        }
        let mut processes = Vec::with_capacity(found.len());
        for found in found {
            let pid = found.target.pid;
            let prepared = found.prepare(&mut images, request, &mut notes);
            if pid == request.pid {
                processes.push(prepared?);
            } else {
                processes.extend(unless_gone(pid, prepared)?);
            }
        }
        let mut shared = SharedObjects::none();
        if request.kind == Kind::Dump {
            for process in &processes {
                shared.open(process.target.pid, &process.layout, &mut images)?;
            }
            let tasks: Vec<Task<'_>> = processes.iter().map(PreparedProcess::task).collect();
            Files::prepare(&tasks, request, &mut shared, &mut images)?;
        }
        let checkpoint = CheckpointId::random().map_err(DumpError::random)?;
        Ok(Self { checkpoint, images, cgroup, processes, shared, notes })
    }

    /// The part that the tree stands still for.
    fn capture(mut self, request: &Request) -> Result<Captured, DumpError> {
        let began = Instant::now();
        let mut tree = FrozenTree::freeze(request.pid, request.timeout)?;
        let stopped = Instant::now();
        refuse::sharers(&tree)?;
        if let Some(cgroup) = &self.cgroup {
            refuse::foreigners(cgroup, &tree, request)?;
        }

        // Look: what has changed?
        let mut processes = Vec::with_capacity(tree.processes().len());
        for frozen in tree.processes() {
            let process = self.prepared(frozen, request)?;
            let looked =
                process.look(frozen, request, &mut self.shared, &mut self.images, &mut self.notes)?;
            processes.push(looked);
        }

        // Ask: before the pages are taken, as threads that run write where they keep their CPU's number.
        let mut filters = Filters::default();
        if request.kind == Kind::Dump {
            for (process, frozen) in processes.iter_mut().zip(tree.processes_mut()) {
                let pid = process.target.pid;
                let ppid = if pid == request.pid { 0 } else { status::stat(pid)?.ppid };
                process.ask(frozen, ppid, &mut filters, request, &mut self.notes)?;
            }
        }

        let connections = Connections::take(&mut processes, tree.processes_mut(), request)?;
        let queues = Queues::take(&mut processes, tree.processes_mut(), request)?;
        let mut files = Files::default();
        if request.kind == Kind::Dump {
            let tasks: Vec<Task<'_>> = processes.iter().map(CapturedProcess::task).collect();
            files = Files::collect(
                &tasks,
                request,
                (connections.streams(), &queues),
                &mut self.shared,
                &mut self.images,
            )?;
        }

        // Grab.
        let grabbing = Instant::now();
        for (process, frozen) in processes.iter_mut().zip(tree.processes_mut()) {
            process.grab(frozen, &mut self.notes)?;
        }
        self.shared.grab()?;
        let memdump_us = micros(grabbing);

        // Begin the next epoch, whose parent this checkpoint is.
        let clearing = Instant::now();
        for process in &mut processes {
            process.end_of_epoch(&self.checkpoint, request)?;
        }
        let clear_us = micros(clearing);

        let zombies = tree.zombies().to_vec();
        let mut doomed = Vec::new();
        for frozen in tree.into_processes() {
            match request.afterwards {
                Afterwards::Running => frozen.thaw(),
                Afterwards::Stopped => frozen.leave_stopped()?,
                Afterwards::Ended => doomed.push(frozen),
            }
        }
        let frozen_us = micros(stopped);
        if doomed.is_empty() {
            request.tell_release();
        }

        let freezing_us = stopped.duration_since(began).as_micros() as u64;
        Ok(Captured {
            checkpoint: self.checkpoint,
            images: self.images,
            processes,
            zombies,
            filters,
            shared: self.shared,
            files,
            connections,
            stopped,
            doomed,
            timings: Timings { freezing_us, frozen_us, memdump_us, memwrite_us: 0, clear_us },
            notes: self.notes,
        })
    }

    /// What was prepared of a process that now stands still: everything must be made good in the freeze if it was not there
    /// before, or has called exec since.
    fn prepared(&mut self, frozen: &Frozen, request: &Request) -> Result<PreparedProcess, DumpError> {
        let pid = frozen.pid();
        if let Some(at) = self.processes.iter().position(|p| p.target.pid == pid) {
            let prepared = self.processes.swap_remove(at);
            // A session knows of its process's exec, and says that nothing is to be inherited.
            if pid == request.pid || prepared.is_up_to_date() {
                return Ok(prepared);
            }
        }
        let target = refuse::capturable(pid)?;
        let found = Found {
            target,
            memory: ProcMem::open(pid)?,
            chain: None,
            tracking: Tracking::none(pid)?,
            layout: Layout::read(pid, maps::read(pid)?, None)?,
        };
        let untracked = Request { track_mem: false, ..request.clone() };
        let process = found.prepare(&mut self.images, &untracked, &mut self.notes)?;
        if request.kind == Kind::Dump {
            self.shared.open(pid, &process.layout, &mut self.images)?;
        }
        Ok(process)
    }
}

/// A process of the tree that was looked at and not touched.
struct Found {
    target: TargetId,
    /// Opened before all else: if this is its memory in the freeze, it has not called exec since.
    memory: ProcMem,
    chain: Option<crate::image::Chain>,
    tracking: Tracking,
    layout: Layout,
}

impl Found {
    fn at(target: TargetId, request: &Request, images: &ImagesDir) -> Result<Self, DumpError> {
        let pid = target.pid;
        let memory = ProcMem::open(pid)?;
        let chain = match &request.prev_images_dir {
            Some(prev) => Some(images.open_parent(prev, pid)?),
            None => None,
        };
        let tracking = Tracking::find(pid, request.tracker)?;
        let layout = Layout::read(pid, maps::read(pid)?, tracking.tracker())?;
        Ok(Self { target, memory, chain, tracking, layout })
    }

    fn prepare(
        self,
        images: &mut ImagesDir,
        request: &Request,
        notes: &mut Vec<String>,
    ) -> Result<PreparedProcess, DumpError> {
        let Self { target, memory, chain, tracking, layout } = self;
        PreparedProcess::new((target, memory), chain, (tracking, layout), images, request, notes)
    }
}

/// What came of looking at a descendant that runs. It may end or call exec meanwhile, and so be another than a moment ago: then
/// it is left to the freeze, in which what fails fails for good.
fn unless_gone<T>(pid: i32, result: Result<T, DumpError>) -> Result<Option<T>, DumpError> {
    let is_gone = || matches!(refuse::checkable(pid), Err(Refusal::NoProcess(_) | Refusal::Zombie(..)));
    match result {
        Ok(value) => Ok(Some(value)),
        Err(
            error @ (DumpError::Maps(_)
            | DumpError::Dirty(_)
            | DumpError::Process(_)
            | DumpError::Syscall(_)
            | DumpError::Session(_)
            | DumpError::Infect(_)
            | DumpError::Refused(Refusal::CannotAsk { .. })),
        ) => {
            tracing::info!(pid, %error, "not prepared before the freeze");
            Ok(None)
        }
        Err(_) if is_gone() => Ok(None),
        Err(error) => Err(error),
    }
}

fn micros(since: Instant) -> u64 {
    since.elapsed().as_micros() as u64
}
