//! The dump, readable as a list of steps: prepare, freeze, look, grab, begin the next epoch, thaw, write.

use std::time::{Duration, Instant};

use crate::addr::PageCount;
use crate::image::meta::{Counters, Timings};
use crate::image::{Audit, CheckpointMeta, ImagesDir, PagesFile};
use crate::kernel::maps;
use crate::kernel::memory::ProcMem;
use crate::kernel::process::TargetId;
use crate::plan::{self, Evidence, GrabRun};
use crate::range_set::RangeSet;
use crate::target::{Frozen, InfectError, Injection, ThreadRegisters, on_tracer_thread};
use crate::tracker::dirty::{PageFlags, PageRun};
use crate::tracker::epoch::{CheckpointId, Epoch};

mod audit;
mod error;
mod layout;
mod pages;
mod parent;
pub mod refuse;
mod request;
mod restless;
mod shared;
mod state;
mod tracking;
mod write;

pub use error::DumpError;
pub use refuse::Refusal;
pub use request::{Afterwards, Kind, PageMode, Request};

use layout::Layout;
use parent::Parent;
use shared::SharedObjects;
use tracking::{Known, Tracking};

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
    target: TargetId,
    checkpoint: CheckpointId,
    images: ImagesDir,
    pages: PagesFile,
    parent: Option<Parent>,
    tracking: Tracking,
    layout: Layout,
    shared: SharedObjects,
    memory: ProcMem,
    injection: Option<Injection>,
    notes: Vec<String>,
}

/// What was taken while the target stood still.
struct Captured {
    target: TargetId,
    checkpoint: CheckpointId,
    images: ImagesDir,
    parent: Option<Parent>,
    tracking: Tracking,
    layout: Layout,
    shared: SharedObjects,
    registers: Vec<ThreadRegisters>,
    known: Known,
    scanned: RangeSet,
    states: Vec<PageRun>,
    epoch: Option<Epoch>,
    audit: Option<Audit>,
    mode: PageMode,
    counters: Counters,
    timings: Timings,
    notes: Vec<String>,
}

impl Prepared {
    fn new(request: &Request) -> Result<Self, DumpError> {
        let target = refuse::process(request)?;
        let mut images = ImagesDir::open(&request.images_dir)?;
        let mut notes = Vec::new();

        let chain = match &request.prev_images_dir {
            Some(prev) => Some(images.open_parent(prev, request.pid)?),
            None => None,
        };
        let tracking = Tracking::find(request.pid, request.tracker)?;
        let layout = Layout::read(request.pid, maps::read(request.pid)?, tracking.tracker())?;

        // The target is touched from here on.
        let mut tracking = tracking.start(request)?;
        let parent = Parent::of(chain, request, &tracking, &mut notes)?;
        let layout = layout.updated(request.pid, tracking.layout(request.pid)?, tracking.tracker())?;
        notes.extend(tracking.notes());
        let shared = match request.kind {
            Kind::Dump => SharedObjects::open(request.pid, &layout, &mut images)?,
            Kind::PreDump => SharedObjects::none(),
        };
        let injection = match request.page_mode {
            PageMode::Read => None,
            PageMode::Splice => Injection::prepare(request.pid)
                .map_err(|refusal| notes.push(format!("taken without a parasite: {refusal}")))
                .ok(),
        };
        Ok(Self {
            target,
            checkpoint: CheckpointId::random().map_err(DumpError::random)?,
            pages: images.create_pages(write::PAGES_ID)?,
            images,
            parent,
            tracking,
            layout,
            shared,
            memory: ProcMem::open(request.pid)?,
            injection,
            notes,
        })
    }

    /// The part that the target stands still for.
    fn capture(mut self, request: &Request) -> Result<Captured, DumpError> {
        let pid = request.pid;
        let began = Instant::now();
        let mut frozen = Frozen::freeze(pid, request.timeout)?;
        let stopped = Instant::now();

        // Look: what has changed?
        let mut known = self.tracking.collect(pid)?;
        if !request.allow_emulated_nonlinear {
            refuse::nonlinear(pid, &self.layout.vmas, &known.nonlinear)?;
        }
        if let Some(vmas) = known.vmas.take() {
            self.layout = self.layout.updated(pid, vmas, self.tracking.tracker())?;
            if request.kind == Kind::Dump {
                self.shared.update(pid, &self.layout, &mut self.images)?;
            }
        }
        let parent = Parent::keep(self.parent, request, &known, &mut self.notes)?;
        let no_pages = RangeSet::new();
        let mut evidence = Evidence {
            areas: &self.layout.areas,
            scanned: &no_pages,
            pages: &[],
            parent: parent.as_ref().map(|p| &p.held),
            changed: &known.changed,
            doubtful: &known.doubtful,
            tracking: known.broken.is_none(),
        };
        let registers: Vec<ThreadRegisters> =
            frozen.threads().iter().map(|&tid| frozen.registers(tid)).collect::<Result<_, _>>()?;
        let restless = restless::pages(&registers);
        let touched =
            known.touched.as_ref().map(|touched| touched.iter().chain(restless.iter()).collect::<RangeSet>());
        let scanned = plan::must_scan(&evidence, touched.as_ref().map(RangeSet::as_slice));
        let mut entries = PageCount::ZERO;
        tracing::trace!(scanned = ?scanned.as_slice());
        let states = self.tracking.source().scan(scanned.as_slice(), &mut entries)?;
        let states = restless::dirtied(states, &restless);
        (evidence.scanned, evidence.pages) = (&scanned, &states);
        let runs = restless::set_apart(plan::to_dump(&evidence)?, &restless);
        tracing::debug!(
            changed = known.changed.pages().get(),
            doubtful = known.doubtful.pages().get(),
            dirty = dirty(&states).pages().get(),
            parent = parent.as_ref().map_or(0, |p| p.held.pages().get()),
            "looked"
        );

        let audit = if request.audit {
            let source = self.tracking.source();
            let parent = parent.as_ref();
            Some(audit::check(pid, &self.layout, &evidence, source, &restless, parent, &self.memory)?)
        } else {
            None
        };

        if self.layout.async_io && parent.is_some() {
            self.notes.push(
                "nothing is inherited: the process has an AIO context or an io_uring, whose writes may land unseen"
                    .to_owned(),
            );
        }

        // Grab.
        let grabbing = Instant::now();
        let mode = grab(&mut frozen, self.injection, &runs, &self.memory, &self.pages, &mut self.notes)?;
        self.shared.grab()?;
        let memdump_us = micros(grabbing);

        // Begin the next epoch, whose parent this checkpoint is.
        let clearing = Instant::now();
        let epoch = if request.track_mem {
            let private = self.layout.private();
            self.tracking.begin_epoch(&self.checkpoint, &private, &dirty(&states), &mut entries)?
        } else {
            self.tracking.keep_epoch()?;
            None
        };
        let clear_us = micros(clearing);

        match request.afterwards {
            Afterwards::Running => frozen.thaw(),
            Afterwards::Stopped => frozen.leave_stopped()?,
            Afterwards::Ended => frozen.kill()?,
        }
        let frozen_us = micros(stopped);

        let counters = Counters {
            pages_scanned: states.iter().map(|run| run.range.pages()).sum(),
            entries_read: entries,
            pages_written: runs.iter().map(|run| run.range.pages()).sum(),
            losses: known.losses,
            chunks_touched: known.touched.as_ref().map(|t| t.iter().map(|r| r.chunks().count() as u64).sum()),
            ..Counters::default()
        };
        let freezing_us = stopped.duration_since(began).as_micros() as u64;
        Ok(Captured {
            target: self.target,
            checkpoint: self.checkpoint,
            images: self.images,
            parent,
            tracking: self.tracking,
            layout: self.layout,
            shared: self.shared,
            registers,
            known,
            scanned,
            states,
            epoch,
            audit,
            mode,
            counters,
            timings: Timings { freezing_us, frozen_us, memdump_us, memwrite_us: 0, clear_us },
            notes: self.notes,
        })
    }
}

/// Takes the pages, by a parasite if one can be had; says which way it was.
fn grab(
    frozen: &mut Frozen,
    injection: Option<Injection>,
    runs: &[GrabRun],
    memory: &ProcMem,
    file: &PagesFile,
    notes: &mut Vec<String>,
) -> Result<PageMode, DumpError> {
    let places = pages::place(runs);
    let Some(injection) = injection.filter(|_| runs.iter().any(|run| run.readable)) else {
        pages::copy(&places, memory, file)?;
        return Ok(PageMode::Read);
    };
    match frozen.infect(injection) {
        Ok(mut parasite) => {
            let (readable, rest): (Vec<_>, Vec<_>) = places.into_iter().partition(|place| place.readable);
            pages::splice(&readable, &mut parasite, file)?;
            parasite.cure()?;
            // After the cure: nothing of the target runs any more.
            pages::copy(&rest, memory, file)?;
            Ok(PageMode::Splice)
        }
        Err(error @ (InfectError::Refused(_) | InfectError::LayoutChanged | InfectError::Attach(_))) => {
            notes.push(format!("taken without a parasite: {error}"));
            pages::copy(&places, memory, file)?;
            Ok(PageMode::Read)
        }
        Err(error) => Err(error.into()),
    }
}

/// The pages that were dirty at the scan.
fn dirty(states: &[PageRun]) -> RangeSet {
    states.iter().filter(|run| run.flags.contains(PageFlags::DIRTY)).map(|run| run.range).collect()
}

fn micros(since: Instant) -> u64 {
    since.elapsed().as_micros() as u64
}
