//! The record against an agent that does as told.

use std::cell::RefCell;
use std::convert::Infallible;
use std::rc::Rc;

use super::info::Touched;
use super::record::{Ending, EventSource, Notice, Observed, Record, RecordError};
use crate::addr::{AddrRange, Chunk};
use crate::kernel::maps::{Prot, Vma};
use crate::tracker::agent::{HintMode, Losses};
use crate::tracker::epoch::{Broken, CheckpointId, Epoch};
use crate::tracker::model::{Change, EVERYTHING, Explains, LayoutSource};

#[derive(Default)]
struct Fake {
    generation: u64,
    losses: Losses,
    waiting: Vec<Observed>,
    current: Vec<Chunk>,
    previous: Vec<Chunk>,
    vmas: Vec<Vma>,
    being_written: Vec<AddrRange>,
    incomplete: bool,
}

/// One fake world, seen as agent and as kernel.
#[derive(Clone, Default)]
struct World(Rc<RefCell<Fake>>);

impl World {
    fn event(&self, change: Change) {
        let mut world = self.0.borrow_mut();
        world.generation += 1;
        let explains = Explains::Lock(world.generation);
        world.waiting.push(Observed::Layout { change, explains });
    }

    fn touch(&self, chunk: u32) {
        self.0.borrow_mut().current.push(Chunk(chunk));
    }

    fn map(&self, start: u64, end: u64) {
        let vma = Vma {
            range: AddrRange::new(start, end),
            prot: Prot::READ,
            shared: false,
            offset: 0,
            dev: (0, 0),
            inode: 0,
            name: String::new(),
        };
        self.0.borrow_mut().vmas.push(vma);
        self.event(Change::Replaced(AddrRange::new(start, end)));
    }
}

impl EventSource for World {
    fn generation(&self) -> u64 {
        self.0.borrow().generation
    }

    fn losses(&self) -> Losses {
        self.0.borrow().losses
    }

    fn drain(&mut self, events: &mut Vec<Observed>) {
        events.append(&mut self.0.borrow_mut().waiting);
    }

    fn being_written(&mut self) -> Vec<AddrRange> {
        self.0.borrow().being_written.clone()
    }

    fn hint_mode(&self) -> HintMode {
        if self.0.borrow().incomplete { HintMode::None } else { HintMode::Complete }
    }

    fn flip(&mut self) {
        let mut world = self.0.borrow_mut();
        world.previous = std::mem::take(&mut world.current);
    }

    fn previous(&self) -> Vec<Chunk> {
        self.0.borrow().previous.clone()
    }

    fn current(&self) -> Vec<Chunk> {
        self.0.borrow().current.clone()
    }

    fn carry(&mut self, chunks: &[Chunk]) {
        let mut world = self.0.borrow_mut();
        world.current.extend_from_slice(chunks);
        world.current.sort_unstable();
        world.current.dedup();
    }

    fn clear_previous(&mut self) {
        self.0.borrow_mut().previous.clear();
    }
}

impl LayoutSource for World {
    type Error = Infallible;

    fn query(&mut self, range: AddrRange) -> Result<Vec<Vma>, Infallible> {
        Ok(self.0.borrow().vmas.iter().filter(|v| v.range.overlaps(range)).cloned().collect())
    }

    fn read_all(&mut self) -> Result<Vec<Vma>, Infallible> {
        Ok(self.0.borrow().vmas.clone())
    }
}

const US: u64 = 1;

fn begun() -> (World, Record<World, World>) {
    let world = World::default();
    world.map(0x20_0000, 0x60_0000);
    let mut record = Record::new(Some(world.clone()), world.clone(), true, None);
    let _ = record.update(true, &mut Vec::new());
    record.begin(true, &mut Vec::new());
    (world, record)
}

fn id() -> CheckpointId {
    CheckpointId::random().unwrap_or_else(|e| panic!("getrandom: {e}"))
}

fn collect(record: &mut Record<World, World>, generation: u64) -> super::info::Collected {
    record.collect(US, generation, &mut Vec::new()).unwrap_or_else(|e| panic!("{e}"))
}

fn commit(record: &mut Record<World, World>, carry: &[AddrRange]) -> (CheckpointId, Epoch) {
    let id = id();
    let epoch = record.commit(US, id.clone(), carry, &mut Vec::new()).unwrap_or_else(|e| panic!("{e}"));
    (id, epoch)
}

fn chunk(n: u32) -> AddrRange {
    Chunk(n).range()
}

#[test]
fn a_quiet_checkpoint_says_what_was_touched_and_that_the_layout_stands() {
    let (world, mut record) = begun();
    world.touch(1);
    world.touch(2);
    let generation = record.model().revision();
    let got = collect(&mut record, generation);
    assert_eq!(got.relayout, None);
    assert_eq!(got.touched, Touched::Chunks(vec![AddrRange::new(0x20_0000, 0x60_0000)]));
    assert!(got.changed.is_empty() && got.broken.is_none());
    let (id, epoch) = commit(&mut record, &[chunk(2)]);
    assert_eq!((epoch, record.epoch().checkpoint()), (Epoch(2), Some(&id)));
    world.touch(7);
    let got = collect(&mut record, generation);
    assert_eq!(got.touched, Touched::Chunks(vec![chunk(2), chunk(7)]), "the carried chunk is touched again");
}

#[test]
fn what_is_mapped_in_an_epoch_is_changed_in_it_and_not_in_the_next() {
    let (world, mut record) = begun();
    let (generation, vmas) = record.give_layout();
    let vmas = vmas.to_vec();
    world.map(0x80_0000, 0x80_2000);
    let got = collect(&mut record, generation);
    assert_eq!(got.relayout.map(|relayout| relayout.apply(&vmas).len()), Some(2));
    assert_eq!(got.changed.as_slice(), [AddrRange::new(0x80_0000, 0x80_2000)]);
    commit(&mut record, &[]);
    assert!(collect(&mut record, got.generation).changed.is_empty());
}

#[test]
fn an_abort_gives_the_touches_back_and_the_epoch_goes_on() {
    let (world, mut record) = begun();
    world.touch(1);
    collect(&mut record, 0);
    world.touch(9);
    assert!(record.abort(US, Ending::Untouched, &mut Vec::new()).is_ok());
    let got = collect(&mut record, 0);
    assert_eq!(got.touched, Touched::Chunks(vec![chunk(1), chunk(9)]));
    assert_eq!((got.broken, record.epoch().number()), (None, Epoch(1)));
}

#[test]
fn a_client_that_may_have_cleared_breaks_the_epoch_until_the_next_commit() {
    for (ending, why) in [
        (Ending::Cleared, Broken::AbortedAfterClear),
        (Ending::Vanished { proven_untouched: false }, Broken::ClientVanished),
    ] {
        let (_world, mut record) = begun();
        collect(&mut record, 0);
        assert!(record.abort(US, ending, &mut Vec::new()).is_ok());
        assert_eq!(record.epoch().broken(), Some(&why));
        assert_eq!(collect(&mut record, 0).broken, Some(why.to_string()));
        commit(&mut record, &[]);
        assert_eq!(collect(&mut record, 0).broken, None);
    }
}

#[test]
fn a_clear_seen_in_an_aborted_transaction_outweighs_the_clients_word() {
    let (world, mut record) = begun();
    collect(&mut record, 0);
    world.0.borrow_mut().waiting.push(Observed::ClearRefs);
    assert!(record.abort(US, Ending::Vanished { proven_untouched: true }, &mut Vec::new()).is_ok());
    assert_eq!(record.epoch().broken(), Some(&Broken::ForeignClear));
}

#[test]
fn clear_refs_is_foreign_outside_a_transaction_only() {
    let (world, mut record) = begun();
    collect(&mut record, 0);
    world.0.borrow_mut().waiting.push(Observed::ClearRefs);
    commit(&mut record, &[]);
    assert_eq!(record.epoch().broken(), None);
    world.0.borrow_mut().waiting.push(Observed::ClearRefs);
    assert_eq!(collect(&mut record, 0).broken, Some(Broken::ForeignClear.to_string()));
}

#[test]
fn a_foreign_write_during_the_freeze_counts_in_the_next_epoch() {
    let (world, mut record) = begun();
    collect(&mut record, 0);
    world.event(Change::Written(chunk(3)));
    commit(&mut record, &[]);
    assert_eq!(collect(&mut record, 0).changed.as_slice(), [chunk(3)]);
}

#[test]
fn a_foreign_write_under_way_at_the_scan_counts_in_the_next_epoch_too() {
    let (world, mut record) = begun();
    world.event(Change::Written(chunk(3)));
    world.0.borrow_mut().being_written.push(chunk(3));
    assert_eq!(collect(&mut record, 0).changed.as_slice(), [chunk(3)]);
    // It is over now, but the scan came first.
    world.0.borrow_mut().being_written.clear();
    commit(&mut record, &[]);
    assert_eq!(collect(&mut record, 0).changed.as_slice(), [chunk(3)]);
    commit(&mut record, &[]);
    assert!(collect(&mut record, 0).changed.is_empty());
}

#[test]
fn a_foreign_write_under_way_survives_an_abort() {
    let (world, mut record) = begun();
    world.0.borrow_mut().being_written.push(chunk(3));
    collect(&mut record, 0);
    assert!(record.abort(US, Ending::Untouched, &mut Vec::new()).is_ok());
    collect(&mut record, 0);
    commit(&mut record, &[]);
    assert_eq!(collect(&mut record, 0).changed.as_slice(), [chunk(3)]);
}

#[test]
fn a_lost_event_forbids_inheriting_in_its_epoch() {
    let (world, mut record) = begun();
    world.0.borrow_mut().losses.ring = 1;
    let got = collect(&mut record, 0);
    assert!(matches!(got.touched, Touched::Everything { .. }));
    assert_eq!(got.changed.as_slice(), [EVERYTHING]);
    commit(&mut record, &[]);
    let got = collect(&mut record, 0);
    assert!(matches!(got.touched, Touched::Chunks(_)));
    assert!(got.changed.is_empty());
}

#[test]
fn incomplete_hooks_or_none_read_everything() {
    let (world, mut record) = begun();
    world.0.borrow_mut().incomplete = true;
    let got = collect(&mut record, 0);
    assert_eq!(got.touched, Touched::Everything { reason: "hints are none".to_owned() });
    let why = Broken::NoEvents("no CAP_BPF".to_owned());
    let mut blind = Record::<World, World>::new(None, world.clone(), true, Some(why.clone()));
    blind.begin(true, &mut Vec::new());
    for _ in 0..2 {
        let got = collect(&mut blind, 0);
        assert_eq!(got.broken, Some(why.to_string()));
        assert!(matches!(got.touched, Touched::Everything { .. }));
        commit(&mut blind, &[]);
    }
}

#[test]
fn one_transaction_at_a_time_and_its_owner_ends_it() {
    let (_world, mut record) = begun();
    collect(&mut record, 0);
    assert!(matches!(record.collect(2, 0, &mut Vec::new()), Err(RecordError::Busy)));
    assert!(matches!(record.commit(2, id(), &[], &mut Vec::new()), Err(RecordError::Idle)));
    assert!(record.is_taken_by(US));
    commit(&mut record, &[]);
    assert!(!record.is_busy());
}

#[test]
fn exec_is_noticed_and_nothing_is_collected_of_the_old_address_space() {
    let (world, mut record) = begun();
    let (generation, before) = record.give_layout();
    let before = before.to_vec();
    world.0.borrow_mut().waiting.push(Observed::Exec);
    let mut notices = Vec::new();
    assert!(matches!(record.collect(US, 0, &mut notices), Err(RecordError::Gone)));
    assert_eq!(notices, [Notice::Exec]);
    world.map(0x80_0000, 0x80_2000);
    record.restart(Some(world.clone()), world.clone(), None);
    let _ = record.update(true, &mut Vec::new());
    record.begin(false, &mut Vec::new());
    assert_eq!((record.epoch().number(), record.epoch().checkpoint()), (Epoch(2), None));
    // Whoever has a layout of the old one is told of all that is there now.
    let collected = collect(&mut record, generation);
    assert_eq!(collected.broken, None);
    assert_eq!(
        collected.relayout.map(|relayout| relayout.apply(&before)).as_deref(),
        Some(record.model().vmas())
    );
}
