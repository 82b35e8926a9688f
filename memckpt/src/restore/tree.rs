//! Making the processes of a tree, and their threads.

use std::collections::BTreeMap;

use crate::addr::{Addr, AddrRange};
use crate::image::chain::KnownChecksums;
use crate::kernel::ptrace::made::{self, Event};
use crate::kernel::{SyscallError, ptrace};

use super::arena::Arena;
use super::batch::Batch;
use super::build;
use super::checkpoint::{Alive, Checkpoint, Process, State, TASK_SIZE};
use super::error::{Refusal, RestoreError};
use super::files::Opened;
use super::memory;
use super::sessions::Births;
use super::stub::{self, CloneArgs, Parent};
use super::task::Task;
use super::vdso::{KernelAreas, OldVdso, Place};

/// RSEQ_FLAG_UNREGISTER of linux/rseq.h.
const UNREGISTER: u64 = 1;

/// The processes that are there so far, by their PIDs. They end when this is dropped, unless they were released.
pub(super) struct Tree<'a> {
    checkpoint: &'a Checkpoint,
    files: &'a Opened,
    arena: &'a Arena,
    kernel: &'a KernelAreas,
    /// Where the kernel's areas are while memory is made.
    parking: Addr,
    /// Where they belong in each process that has them.
    places: BTreeMap<i32, Place>,
    births: Births,
    /// What pages are compared with, if they are.
    known: Option<KnownChecksums>,
    pub(super) tasks: BTreeMap<i32, Task<'a>>,
    /// Processes that have the IDs of leaders that had ended, and their parents.
    stand_ins: Vec<(i32, i32)>,
    released: bool,
}

impl<'a> Tree<'a> {
    pub(super) fn new(
        checkpoint: &'a Checkpoint,
        files: &'a Opened,
        arena: &'a Arena,
        kernel: &'a KernelAreas,
        parking: Addr,
        home: Addr,
        verify: bool,
    ) -> Result<Self, RestoreError> {
        let births = Births::of(&checkpoint.processes)?;
        let tasks = BTreeMap::new();
        let mut places = BTreeMap::new();
        for (process, alive) in checkpoint.alive() {
            let place = kernel.place_in(process.pid, &alive.mm.vmas, &alive.memory, home)?;
            if let Some(old) = place.as_ref().and_then(|place| place.old.as_ref()) {
                check_threads(process.pid, alive, old)?;
            }
            places.extend(place.map(|place| (process.pid, place)));
        }
        Ok(Self {
            checkpoint,
            files,
            arena,
            kernel,
            parking,
            places,
            births,
            known: verify.then(KnownChecksums::default),
            tasks,
            stand_ins: Vec::new(),
            released: false,
        })
    }

    /// Makes all processes: memory, sessions and groups.
    pub(super) fn plant(&mut self, parent: Parent, own_group: bool) -> Result<(), RestoreError> {
        let root = self.checkpoint.root();
        stub::fork(root.pid, parent).map_err(taken(root.pid))?;
        let task = Task::seize(root.pid, self.arena)?;
        self.tasks.insert(root.pid, task);
        self.clear(task)?;
        let State::Alive(alive) = &root.state else { return Ok(()) };
        let mut batch = Batch::of(task);
        let plan = memory::build(alive.space(), &alive.memory);
        build::build(root.pid, &plan, &alive.memory, self.known.as_mut(), self.files, &mut batch)?;
        self.put_kernel_areas(root.pid, &mut batch)?;
        self.grow(root, alive)?;
        self.groups(own_group)?;
        self.end_stand_ins()
    }

    /// Takes everything out of the first process that is ours, but the arena.
    fn clear(&self, task: Task<'a>) -> Result<(), RestoreError> {
        let mut batch = Batch::of(task);
        if let Some(rseq) = ptrace::rseq(task.tid())? {
            let args = [rseq.address, rseq.size.into(), UNREGISTER, rseq.signature.into()];
            batch.call("rseq", libc::SYS_rseq, args)?;
        }
        batch.call("set_robust_list", libc::SYS_set_robust_list, [0, 24])?;
        let mut kept: Vec<AddrRange> = self.kernel.ranges().chain([self.arena.range()]).collect();
        kept.sort_unstable();
        let mut at = 0;
        for range in kept.into_iter().chain([AddrRange::new(TASK_SIZE, TASK_SIZE)]) {
            if at < range.start.get() {
                batch.call("munmap", libc::SYS_munmap, [at, range.start.get() - at])?;
            }
            at = range.end.get();
        }
        self.kernel.move_to(self.kernel.start(), self.parking, &mut batch)?;
        batch.flush()
    }

    /// From the parking to their place in process `pid`, if they have one.
    fn put_kernel_areas(&self, pid: i32, batch: &mut Batch<'_>) -> Result<(), RestoreError> {
        if let Some(place) = self.places.get(&pid) {
            self.kernel.move_to(self.parking, place.start, batch)?;
            if let Some(old) = &place.old {
                old.map(self.tasks[&pid], batch)?;
            }
        }
        batch.flush()
    }

    /// Forks the children of `process`, and theirs.
    fn grow(&mut self, process: &'a Process, alive: &'a Alive) -> Result<(), RestoreError> {
        let task = self.tasks[&process.pid];
        let checkpoint = self.checkpoint;
        let children = checkpoint.processes.iter().filter(|child| child.ppid == process.pid);
        let (orphans, children): (Vec<_>, Vec<_>) = children.partition(|child| self.births.is_orphan(child));
        let (before, after): (Vec<_>, Vec<_>) =
            children.into_iter().partition(|child| self.births.before_session(process, child));
        for child in before {
            self.child(task, (process, alive), child)?;
        }
        if process.sid == process.pid {
            make_session(task)?;
            let mut batch = Batch::of(task);
            self.files.terminals.control(process.pid, &mut batch)?;
            batch.flush()?;
        }
        for child in after {
            self.child(task, (process, alive), child)?;
        }
        for orphan in orphans {
            let leader = self.leader(task, orphan.sid)?;
            let theirs = checkpoint.alive().find(|(alive, _)| alive.pid == leader.tid());
            self.child(leader, theirs.unwrap_or((process, alive)), orphan)?;
        }
        Ok(())
    }

    /// Who leads session `sid`, and so can bear a child of it. One that has ended is stood for by a child of `parent`, for as long as
    /// processes are made.
    fn leader(&mut self, parent: Task<'a>, sid: i32) -> Result<Task<'a>, RestoreError> {
        if let Some(task) = self.tasks.get(&sid) {
            return Ok(*task);
        }
        let leader = self.stand_in(parent, sid)?;
        make_session(leader)?;
        Ok(leader)
    }

    /// A child of `parent` whose only use is its ID.
    fn stand_in(&mut self, parent: Task<'a>, pid: i32) -> Result<Task<'a>, RestoreError> {
        let mut batch = Batch::of(parent);
        clone(pid, CloneArgs { exit_signal: libc::SIGCHLD as u64, ..CloneArgs::default() }, &mut batch)?;
        let task = batch.fork().map_err(|e| taken_task(pid, e))?;
        self.tasks.insert(pid, task);
        self.stand_ins.push((pid, parent.tid()));
        Ok(task)
    }

    /// Ends those that stand in for others, and has their parents wait for them.
    fn end_stand_ins(&mut self) -> Result<(), RestoreError> {
        for (pid, parent) in std::mem::take(&mut self.stand_ins) {
            self.tasks[&pid].end(0)?;
            self.tasks.remove(&pid);
            let mut batch = Batch::of(self.tasks[&parent]);
            batch.call_for(pid.into(), "wait4", libc::SYS_wait4, [pid as u64, 0, 0, 0])?;
            batch.flush()?;
        }
        Ok(())
    }

    /// Has `maker`, which is as `like` is, fork `child`: its child, or its parent's.
    fn child(
        &mut self,
        maker: Task<'a>,
        (like, parents): (&'a Process, &'a Alive),
        child: &'a Process,
    ) -> Result<(), RestoreError> {
        let mut batch = Batch::of(maker);
        let flags = match &child.state {
            State::Alive(alive) => shared(parents, alive),
            State::Zombie { .. } => 0,
        };
        let args = if maker.tid() == child.ppid {
            CloneArgs { flags, exit_signal: libc::SIGCHLD as u64, ..CloneArgs::default() }
        } else {
            // Whose signal it sends when it ends, too (copy_process(), kernel/fork.c).
            CloneArgs { flags: flags | libc::CLONE_PARENT as u64, ..CloneArgs::default() }
        };
        clone(child.pid, args, &mut batch)?;
        let task = batch.fork().map_err(|e| taken_task(child.pid, e))?;
        self.tasks.insert(child.pid, task);
        let State::Alive(alive) = &child.state else {
            // Others may be of its session, and live.
            return if child.sid == child.pid { make_session(task) } else { Ok(()) };
        };
        let mut batch = Batch::of(task);
        let theirs = self.places.get(&like.pid);
        let moves = theirs != self.places.get(&child.pid);
        if moves && let Some(theirs) = theirs {
            self.kernel.move_to(theirs.start, self.parking, &mut batch)?;
            if let Some(old) = &theirs.old {
                old.unmap(&mut batch)?;
            }
        }
        let plan = memory::adapt(parents.space(), alive.space(), &alive.memory, |range| {
            build::difference(&parents.memory, &alive.memory, range)
        })?;
        build::build(child.pid, &plan, &alive.memory, self.known.as_mut(), self.files, &mut batch)?;
        if moves {
            self.put_kernel_areas(child.pid, &mut batch)?;
        }
        self.grow(child, alive)
    }

    /// Process groups: their leaders first.
    fn groups(&mut self, own_group: bool) -> Result<(), RestoreError> {
        let root = self.checkpoint.root();
        let (leaders, others): (Vec<_>, Vec<_>) =
            self.checkpoint.processes.iter().partition(|process| process.pgid == process.pid);
        for process in leaders.into_iter().chain(others) {
            // The leader of a session leads its group already; who had the shell's group has ours.
            let foreign = own_group && process.pgid == root.pgid && root.pgid != root.pid;
            if process.sid == process.pid || process.pgid == 0 || foreign {
                continue;
            }
            let task = self.tasks[&process.pid];
            if !self.tasks.contains_key(&process.pgid) {
                join_group(self.stand_in(task, process.pgid)?, 0)?;
            }
            join_group(task, process.pgid)?;
        }
        Ok(())
    }

    /// Ends those that had ended.
    pub(super) fn zombies(&mut self) -> Result<(), RestoreError> {
        for process in &self.checkpoint.processes {
            let State::Zombie { exit_code, comm } = &process.state else { continue };
            let task = self.tasks[&process.pid];
            let mut batch = Batch::of(task);
            let mut name = comm.clone().into_bytes();
            name.push(0);
            let set = libc::PR_SET_NAME as u64;
            batch.call_with("prctl(PR_SET_NAME)", libc::SYS_prctl, &name, |at| [set, at])?;
            batch.flush()?;
            task.end(*exit_code)?;
            self.tasks.remove(&process.pid);
        }
        Ok(())
    }

    /// Makes the threads of a process, stopped; the first is there already.
    pub(super) fn threads(&self, pid: i32, alive: &Alive) -> Result<Vec<Task<'a>>, RestoreError> {
        let leader = self.tasks[&pid];
        let mut tasks = vec![leader];
        let flags = libc::CLONE_VM
            | libc::CLONE_FS
            | libc::CLONE_FILES
            | libc::CLONE_SIGHAND
            | libc::CLONE_THREAD
            | libc::CLONE_SYSVSEM;
        for thread in alive.threads.iter().skip(1) {
            let mut batch = Batch::of(leader);
            clone(thread.tid, CloneArgs { flags: flags as u64, ..CloneArgs::default() }, &mut batch)?;
            tasks.push(batch.fork().map_err(|e| taken_task(thread.tid, e))?);
        }
        Ok(tasks)
    }

    /// Unmaps the arena from process `pid`, which makes no lists any more. `trap`: what SIGTRAP does to it.
    pub(super) fn leave(&self, pid: i32, trap: Option<&[u8]>) -> Result<(), RestoreError> {
        let task = self.tasks[&pid];
        if !self.places.contains_key(&pid) {
            self.kernel.unmap(self.parking, task)?;
        }
        if let Some(trap) = trap {
            self.arena.write_data(trap);
            let args = [libc::SIGTRAP as u64, self.arena.data(), 0, 8, 0, 0];
            task.call_itself("rt_sigaction", libc::SYS_rt_sigaction, args)?;
        }
        let range = self.arena.range();
        task.call_itself("munmap", libc::SYS_munmap, [range.start.get(), range.len(), 0, 0, 0, 0])
    }

    /// Lets all threads go at once. From here on they live, whatever becomes of us.
    pub(super) fn release(mut self, threads: &[Task<'a>], stopped: &[i32]) -> Result<(), RestoreError> {
        for thread in threads {
            made::let_live(thread.tid())?;
        }
        self.released = true;
        for &pid in stopped {
            // SAFETY: no memory is involved; we trace it, so that it cannot be another.
            if unsafe { libc::kill(pid, libc::SIGSTOP) } != 0 {
                return Err(SyscallError::last("kill", format!("process {pid}")).into());
            }
        }
        for thread in threads {
            match ptrace::detach(thread.tid(), 0) {
                // One that goes on already has ended it.
                Err(error) if error.errno() == Some(libc::ESRCH) => {}
                other => other?,
            }
        }
        Ok(())
    }
}

impl Drop for Tree<'_> {
    fn drop(&mut self) {
        if self.released {
            return;
        }
        for &pid in self.tasks.keys() {
            // SAFETY: no memory is involved; they are ours, and not waited for.
            unsafe { libc::kill(pid, libc::SIGKILL) };
        }
        for &pid in self.tasks.keys() {
            while matches!(made::wait(pid), Ok(event) if !matches!(event, Event::Ended(_))) {}
        }
    }
}

/// No thread may go on in the middle of a vDSO that is not this kernel's: the variables that it reads are gone.
fn check_threads(pid: i32, alive: &Alive, old: &OldVdso) -> Result<(), Refusal> {
    match alive.threads.iter().find(|thread| old.contains(thread.arch.gpregs.ip)) {
        None => Ok(()),
        Some(thread) => {
            let what = format!(
                "thread {} was just reading a clock in the vDSO of another kernel: dump it again, or restore it under that kernel",
                thread.tid
            );
            Err(Refusal::State { pid, what })
        }
    }
}

/// Has a process lead a session of its own.
fn make_session(task: Task<'_>) -> Result<(), RestoreError> {
    let mut batch = Batch::of(task);
    batch.call("setsid", libc::SYS_setsid, [0; 0])?;
    batch.flush()
}

/// Puts a process into group `pgid`; 0 for one of its own.
fn join_group(task: Task<'_>, pgid: i32) -> Result<(), RestoreError> {
    let mut batch = Batch::of(task);
    batch.call("setpgid", libc::SYS_setpgid, [0, pgid as u64])?;
    batch.flush()
}

/// The flags of a clone(2) by which a child shares what it shared with its parent.
fn shared(parent: &Alive, child: &Alive) -> u64 {
    let files = if parent.ids.files_id == child.ids.files_id { libc::CLONE_FILES } else { 0 };
    let fs = if parent.ids.fs_id == child.ids.fs_id { libc::CLONE_FS } else { 0 };
    (files | fs) as u64
}

/// Adds a clone3(2) that makes `tid`.
fn clone(tid: i32, args: CloneArgs, batch: &mut Batch<'_>) -> Result<(), RestoreError> {
    let set_tid = |at| CloneArgs { set_tid: at, set_tid_size: 1, ..args }.bytes();
    let len = size_of::<CloneArgs>() as u64;
    batch.call_with_two("clone3", libc::SYS_clone3, &tid.to_ne_bytes(), set_tid, |_, args| [args, len])
}

/// The ID may be free of processes, and still be that of a group or session.
fn taken(pid: i32) -> impl FnOnce(SyscallError) -> RestoreError {
    move |error| match error.errno() {
        Some(libc::EEXIST) => {
            Refusal::PidTaken { pid, state: "a process group, a session or a new process".into() }.into()
        }
        _ => error.into(),
    }
}

fn taken_task(pid: i32, error: RestoreError) -> RestoreError {
    match error {
        RestoreError::Syscall(error) if error.call == "clone3" => taken(pid)(error),
        error => error,
    }
}
