//! Chains stay exact where what happens between two checkpoints leaves the layout looking as before, or is not over at a
//! checkpoint.

use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use memckpt::kernel::maps;
use memckpt_tests::features::Tracker;
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

/// A page of ours whose first access waits.
struct Gate {
    uffd: OwnedFd,
    page: u64,
}

impl Gate {
    fn new() -> Option<Self> {
        const UFFDIO_API: u64 = 0xC018_AA3F;
        const UFFDIO_REGISTER: u64 = 0xC020_AA00;
        // SAFETY: a new descriptor and a new mapping; the structures are those of linux/userfaultfd.h.
        unsafe {
            let fd = libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC) as i32;
            if fd < 0 {
                return None;
            }
            let uffd = OwnedFd::from_raw_fd(fd);
            let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
            let page = libc::mmap(std::ptr::null_mut(), 4096, libc::PROT_READ, flags, -1, 0) as u64;
            let api = libc::ioctl(fd, UFFDIO_API, [0xAAu64, 0, 0].as_mut_ptr());
            let registered = libc::ioctl(fd, UFFDIO_REGISTER, [page, 4096, 1, 0].as_mut_ptr());
            (api == 0 && registered == 0).then_some(Self { uffd, page })
        }
    }

    /// Lets accesses go on, with a page full of `byte`.
    fn open(&self, byte: u8) -> Result<()> {
        const UFFDIO_COPY: u64 = 0xC028_AA03;
        let page = [byte; 4096];
        let mut copy = [self.page, page.as_ptr() as u64, 4096, 0, 0];
        // SAFETY: fills our own registered page from `page`.
        let result = unsafe { libc::ioctl(self.uffd.as_raw_fd(), UFFDIO_COPY, copy.as_mut_ptr()) };
        ensure!(result == 0, "UFFDIO_COPY: {}", std::io::Error::last_os_error());
        Ok(())
    }
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
            v.inode == 0
                && v.name.is_empty()
                && v.range.len() == 2 << 20
                && v.prot.contains(maps::Prot::WRITE)
        });
        let to = island.context("no island")?.range.start.get() + 0x5000;
        let page = gate.page;
        let writer = std::thread::spawn(move || {
            let local = libc::iovec { iov_base: page as *mut _, iov_len: 4096 };
            let remote = libc::iovec { iov_base: to as *mut _, iov_len: 4096 };
            // SAFETY: reads our own mapped page; writes into the victim.
            unsafe { libc::process_vm_writev(pid, &raw const local, 1, &raw const remote, 1, 0) }
        });
        // Well inside the call. Were it not, the test would prove less, and still pass.
        std::thread::sleep(Duration::from_millis(300));
        chain.checkpoint("pre-dump", 2, &[])?;
        gate.open(0x77)?;
        ensure!(writer.join().ok() == Some(4096), "the write failed");
        chain.compare(3)
    })
}
