//! The eBPF agent: hooks that say where to look. A hint says where, never what; the kernel is asked for the rest.

mod bitmap;
mod by_lock;
mod capture;
mod error;
mod events;
mod hooks;
mod load;
mod losses;
mod pins;
mod sabotage;
mod selftest;
mod sys;
mod table;
#[cfg(test)]
mod tests;
mod writers;

use std::os::fd::AsRawFd;
use std::sync::atomic::Ordering;
use std::time::Duration;

use aya::Ebpf;
use aya::maps::{HashMap, MapData, PerCpuArray, RingBuf};
use memckpt_ebpf::{RING_BYTES, Record, counter, loss};
use serde::{Deserialize, Serialize};

use crate::addr::{AddrRange, Chunk};
use crate::kernel::SyscallError;
use crate::kernel::features;
use bitmap::{Bitmaps, ControlPage};
use capture::capture;
use load::{Attached, Capture, Types};
use pins::PinnedFlag;
use writers::Writers;

pub use bitmap::Buffer;
pub use by_lock::Remap;
pub use error::AgentError;
pub use events::{EVERYTHING, EventKind, LayoutEvent};
pub use hooks::{Fact, HintMode, HookChoice, HookReport, HookState, Refusal};
pub use losses::{Counters, Losses};
pub use sabotage::{Sabotage, Without};

/// A program that neither finishes nor runs for this long is starved; the epoch is then lost.
const FLIP_LIMIT: Duration = Duration::from_secs(1);

/// How to attach.
#[derive(Clone, Copy, Debug)]
pub struct AgentOptions {
    /// Which hooks.
    pub choice: HookChoice,
    /// Size of the event ring in bytes: a power of two, at least a page.
    pub ring_bytes: u32,
    /// That pages were dropped (madvise) shows whenever they are read, without events: it does with userfaultfd
    /// write-protection.
    pub dropped_pages_show: bool,
    /// For tests: what goes without its hooks, so that the table lies. See [`Sabotage`].
    pub without: Option<Without>,
}

impl Default for AgentOptions {
    fn default() -> Self {
        Self { choice: HookChoice::Auto, ring_bytes: RING_BYTES, dropped_pages_show: false, without: None }
    }
}

/// Hooks attached to the address space of one process. Dropping it detaches them.
///
/// Minimum kernel: 6.1 tested; needs BTF, tp_btf (5.5), mmapable arrays (5.5), the ring buffer (5.8).
pub struct Agent {
    pid: i32,
    ebpf: Ebpf,
    capture: Capture,
    control: ControlPage,
    bitmaps: Bitmaps,
    ring: RingBuf<MapData>,
    counters: PerCpuArray<MapData, u64>,
    attached: Attached,
    report: HookReport,
    writers: Writers,
    mm: u64,
    /// The thread group of this process in the initial PID namespace, or 0.
    own_tgid: u64,
    pinned: Option<PinnedFlag>,
    /// What the self-test and the attaching counted.
    base: (Losses, Counters),
    /// Misses can no longer be read, or a flip timed out: everything is lost from then on.
    blind: u64,
}

impl std::fmt::Debug for Agent {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Agent").field("pid", &self.pid).field("report", &self.report).finish_non_exhaustive()
    }
}

/// What one family of hooks can do here.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FamilyProbe {
    /// The family.
    pub choice: HookChoice,
    /// What attached and passed the self-test, or why faults cannot be hooked this way.
    pub outcome: Result<HookReport, String>,
}

impl Agent {
    /// Attaches to the address space of `pid`.
    ///
    /// The target is not touched: one entry of its pagemap is read, which takes its mmap lock, and a probe on the lock
    /// tells the mm. So it works for a process that sleeps forever. Faults and events from before the return
    /// of this function are not recorded.
    ///
    /// # Errors
    /// [`AgentError`]. Hooks that do not attach are no error but show in [`Agent::hooks`], unless a family was
    /// asked for by name.
    pub fn attach(pid: i32, choice: HookChoice) -> Result<Self, AgentError> {
        Self::attach_with(pid, AgentOptions { choice, ..AgentOptions::default() })
    }

    /// As [`Agent::attach`], with all options.
    ///
    /// # Errors
    /// As [`Agent::attach`].
    pub fn attach_with(pid: i32, options: AgentOptions) -> Result<Self, AgentError> {
        let agent = Self::attach_by(pid, options, true)?;
        if agent.report.layout_by_lock() && !agent.report.knows(Fact::LayoutCalls) {
            tracing::warn!(withdrawn = ?agent.report.withdrawn, "layout calls do not show at the mmap lock");
            drop(agent);
            return Self::attach_by(pid, options, false);
        }
        Ok(agent)
    }

    /// `by_lock`: layout calls may be told at the mmap lock, where the kernel can.
    fn attach_by(pid: i32, options: AgentOptions, by_lock: bool) -> Result<Self, AgentError> {
        let types = Types::read()?;
        let mut ebpf = load::load(&types, options.ring_bytes)?;
        let control = ControlPage::map(load::map_fd(&ebpf, "CONTROL")?)?;
        let bitmaps = Bitmaps::map(load::map_fd(&ebpf, "TOUCHED")?, load::map_fd(&ebpf, "SUMMARY")?)?;
        let ring = ebpf.take_map("EVENTS").ok_or(AgentError::Object("EVENTS"))?;
        let mut ring = RingBuf::try_from(ring).map_err(|_| AgentError::Object("EVENTS"))?;
        let counters = ebpf.take_map("COUNTERS").ok_or(AgentError::Object("COUNTERS"))?;
        let counters = PerCpuArray::try_from(counters).map_err(|_| AgentError::Object("COUNTERS"))?;

        let writers_fd = load::map_fd(&ebpf, "WRITERS")?
            .try_clone_to_owned()
            .map_err(|e| SyscallError::new("dup", "BPF map WRITERS", e))?;
        let writers = ebpf.take_map("WRITERS").ok_or(AgentError::Object("WRITERS"))?;
        let writers = HashMap::try_from(writers).map_err(|_| AgentError::Object("WRITERS"))?;
        let (mut report, attached) = load::attach_all(&mut ebpf, &types, &options, by_lock);
        let writers = Writers::new(writers, writers_fd, report.knows(Fact::ForeignClears))?;
        control.calls_by_lock().store(u64::from(report.layout_by_lock()), Ordering::SeqCst);
        if options.choice != HookChoice::Auto && report.family() != Some(options.choice) {
            let refusal = report.hooks.iter().find_map(|h| h.refused.first());
            return Err(AgentError::Choice {
                choice: options.choice,
                hook: refusal.map_or_else(String::new, |r| r.hook.clone()),
                reason: refusal.map_or_else(|| "nothing attached".into(), |r| r.reason.clone()),
            });
        }
        // A program that may be the one left out is not relied on.
        let always = report.knows(Fact::ForeignClears) && options.without.is_none();
        let how = Capture::prepare(&mut ebpf, &types, always)?;
        drop(types);
        let capturing = how.attach(&mut ebpf)?;
        let target = capture(&control, pid)?;
        let own = capture(&control, std::process::id() as i32)?;
        let claimed = options.without.map(|_| report.clone());
        selftest::run(&control, &bitmaps, &mut ring, own.mm, &mut report)?;
        if let Some(claimed) = claimed {
            // It would have found out most of them.
            report = claimed;
        }
        // Otherwise everything is read anyway.
        let pinned = (report.hint_mode() == HintMode::Complete).then(|| PinnedFlag::find(&control)).flatten();

        let mut agent = Self {
            pid,
            ebpf,
            capture: how,
            control,
            bitmaps,
            ring,
            counters,
            attached,
            report,
            writers,
            mm: target.mm,
            own_tgid: own.tgid,
            pinned,
            base: Default::default(),
            blind: 0,
        };
        // What the self-test left behind: nothing of it is the target's.
        agent.flip();
        agent.clear_previous();
        agent.flip();
        agent.clear_previous();
        while agent.ring.next().is_some() {}
        agent.base = (agent.losses(), agent.counters());
        agent.control.last_brk().store(target.brk, Ordering::SeqCst);
        agent.control.target_tgid().store(target.tgid, Ordering::SeqCst);
        agent.control.gone().store(0, Ordering::SeqCst);
        agent.control.lock_owner().store(0, Ordering::SeqCst);
        agent.control.target_mm().store(target.mm, Ordering::SeqCst);
        if target.tgid == 0 {
            agent.report.withdraw(Fact::Exec, "mm_struct has no owner (CONFIG_MEMCG)");
        }
        let again = capture(&agent.control, pid)?;
        drop(capturing);
        if again.mm != target.mm || agent.ended() {
            return Err(AgentError::Capture {
                hook: "pagemap".into(),
                reason: format!("process {pid} executed another program just now"),
            });
        }
        Ok(agent)
    }

    /// Tries every hook of every family on this process, attached one after the other: for `memckpt check`.
    ///
    /// # Errors
    /// As [`Agent::attach`]; a family that does not work is no error.
    pub fn probe() -> Result<Vec<FamilyProbe>, AgentError> {
        let pid = std::process::id() as i32;
        // Parsed once for all of them.
        let _types = Types::read()?;
        let families = [HookChoice::Fentry, HookChoice::Kprobe, HookChoice::Tracepoint];
        // As a session would, whose dirty source is write-protection where there is no soft-dirty.
        let dropped_pages_show = features::soft_dirty().is_err();
        let options = |choice| AgentOptions { choice, dropped_pages_show, ..AgentOptions::default() };
        families
            .into_iter()
            .map(|choice| match Self::attach_with(pid, options(choice)) {
                Ok(agent) => Ok(FamilyProbe { choice, outcome: Ok(agent.report.clone()) }),
                Err(error @ AgentError::Choice { .. }) => {
                    Ok(FamilyProbe { choice, outcome: Err(error.to_string()) })
                }
                Err(error) => Err(error),
            })
            .collect()
    }

    /// The process.
    #[must_use]
    pub const fn pid(&self) -> i32 {
        self.pid
    }

    /// Which hooks are attached and what they tell.
    #[must_use]
    pub const fn hooks(&self) -> &HookReport {
        &self.report
    }

    /// The VMA generation. It moves *before* a change is complete: trust it with all threads stopped, or unchanged
    /// before and after reading the layout with no writer pending.
    #[must_use]
    pub fn generation(&self) -> u64 {
        self.control.generation().load(Ordering::SeqCst)
    }

    /// Whether the address space that the agent watches has ended: exit, or exec. Nothing is recorded after that.
    #[must_use]
    pub fn ended(&self) -> bool {
        self.control.gone().load(Ordering::SeqCst) != 0
    }

    /// Asks the kernel whether the process still runs in the address space that is watched. Microseconds; where there
    /// are no per-VMA locks (before 6.4) it attaches a program for it: tens of milliseconds, not for a freeze.
    ///
    /// # Errors
    /// The process is gone, or the capture fails.
    pub fn still_attached(&mut self) -> Result<bool, AgentError> {
        let _capturing = self.capture.attach(&mut self.ebpf)?;
        let now = capture(&self.control, self.pid)?;
        Ok(now.mm == self.mm && !self.ended())
    }

    /// Whether a page of the target may be pinned, or have been at any time before: true where that cannot be told.
    /// Microseconds.
    ///
    /// # Errors
    /// The process is gone, or the capture fails.
    pub fn may_be_pinned(&self) -> Result<bool, AgentError> {
        match (self.pinned, &self.capture) {
            (Some(flag), Capture::Always) => {
                let now = capture(&self.control, self.pid)?;
                Ok(now.mm != self.mm || flag.is_set(&now))
            }
            // Attaching a program for it would take longer than what it could spare.
            _ => Ok(true),
        }
    }

    /// What may have been missed since the attach.
    #[must_use]
    pub fn losses(&self) -> Losses {
        let (misses, unreadable) = match self.attached.misses() {
            Ok(misses) => (misses, 0),
            // Known since the attach where it is so by nature; a new failure is a loss.
            Err(_) => ((0, 0), u64::from(self.report.knows(Fact::MissesCounted))),
        };
        let now = Losses {
            ring: self.control.loss(loss::RING_FULL),
            high_addr: self.control.loss(loss::HIGH_ADDRESS),
            flip: self.control.loss(loss::FLIP) + self.blind + unreadable,
            map_full: self.control.loss(loss::CALLS_FULL) + self.control.loss(loss::WRITERS_FULL),
            collapse: self.control.loss(loss::COLLAPSE),
            recursion: misses.0,
            nmissed: misses.1,
        };
        now.since(&self.base.0)
    }

    /// What was seen since the attach.
    #[must_use]
    pub fn counters(&self) -> Counters {
        let sum = |index| self.counters.get(&index, 0).map_or(0, |values| values.iter().sum::<u64>());
        let base = &self.base.1;
        Counters {
            faults: sum(counter::FAULTS).saturating_sub(base.faults),
            zaps: sum(counter::ZAPS).saturating_sub(base.zaps),
            events: sum(counter::EVENTS).saturating_sub(base.events),
        }
    }

    /// Whether `event` is a call of this very process. Always true where the kernel does not tell.
    #[must_use]
    pub fn is_own(&self, event: &LayoutEvent) -> bool {
        self.own_tgid == 0 || u64::from(event.tgid) == self.own_tgid
    }

    /// Ranges that system calls of others, begun before this call, may still be writing. Microseconds for each such call.
    ///
    /// Whatever begins later has an event that [`Agent::drain`] did not bring before.
    pub fn being_written(&mut self) -> Vec<AddrRange> {
        let lost = self.control.loss(loss::WRITERS_FULL) != 0;
        self.writers.ranges(&self.control, lost)
    }

    /// Appends the layout events since the last call. What an event tells of can be read when it arrives.
    pub fn drain(&mut self, events: &mut Vec<LayoutEvent>) {
        while let Some(item) = self.ring.next() {
            events.push(match read_record(&item) {
                Some(record) => LayoutEvent::from_record(&record),
                None => LayoutEvent::from_record(&Record::default()),
            });
        }
    }

    /// A descriptor that is readable while events wait, for poll(2).
    #[must_use]
    pub fn events_fd(&self) -> std::os::fd::RawFd {
        self.ring.as_raw_fd()
    }

    /// Starts a new fault buffer and waits until no program writes the old one, which is [`Buffer::Previous`] then.
    ///
    /// It waits for programs that are setting a bit at this moment, which takes nanoseconds, and not for an RCU grace
    /// period. A bit that was left in the new buffer stays: [`Agent::clear_previous`] before the next flip.
    pub fn flip(&mut self) {
        if !self.control.flip(FLIP_LIMIT) {
            tracing::warn!("a BPF program was not scheduled for {FLIP_LIMIT:?}: the epoch's hints are lost");
            self.blind += 1;
        }
    }

    fn index(&self, buffer: Buffer) -> u32 {
        let active = (self.control.active().load(Ordering::SeqCst) & 1) as u32;
        match buffer {
            Buffer::Current => active,
            Buffer::Previous => active ^ 1,
        }
    }

    /// The chunks touched, in order.
    #[must_use]
    pub fn touched(&self, buffer: Buffer) -> Vec<Chunk> {
        self.bitmaps.touched(self.index(buffer))
    }

    /// How many chunks were touched.
    #[must_use]
    pub fn touched_count(&self, buffer: Buffer) -> u64 {
        self.bitmaps.count(self.index(buffer))
    }

    /// Marks `chunks` as touched in the current buffer.
    pub fn carry(&self, chunks: impl IntoIterator<Item = Chunk>) {
        let buffer = self.index(Buffer::Current);
        for chunk in chunks {
            self.bitmaps.set(buffer, chunk);
        }
    }

    /// Forgets the previous buffer.
    pub fn clear_previous(&mut self) {
        self.bitmaps.clear(self.index(Buffer::Previous));
    }
}

fn read_record(bytes: &[u8]) -> Option<Record> {
    if bytes.len() < size_of::<Record>() {
        return None;
    }
    // SAFETY: long enough; a Record is plain integers, valid for any bits; read_unaligned needs no alignment.
    Some(unsafe { bytes.as_ptr().cast::<Record>().read_unaligned() })
}
