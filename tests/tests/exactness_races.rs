//! Chains stay exact where what happens between two checkpoints leaves the layout looking as before, or is not over at a
//! checkpoint.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use memckpt::kernel::maps;
use memckpt_tests::features::Tracker;
use memckpt_tests::gate::Gate;
use memckpt_tests::{Scratch, Victim, is_root, memckpt, oracle, skip};

const NEITHER: &str = "no dirty tracking";

/// A watched victim, with a first pre-dump in `1`.
struct Chain {
    victim: Victim,
    pid: String,
    scratch: Scratch,
}

impl Chain {
    fn start(tracker: Tracker, prepare: &str) -> Result<Self> {
        let scratch = Scratch::new()?;
        let mut victim = Victim::start("layout", [scratch.path()])?;
        let pid = victim.pid().to_string();
        memckpt(["watch", &pid, "--background", "--tracker", tracker.name()]).ok()?;
        ensure!(victim.ask(prepare)? == "ok");
        let chain = Self { victim, pid, scratch };
        chain.checkpoint("pre-dump", 1, &[])?;
        Ok(chain)
    }

    fn checkpoint(&self, command: &str, number: u32, more: &[&str]) -> Result<()> {
        let images = self.scratch.directory(&number.to_string())?;
        let mut run = memckpt([command, "-t", &self.pid, "-D"]).arg(&images).args(more);
        if number > 1 {
            run = run.arg("--prev-images-dir").arg(format!("../{}", number - 1));
        }
        run.ok()?;
        Ok(())
    }

    /// A last checkpoint, compared with the process.
    fn compare(&self, number: u32) -> Result<()> {
        self.checkpoint("dump", number, &["--leave-stopped", "--track-mem"])?;
        self.victim.wait_stopped()?;
        let compared = oracle::compare(&self.scratch.path().join(number.to_string()), self.victim.pid())?;
        ensure!(compared.inherited > 0, "nothing was inherited: {compared:?}");
        memckpt(["watch", &self.pid, "--stop"]).ok()?;
        Ok(())
    }
}

fn with_each_tracker(name: &str, test: impl Fn(Tracker) -> Result<()>) -> Result<()> {
    if !is_root() {
        skip(name, "not root");
        return Ok(());
    }
    let works: Vec<_> =
        [Tracker::SoftDirty, Tracker::UffdWp].into_iter().filter(|t| t.missing().is_none()).collect();
    if works.is_empty() {
        skip(name, NEITHER);
    }
    works.into_iter().try_for_each(|t| test(t).with_context(|| format!("tracker {}", t.name())))
}

#[test]
fn what_takes_the_place_of_something_alike_is_new() -> Result<()> {
    with_each_tracker("what_takes_the_place_of_something_alike_is_new", |tracker| {
        let mut chain = Chain::start(tracker, "holes")?;
        // Nothing but libraries and stacks would be inherited of the first.
        chain.checkpoint("pre-dump", 2, &[])?;
        ensure!(chain.victim.ask("holes-reuse")? == "ok");
        chain.compare(3)
    })
}

/// The writer pins its pages in the first epoch, the second checkpoint re-arms and copies them, then the data comes.
#[test]
fn a_foreign_write_in_flight_over_a_checkpoint_is_in_the_next() -> Result<()> {
    const NAME: &str = "a_foreign_write_in_flight_over_a_checkpoint_is_in_the_next";
    with_each_tracker(NAME, |tracker| {
        let Some(gate) = Gate::new() else {
            skip(NAME, "no userfaultfd for faults of the kernel");
            return Ok(());
        };
        let chain = Chain::start(tracker, "holes")?;
        let pid = chain.victim.pid();
        let island = maps::read(pid)?.into_iter().rev().find(|v| {
            v.is_anonymous()
                && v.name.is_empty()
                && v.range.len() == 2 << 20
                && v.prot.contains(maps::Prot::WRITE)
        });
        let to = island.context("no island")?.range.start.get() + 0x5000;
        let writer = gate.write_to(pid, to);
        // Well inside the call. Were it not, the test would prove less, and still pass.
        std::thread::sleep(Duration::from_millis(300));
        chain.checkpoint("pre-dump", 2, &[])?;
        gate.open(0x77)?;
        ensure!(writer.join().ok() == Some(4096), "the write failed");
        chain.compare(3)
    })
}
