//! Bringing a process tree back.
//!
//! The tasks of the tree are made, and become what they were, step by step: each stands in a ptrace stop, and makes the system
//! calls of a list when it is told to (`restorer`). They end with us until the last step, which lets all of them go.

mod arena;
mod batch;
mod build;
mod check;
mod checkpoint;
mod error;
mod files;
mod memory;
mod place;
mod process;
mod request;
mod restorer;
mod sessions;
mod stub;
mod task;
mod thread;
mod tree;
mod vdso;

use std::collections::HashSet;
use std::path::Path;

use crate::addr::{Addr, AddrRange};
use crate::image::core::XsaveLayout;
use crate::kernel::{SyscallError, maps, own_thread};
use crate::target::on_tracer_thread;

use arena::Arena;
use batch::Batch;
use checkpoint::{Alive, Checkpoint, TASK_SIZE};
use files::Opened;
use sessions::Births;
use task::Task;
use tree::Tree;
use vdso::KernelAreas;

pub use error::{Refusal, RestoreError};
pub use request::{Inherited, Request};
pub use stub::Parent;

/// Restores the checkpoint of `request`. The tree runs then, or stands as it did; gives the PID of its root.
///
/// # Errors
/// See [`RestoreError`]; nothing of the tree is left behind.
pub fn run(request: &Request) -> Result<i32, RestoreError> {
    on_tracer_thread(|| restore(request))
}

/// Reads the checkpoint in `images` and all its parents as a restore does, and plans what it would do; compares its pages with their
/// checksums, if it is to `verify` them. Makes nothing.
///
/// # Errors
/// Something is missing or damaged, or can be restored nowhere.
pub fn read(images: &Path, verify: bool) -> Result<(), RestoreError> {
    let checkpoint = Checkpoint::read(images)?;
    files::read(&checkpoint)?;
    Births::of(&checkpoint.processes)?;
    for (process, alive) in checkpoint.alive() {
        let plan = match checkpoint.parent(process) {
            None => memory::build(alive.space(), &alive.memory),
            Some((_, parent)) => memory::adapt(parent.space(), alive.space(), &alive.memory, |range| {
                build::difference(&parent.memory, &alive.memory, range)
            })?,
        };
        let (steps, pages) = (plan.before.len() + plan.after.len(), plan.pages.pages().get());
        tracing::debug!(pid = process.pid, steps, pages, "its memory is planned");
    }
    if verify { checkpoint.verify() } else { Ok(()) }
}

fn restore(request: &Request) -> Result<i32, RestoreError> {
    let checkpoint = Checkpoint::read(&request.images_dir)?;
    if let Some(root) = &request.root {
        enter(root)?;
    }
    check::possible(&checkpoint, request)?;
    let (files, connections) = Opened::open(&checkpoint, request)?;
    let kernel = KernelAreas::ours()?;
    let (arena, parking, home) = arena(&checkpoint, &kernel)?;

    std::thread::scope(|scope| {
        // What is shared beside the making of the tree, now that the arena is there: no thread's stack can come in its place.
        let verify = || if request.verify { checkpoint.verify_shared() } else { Ok(()) };
        let verification = own_thread::spawn(scope, "verification", verify)?;
        let made = Tree::new(&checkpoint, &files, &arena, &kernel, parking, home, request.verify)
            .and_then(|tree| make(&checkpoint, &files, tree, request));
        own_thread::join(verification)?;
        if made.is_err() && request.verify {
            // Wrong pages may be why.
            checkpoint.verify()?;
        }
        let (tree, threads) = made?;
        let stands = |alive: &Alive| alive.stopped || request.leave_stopped;
        let stopped: Vec<i32> =
            checkpoint.alive().filter(|(_, alive)| stands(alive)).map(|(process, _)| process.pid).collect();
        files.let_go()?;
        connections.go_on(&checkpoint)?;
        tree.release(&threads, &stopped)?;
        files.keep();
        Ok::<_, RestoreError>(())
    })?;
    Ok(checkpoint.root().pid)
}

/// From here on all paths lead below `root`, for this thread and what it makes.
fn enter(root: &Path) -> Result<(), RestoreError> {
    let failed = |call, errno| SyscallError::new(call, root.display().to_string(), errno);
    if !root.join("proc/self/maps").exists() {
        let root = root.display();
        let what = format!(
            "{root} has no /proc, which its processes need to be made: mount -t proc proc {root}/proc"
        );
        return Err(Refusal::Checkpoint(what).into());
    }
    nix::sched::unshare(nix::sched::CloneFlags::CLONE_FS).map_err(|e| failed("unshare(CLONE_FS)", e))?;
    nix::unistd::chroot(root).map_err(|e| failed("chroot", e))?;
    Ok(nix::unistd::chdir("/").map_err(|e| failed("chdir", e))?)
}

/// Makes all processes and threads, as they were; gives the threads, which stand.
fn make<'a>(
    checkpoint: &'a Checkpoint,
    files: &'a Opened,
    mut tree: Tree<'a>,
    request: &Request,
) -> Result<(Tree<'a>, Vec<Task<'a>>), RestoreError> {
    tree.plant(request.parent, request.shell_job)?;
    tree.zombies()?;
    files.terminals.foreground(checkpoint, &tree.tasks)?;

    // What needs our credentials, or all processes.
    for (process, alive) in checkpoint.alive() {
        let mut batch = Batch::of(tree.tasks[&process.pid]);
        process::prepare(process, alive, files, &mut batch)?;
    }
    // Descriptors last: a process may have its parent's table, which has ours until then.
    let mut tables = HashSet::new();
    let mut epolls = Vec::new();
    let mut threads = Vec::new();
    for (process, alive) in checkpoint.alive() {
        let mut batch = Batch::of(tree.tasks[&process.pid]);
        if tables.insert(alive.ids.files_id) {
            process::descriptors(process, alive, files, &mut batch)?;
        }
        process::epolls(checkpoint, process, alive, &mut epolls, &mut batch)?;
        files::locks_of_process(checkpoint, process.pid, alive, &mut batch)?;
        set_oom_score(process.pid, alive.task.oom_score_adj)?;
    }
    files.settle(checkpoint)?;

    // Threads, and what is theirs.
    for (process, alive) in checkpoint.alive() {
        let pid = process.pid;
        let tasks = tree.threads(pid, alive)?;
        for (task, thread) in tasks.iter().zip(&alive.threads) {
            let mut batch = Batch::of(*task);
            thread::before_creds(pid, thread, &mut batch)?;
            batch.flush()?;
        }
        let mut batch = Batch::of(tasks[0]);
        process::timers_and_signals(pid, alive, &mut batch)?;
        process::limits(alive, &mut batch)?;
        batch.flush()?;
        for (task, thread) in tasks.iter().zip(&alive.threads) {
            let mut batch = Batch::of(*task);
            thread::creds(thread, &checkpoint.filters, pid, &mut batch)?;
            process::dumpable(alive, &mut batch)?;
            batch.flush()?;
        }
        threads.extend(tasks.into_iter().zip(&alive.threads));
    }

    // From here on there is nothing left of us in them.
    for (process, alive) in checkpoint.alive() {
        tree.leave(process.pid, process::trap_action(alive).as_deref())?;
    }
    let layout = XsaveLayout::of_this_processor();
    for (task, thread) in &threads {
        thread::settle(task, thread, &layout)?;
    }
    Ok((tree, threads.into_iter().map(|(task, _)| task).collect()))
}

/// The arena, and behind it twice room for the kernel's areas, to park them and for good: where no process of the tree has
/// anything, nor we.
fn arena(checkpoint: &Checkpoint, kernel: &KernelAreas) -> Result<(Arena, Addr, Addr), RestoreError> {
    let ours = maps::read(std::process::id() as i32)?;
    let theirs = checkpoint.alive().flat_map(|(_, alive)| alive.ranges());
    let taken = theirs.chain(ours.iter().map(|vma| vma.range));
    let len = arena::LEN + 2 * kernel.len();
    let Some(hole) = place::hole(taken, len, TASK_SIZE) else {
        return Err(Refusal::Checkpoint("no address is free in all its processes".into()).into());
    };
    let range = AddrRange::with_len(hole.start, arena::LEN);
    Ok((Arena::map(range)?, range.end, range.end.saturating_add(kernel.len())))
}

fn set_oom_score(pid: i32, score: Option<i32>) -> Result<(), SyscallError> {
    let Some(score) = score else { return Ok(()) };
    let path = format!("/proc/{pid}/oom_score_adj");
    std::fs::write(&path, score.to_string()).map_err(|e| SyscallError::new("write", path, e))
}
