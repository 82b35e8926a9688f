//! One process of the tree: what is prepared of it, what is seen and taken while it stands still.

use std::time::Duration;

use crate::addr::PageCount;
use crate::image::meta::{AsyncIo, Counters, MetaProcess, MetaSpace, MetaTarget};
use crate::image::{Audit, Chain, ImagesDir, PagesFile};
use crate::kernel::maps::Vma;
use crate::kernel::memory::ProcMem;
use crate::kernel::process::TargetId;
use crate::plan::{self, Evidence, GrabRun, PlanError, PlannedRun};
use crate::range_set::RangeSet;
use crate::target::{Frozen, InfectError, Infected, Injection, ThreadRegisters};
use crate::tracker::dirty::{PageFlags, PageRun};
use crate::tracker::epoch::{CheckpointId, Epoch};
use crate::tracker::model::Relayout;

use super::error::DumpError;
use super::files::Task;
use super::layout::Layout;
use super::parent::Parent;
use super::request::{Kind, PageMode, Request};
use super::shared::SharedObjects;
use super::task::{Filters, Injections, State};
use super::tracking::{Known, Tracking};
use super::{audit, pages, refuse, restless};

/// A process that can be checkpointed, and all of it that needs no freeze.
pub(super) struct PreparedProcess {
    pub(super) target: TargetId,
    pages_id: u32,
    pages: PagesFile,
    parent: Option<Parent>,
    tracking: Tracking,
    pub(super) layout: Layout,
    memory: ProcMem,
    injection: Option<Injection>,
    injections: Injections,
}

/// A process and what was taken of it while it stood still.
pub(super) struct CapturedProcess {
    pub(super) target: TargetId,
    pub(super) pages_id: u32,
    pub(super) pages: PagesFile,
    pub(super) parent: Option<Parent>,
    pub(super) tracking: Tracking,
    pub(super) layout: Layout,
    memory: ProcMem,
    injection: Option<Injection>,
    injections: Injections,
    /// Beyond memory; `None` in a pre-dump.
    pub(super) state: Option<State>,
    pub(super) registers: Vec<ThreadRegisters>,
    pub(super) known: Known,
    pub(super) async_io: AsyncIo,
    scanned: RangeSet,
    states: Vec<PageRun>,
    runs: Vec<GrabRun>,
    pub(super) audit: Option<Audit>,
    pub(super) epoch: Option<Epoch>,
    pub(super) mode: PageMode,
    pub(super) counters: Counters,
}

impl PreparedProcess {
    /// For the look at its open files.
    pub(super) fn task(&self) -> Task<'_> {
        Task { pid: self.target.pid, layout: &self.layout }
    }

    /// The process `target`, whose pages go to `pages-PAGES_ID.img`. It is touched from here on, as it may have to be
    /// tracked. `chain`: its memory in the parent checkpoint.
    pub(super) fn new(
        (target, memory): (TargetId, ProcMem),
        chain: Option<Chain>,
        (tracking, layout): (Tracking, Layout),
        images: &mut ImagesDir,
        request: &Request,
        notes: &mut Vec<String>,
    ) -> Result<Self, DumpError> {
        let pid = target.pid;
        let mut tracking =
            if is_worth_tracking(target, request) { tracking.start(pid, request)? } else { tracking };
        let parent = Parent::of(chain, request, &tracking, notes)?;
        let layout = layout.updated(pid, Relayout::whole(tracking.layout(pid)?), tracking.tracker())?;
        notes.extend(tracking.notes());
        let prepared = match request.page_mode {
            PageMode::Read => Err("memory is to be read from outside".to_owned()),
            PageMode::Splice => Injection::prepare(pid).map_err(|refusal| {
                notes.push(format!("taken without a parasite: {refusal}"));
                refusal.to_string()
            }),
        };
        refuse::irrecoverable(pid, prepared.as_ref().err().map(String::as_str), &layout, request)?;
        let injection = prepared.ok();
        let injections = match (&injection, request.kind) {
            (Some(first), Kind::Dump) => {
                // One a thread, and one more to repair connections.
                let more = usize::from(request.files.tcp_established);
                Injections::prepare(first, crate::kernel::process::threads(pid)?.len() + more)?
            }
            _ => Injections::default(),
        };
        let (pages_id, pages) = images.create_pages()?;
        Ok(Self { target, pages_id, pages, parent, tracking, layout, memory, injection, injections })
    }

    /// Whether the process is still in the address space that was prepared for: not so after an exec.
    pub(super) fn is_up_to_date(&self) -> bool {
        self.target.still_alive()
            && !self.layout.vmas.first().is_some_and(|vma| self.memory.is_gone(vma.range.start))
    }

    /// All threads stand still: what has changed, and so what must be taken?
    pub(super) fn look(
        mut self,
        frozen: &Frozen,
        request: &Request,
        shared: &mut SharedObjects,
        images: &mut ImagesDir,
        notes: &mut Vec<String>,
    ) -> Result<CapturedProcess, DumpError> {
        let pid = self.target.pid;
        let mut known = self.tracking.collect(pid)?;
        if !request.allow_emulated_nonlinear {
            refuse::nonlinear(pid, &self.layout.vmas, &known.nonlinear)?;
        }
        if let Some(relayout) = known.relayout.take() {
            self.layout = self.layout.updated(pid, relayout, self.tracking.tracker())?;
            if request.kind == Kind::Dump {
                shared.update(pid, &self.layout, images)?;
            }
        }
        refuse::irrecoverable(pid, None, &self.layout, request)?;
        let parent = Parent::keep(self.parent, request, &known, notes)?;
        let before = parent.as_ref().map_or(AsyncIo::None, |p| p.async_io);
        let made = known.made_io_uring || frozen.has_io_workers();
        let async_io = self.layout.look_for_async_io(pid, made, before);
        if parent.is_some() {
            notes.extend(distrust(async_io, before));
            notes.extend(unexplained(&known.changed, &self.layout.vmas));
        }
        let registers: Vec<ThreadRegisters> =
            frozen.threads().iter().map(|&tid| frozen.registers(tid)).collect::<Result<_, _>>()?;
        let restless = restless::pages(&registers);
        let mut process = CapturedProcess {
            target: self.target,
            pages_id: self.pages_id,
            pages: self.pages,
            parent,
            tracking: self.tracking,
            layout: self.layout,
            memory: self.memory,
            injection: self.injection,
            injections: self.injections,
            state: None,
            registers,
            known,
            async_io,
            scanned: RangeSet::new(),
            states: Vec::new(),
            runs: Vec::new(),
            audit: None,
            epoch: None,
            mode: PageMode::Read,
            counters: Counters::default(),
        };
        process.scan(&restless)?;
        if request.audit {
            process.prove(&restless)?;
        }
        Ok(process)
    }
}

impl CapturedProcess {
    /// For the look at its open files.
    pub(super) fn task(&self) -> Task<'_> {
        Task { pid: self.target.pid, layout: &self.layout }
    }

    fn scan(&mut self, restless: &RangeSet) -> Result<(), DumpError> {
        let touched = self.known.touched.as_ref();
        let touched = touched.map(|t| t.iter().chain(restless.iter()).collect::<RangeSet>());
        self.scanned = plan::must_scan(&self.evidence(), touched.as_ref().map(RangeSet::as_slice));
        tracing::trace!(scanned = ?self.scanned.as_slice());
        let mut entries = PageCount::ZERO;
        let states = self.tracking.source().scan(self.scanned.as_slice(), &mut entries)?;
        self.states = restless::dirtied(states, restless);
        self.runs = restless::set_apart(plan::to_dump(&self.evidence())?, restless);
        tracing::debug!(
            pid = self.target.pid,
            changed = self.known.changed.pages().get(),
            doubtful = self.known.doubtful.pages().get(),
            dirty = self.dirty().pages().get(),
            parent = self.parent.as_ref().map_or(0, |p| p.held.pages().get()),
            "looked"
        );
        let chunks = |touched: &RangeSet| touched.iter().map(|r| r.chunks().count() as u64).sum();
        self.counters = Counters {
            pages_scanned: self.states.iter().map(|run| run.range.pages()).sum(),
            entries_read: entries,
            pages_written: self.runs.iter().map(|run| run.range.pages()).sum(),
            losses: self.known.losses,
            chunks_touched: self.known.touched.as_ref().map(chunks),
            ..Counters::default()
        };
        Ok(())
    }

    fn prove(&mut self, restless: &RangeSet) -> Result<(), DumpError> {
        let Self { layout, scanned, states, parent, known, .. } = self;
        let evidence = evidence(layout, scanned, states, parent.as_ref(), known);
        let source = self.tracking.source();
        let pid = self.target.pid;
        self.audit =
            Some(audit::check(pid, layout, &evidence, source, restless, parent.as_ref(), &self.memory)?);
        Ok(())
    }

    fn evidence(&self) -> Evidence<'_> {
        evidence(&self.layout, &self.scanned, &self.states, self.parent.as_ref(), &self.known)
    }

    /// The pages that were dirty at the scan.
    fn dirty(&self) -> RangeSet {
        let dirty = self.states.iter().filter(|run| run.flags.contains(PageFlags::DIRTY));
        dirty.map(|run| run.range).collect()
    }

    /// Takes the state beyond memory of a process below `ppid`: all of it if a parasite can be had.
    pub(super) fn ask(
        &mut self,
        frozen: &mut Frozen,
        ppid: i32,
        filters: &mut Filters,
        request: &Request,
        notes: &mut Vec<String>,
    ) -> Result<(), DumpError> {
        let injections = self.injection.is_some().then_some(&mut self.injections);
        self.state = Some(State::take(frozen, ppid, injections, &self.registers, filters, request, notes)?);
        Ok(())
    }

    /// A parasite for what only the process itself can do, if it can have one.
    pub(super) fn infect<'f>(&mut self, frozen: &'f mut Frozen) -> Result<Option<Infected<'f>>, DumpError> {
        if self.injection.is_none() {
            return Ok(None);
        }
        match frozen.infect(self.injections.take(self.target.pid)?) {
            Ok(parasite) => Ok(Some(parasite)),
            Err(InfectError::Refused(_) | InfectError::LayoutChanged | InfectError::Attach(_)) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    /// Takes the pages, by a parasite if one can be had.
    pub(super) fn grab(&mut self, frozen: &mut Frozen, notes: &mut Vec<String>) -> Result<(), DumpError> {
        let places = pages::place(&self.runs);
        let any = self.runs.iter().any(|run| run.readable);
        let Some(injection) = self.injection.take().filter(|_| any) else {
            return pages::copy(&places, &self.memory, &self.pages);
        };
        match frozen.infect(injection) {
            Ok(mut parasite) => {
                let (readable, rest): (Vec<_>, Vec<_>) = places.into_iter().partition(|place| place.readable);
                pages::splice(&readable, &mut parasite, &self.pages)?;
                parasite.cure()?;
                // After the cure: nothing of the target runs any more.
                pages::copy(&rest, &self.memory, &self.pages)?;
                self.mode = PageMode::Splice;
                Ok(())
            }
            Err(error @ (InfectError::Refused(_) | InfectError::LayoutChanged | InfectError::Attach(_))) => {
                notes.push(format!("taken without a parasite: {error}"));
                pages::copy(&places, &self.memory, &self.pages)
            }
            Err(error) => Err(error.into()),
        }
    }

    /// The pages are taken, of all processes: begins the next epoch, whose parent is `checkpoint`, or goes on with this one.
    pub(super) fn end_of_epoch(
        &mut self,
        checkpoint: &CheckpointId,
        request: &Request,
    ) -> Result<(), DumpError> {
        if !request.track_mem {
            return self.tracking.keep_epoch();
        }
        let (private, dirty) = (self.layout.private(), self.dirty());
        let entries = &mut self.counters.entries_read;
        self.epoch = self.tracking.begin_epoch(checkpoint, &private, &dirty, entries)?;
        Ok(())
    }

    /// Every page of the checkpoint, own or inherited.
    pub(super) fn compose(&self) -> Result<Vec<PlannedRun>, PlanError> {
        plan::compose(&self.evidence())
    }

    /// Its guard regions.
    pub(super) fn guards(&self) -> RangeSet {
        let none = RangeSet::new();
        plan::guards(&self.evidence(), self.parent.as_ref().map_or(&none, |parent| &parent.guards))
    }

    /// What the next checkpoint must know.
    pub(super) fn meta(&self) -> MetaProcess {
        MetaProcess {
            target: MetaTarget { pid: self.target.pid, start_time: self.target.start_time },
            session: self.tracking.info().map(|i| i.session.clone()),
            epoch: self.epoch,
            async_io: self.async_io,
            space: MetaSpace {
                guards: self.guards().iter().collect(),
                locked_on_fault: self.layout.locked_on_fault().iter().collect(),
            },
        }
    }
}

/// Whether a session should be started: many a descendant lives shorter than that takes, and is taken whole.
fn is_worth_tracking(target: TargetId, request: &Request) -> bool {
    const YOUNG: Duration = Duration::from_secs(1);
    target.pid == request.pid || target.age().is_none_or(|age| age > YOUNG)
}

/// What is known, for a decision.
fn evidence<'a>(
    layout: &'a Layout,
    scanned: &'a RangeSet,
    states: &'a [PageRun],
    parent: Option<&'a Parent>,
    known: &'a Known,
) -> Evidence<'a> {
    Evidence {
        areas: &layout.areas,
        scanned,
        pages: states,
        parent: parent.map(|p| &p.held),
        changed: &known.changed,
        doubtful: &known.doubtful,
        tracking: known.broken.is_none(),
    }
}

/// Why asynchronous I/O, `now` or `before`, leaves nothing to inherit.
fn distrust(now: AsyncIo, before: AsyncIo) -> Option<String> {
    let has = match (now, before) {
        (AsyncIo::None, AsyncIo::None) => return None,
        (AsyncIo::Present, _) => "has",
        _ => "had, not long ago,",
    };
    Some(format!(
        "nothing is inherited: the process {has} an AIO context or an io_uring, whose writes may land unseen"
    ))
}

/// Whether the session takes all that is mapped for changed.
fn unexplained(changed: &RangeSet, vmas: &[Vma]) -> Option<String> {
    vmas.iter().all(|vma| changed.outside(vma.range).is_empty()).then(|| {
        "nothing is inherited: the address space may have changed without a call that explains it (a uprobe is one way)"
            .to_owned()
    })
}
