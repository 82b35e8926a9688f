//! What memckpt dumped, memckpt restores: the programs go on, and say themselves whether all is right.

use std::fs;
use std::io::Read as _;
use std::os::unix::fs::{FileExt as _, PermissionsExt as _};
use std::os::unix::process::ExitStatusExt as _;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use memckpt::kernel::status;
use memckpt_tests::pair::{Pair, Tool, Wants};
use memckpt_tests::program::{PATIENCE, Program};
use memckpt_tests::{goes_on, going_on, in_guest, memckpt, quick, say};

const PAIR: Pair = Pair { dumper: Tool::Memckpt, restorer: Tool::Memckpt };

goes_on! { PAIR;
    fn a_ring_of_twenty_processes_and_two_zombies() victim("ring");
    fn fifty_threads_blocked_in_different_calls() victim("threads");
    fn a_thread_in_a_restartable_sequence() victim("sequence");
    fn memory_that_is_checked() victim("memory");
    fn a_shell_loop_that_writes_a_file() program(&Wants::default(), Program::shell_loop);
    fn python_with_threads_a_pipe_a_timer_and_a_deleted_file() program(&Wants::default(), Program::python);
    fn one_of_every_kind_of_descriptor() descriptors();
    fn terminals_of_its_own() terminals();
    fn the_job_of_a_shell() shell_job();
    fn connections_whose_peers_wait() connections();
    fn a_pipe_that_leads_outside() outer_pipe();
    fn datagrams_that_go_outside() outer_datagrams();
    fn redis_with_data_and_a_connected_client() redis(20_000);
}

fn dump(program: &Program, images: &Path) -> Result<()> {
    memckpt(["dump", "-t", &program.pid.to_string(), "-D"]).arg(images).ok()?;
    Ok(())
}

/// A million keys, clients that do not stop asking, ten rounds of one process. A guest is emulated, and has a tenth of it.
#[test]
fn redis_under_load() -> Result<()> {
    let (keys, rounds) = if in_guest() || quick() { (100_000, 3) } else { (1_000_000, 10) };
    going_on::redis_under_load(PAIR, "redis_under_load", keys, rounds)
}

/// Another user's, with groups and a bounding set of its own: it checks them each round.
#[test]
fn a_program_without_rights() -> Result<()> {
    going_on::program(PAIR, "a_program_without_rights", &Wants::default(), |scratch| {
        let output = scratch.path().join("output");
        fs::write(&output, "")?;
        fs::set_permissions(&output, fs::Permissions::from_mode(0o666))?;
        fs::set_permissions(scratch.path(), fs::Permissions::from_mode(0o755))?;
        let text = "import itertools, os, sys, time\n\
            def who(): return [l for l in open('/proc/self/status') if l[:3] in ('Uid', 'Gid', 'Gro', 'Cap', 'NoN')]\n\
            at_first = who()\n\
            out = os.open(sys.argv[1], os.O_WRONLY | os.O_APPEND)\n\
            for number in itertools.count(1):\n \
                os.write(out, b'%d %s\\n' % (number, b'ok' if who() == at_first else b'error'))\n \
                time.sleep(0.02)";
        let mut command = Command::new("/usr/bin/setpriv");
        command.args(["--reuid", "65534", "--regid", "65534", "--groups", "7,8", "--no-new-privs"]);
        command.args(["--bounding-set", "-sys_admin", "/usr/bin/python3", "-c", text]).arg(&output);
        Program::start(command, output)
    })
}

/// A file of its own in /proc, which is there only once the process is.
#[test]
fn its_own_status() -> Result<()> {
    going_on::program(PAIR, "its_own_status", &Wants::default(), |scratch| {
        let output = scratch.path().join("output");
        let text = "import itertools, os, sys, time\n\
            status = open('/proc/self/status')\n\
            out = os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT | os.O_APPEND)\n\
            for number in itertools.count(1):\n \
                status.seek(0)\n \
                os.write(out, b'%d %s\\n' % (number, b'ok' if 'Pid:\\t%d\\n' % os.getpid() in status.read() else b'error'))\n \
                time.sleep(0.02)";
        let mut command = Command::new("/usr/bin/python3");
        command.args(["-c", text]).arg(&output);
        Program::start(command, output)
    })
}

/// A descriptor of its child, which is there only once the child is.
#[test]
fn a_pidfd_of_its_child() -> Result<()> {
    going_on::program(PAIR, "a_pidfd_of_its_child", &Wants::default(), |scratch| {
        let output = scratch.path().join("output");
        let text = "import itertools, os, select, signal, sys, time\n\
            child = os.fork()\n\
            while child == 0: time.sleep(100)\n\
            pidfd = os.pidfd_open(child)\n\
            out = os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT | os.O_APPEND)\n\
            for number in itertools.count(1):\n \
                signal.pidfd_send_signal(pidfd, 0)\n \
                lives = not select.select([pidfd], [], [], 0)[0] and 'Pid:\\t%d\\n' % child in open('/proc/self/fdinfo/%d' % pidfd).read()\n \
                os.write(out, b'%d %s\\n' % (number, b'ok' if lives else b'error'))\n \
                time.sleep(0.02)";
        let mut command = Command::new("/usr/bin/python3");
        command.args(["-c", text]).arg(&output);
        Program::start(command, output)
    })
}

/// A program under a seccomp filter, which it checks each round.
#[test]
fn a_seccomp_filter() -> Result<()> {
    going_on::program(PAIR, "a_seccomp_filter", &Wants::default(), |scratch| {
        Program::script("filtered.py", scratch, &[])
    })
}

/// The files of the tree are looked for below a directory, which is its root from then on.
#[test]
fn under_another_root() -> Result<()> {
    const NAME: &str = "under_another_root";
    let Some(scratch) = PAIR.place(NAME)? else { return Ok(()) };
    let output = scratch.path().join("output");
    let busybox = fs::canonicalize("/bin/busybox")?;
    let text = format!("i=0; while :; do i=$((i+1)); echo $i ok >> {}; sleep 0.05; done", output.display());
    let mut command = Command::new(&busybox);
    command.args(["sh", "-c", &text]);
    let mut program = Program::start(command, output.clone())?;
    let images = scratch.directory("images")?;
    dump(&program, &images)?;
    let before = program.ended()?;
    let root = scratch.directory("root")?;
    let below = |path: &Path| root.join(path.strip_prefix("/").unwrap_or(path));
    let here = std::env::current_dir()?;
    let programs = busybox.parent().context("a directory")?;
    for directory in [Path::new("/proc"), Path::new("/dev"), programs, &here, scratch.path()] {
        fs::create_dir_all(below(directory))?;
    }
    fs::copy(&busybox, below(&busybox))?;
    fs::rename(&output, below(&output))?;
    let restore = || memckpt(["restore", "-d", "--root"]).arg(&root).args(&["-D"]).arg(&images);
    restore().refused(&["has no /proc", "mount -t proc"])?;
    // Of /dev only what can be seen twice without harm, should it not be taken away again.
    let (proc, null) = (below(Path::new("/proc")), below(Path::new("/dev/null")));
    fs::write(&null, "")?;
    let _mounts = [Mount::new("/proc", &proc)?, Mount::new("/dev/null", &null)?];
    restore().ok()?;
    program.output = below(&output);
    program.wait_for(before + 10)?;
    ensure!(!output.exists(), "it writes outside of its root");
    ensure!(fs::read_link(format!("/proc/{}/root", program.pid))? == root, "its root is another");
    drop(program);
    Ok(())
}

/// A directory or file that is seen at another one, too, until this is dropped.
struct Mount(std::path::PathBuf);

impl Mount {
    fn new(what: &str, at: &Path) -> Result<Self> {
        let status = Command::new("mount").args(["--bind", what]).arg(at).status()?;
        ensure!(status.success(), "mount: {status}");
        Ok(Self(at.to_owned()))
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("--lazy").arg(&self.0).status();
    }
}

/// What a child does to descriptors, directory and mask, its parent sees.
#[test]
fn tables_that_a_parent_and_its_child_share() -> Result<()> {
    going_on::program(PAIR, "tables_that_a_parent_and_its_child_share", &Wants::default(), |scratch| {
        Program::script("tables.py", scratch, &[])
    })
}

/// Sessions and groups whose leaders have ended, and children of a living leader's children: the subreaper's, now.
#[test]
fn orphans_of_other_sessions_and_groups() -> Result<()> {
    going_on::program(PAIR, "orphans_of_other_sessions_and_groups", &Wants::default(), |scratch| {
        Program::script("orphans.py", scratch, &[])
    })
}

/// A private and a shared area that are larger than all memory, of which little is used.
#[test]
fn areas_larger_than_memory() -> Result<()> {
    going_on::program(PAIR, "areas_larger_than_memory", &Wants::default(), |scratch| {
        Program::script("reserving.py", scratch, &[])
    })
}

/// What mmap(2), madvise(2), mprotect(2) and mlock(2) have made of areas, guard regions, and what the kernel keeps of a process besides;
/// in a child, too.
#[test]
fn states_of_areas_and_processes() -> Result<()> {
    const NAME: &str = "states_of_areas_and_processes";
    let Some(scratch) = PAIR.place(NAME)? else { return Ok(()) };
    let mut program = Program::script("states.py", &scratch, &[])?;
    let child = scratch.path().join("output.child");
    for round in 0..PAIR.rounds() {
        let images = scratch.directory(&round.to_string())?;
        dump(&program, &images)?;
        let before = if round == 0 { program.ended()? } else { program.lines()? };
        let childs = right_lines(&child)?;
        memckpt(["restore", "-d", "-D"]).arg(&images).ok()?;
        program.wait_for(before + 10).with_context(|| {
            // What has ended the one ends the other.
            format!("round {round}; its child: {:?}", right_lines(&child))
        })?;
        wait_until("its child goes on", || right_lines(&child).map_or(true, |lines| lines > childs + 5))?;
    }
    say(&format!("{NAME}: {} lines and the child's {}, all right", program.lines()?, right_lines(&child)?));
    Ok(())
}

/// How many lines there are; the last one says that all is right.
fn right_lines(file: &Path) -> Result<usize> {
    let text = fs::read_to_string(file)?;
    let last = text.lines().next_back().unwrap_or_default();
    ensure!(last.ends_with(" ok"), "{}: {last}", file.display());
    Ok(text.lines().count())
}

/// `-S`, `-s` and `--pidfile`.
#[test]
fn a_child_of_the_callers_that_is_left_stopped() -> Result<()> {
    const NAME: &str = "a_child_of_the_callers_that_is_left_stopped";
    let Some(scratch) = PAIR.place(NAME)? else { return Ok(()) };
    let mut program = Program::shell_loop(&scratch)?;
    let (images, work) = (scratch.directory("images")?, scratch.directory("work")?);
    dump(&program, &images)?;
    let before = program.ended()?;
    let restore = memckpt(["restore", "-d", "-S", "-s", "--pidfile", "pid", "-W"]).arg(&work).arg("-D");
    restore.arg(&images).ok()?;
    ensure!(fs::read_to_string(work.join("pid"))? == program.pid.to_string(), "the pidfile is wrong");
    let stat = status::stat(program.pid)?;
    ensure!((stat.ppid, stat.state) == (std::process::id() as i32, 'T'), "{stat:?}");
    ensure!(program.lines()? == before, "it runs");
    let pid = nix::unistd::Pid::from_raw(program.pid);
    nix::sys::signal::killpg(pid, nix::sys::signal::Signal::SIGCONT)?;
    program.wait_for(before + 5)?;
    nix::sys::signal::killpg(pid, nix::sys::signal::Signal::SIGKILL)?;
    let ended = nix::sys::wait::waitpid(pid, None)?;
    ensure!(matches!(ended, nix::sys::wait::WaitStatus::Signaled(..)), "{ended:?}");
    Ok(())
}

/// Segments of System V, which the tree uses as before: by the attachments that it had, by their numbers, by a key. Their content is that of
/// the dump; while somebody else has them attached, nothing is restored.
#[test]
fn system_v_segments() -> Result<()> {
    const NAME: &str = "system_v_segments";
    let Some(scratch) = PAIR.place(NAME)? else { return Ok(()) };
    let mut program = Program::script("segments.py", &scratch, &[])?;
    let id = fs::read_to_string(program.output.with_file_name("output.segment"))?;
    let _segment = Segment(id.clone());
    // First what has a key is still there, then nothing is, then what is there belongs to somebody.
    for round in 1..=3 {
        let images = scratch.directory(&round.to_string())?;
        dump(&program, &images)?;
        let before = if round == 1 { program.ended()? } else { program.lines()? };
        let restore = || memckpt(["restore", "-d", "-D"]).arg(&images);
        if round == 2 {
            drop(Segment(id.clone()));
        }
        if round == 3 {
            let text = "import ctypes, sys, time\n\
                libc = ctypes.CDLL(None)\n\
                libc.shmat(int(sys.argv[1]), None, 0o10000)\n\
                print(flush=True)\n\
                time.sleep(1000)";
            let mut other = Command::new("/usr/bin/python3")
                .args(["-c", text, &id])
                .stdout(std::process::Stdio::piped())
                .spawn()?;
            other.stdout.take().context("no output")?.read_exact(&mut [0])?;
            let refused = restore().refused(&["System V segment", "is attached 1 times", "end them first"]);
            other.kill()?;
            other.wait()?;
            refused?;
        }
        restore().ok()?;
        program.wait_for(before + 10)?;
    }
    Ok(())
}

/// A segment of a victim's; removed on drop.
struct Segment(String);

impl Drop for Segment {
    fn drop(&mut self) {
        let _ = Command::new("ipcrm").args(["-m", &self.0]).status();
    }
}

/// What a parent and its children share of a mapping is shared after the restore, and what they have written is not: by its Pss in
/// smaps, of each process.
#[test]
fn copy_on_write_stays_copy_on_write() -> Result<()> {
    const NAME: &str = "copy_on_write_stays_copy_on_write";
    let Some(scratch) = PAIR.place(NAME)? else { return Ok(()) };
    let mut program = Program::script("sharing.py", &scratch, &[])?;
    let mut pids = vec![program.pid];
    for pid in fs::read_to_string(program.output.with_file_name("output.children"))?.split_whitespace() {
        pids.push(pid.parse()?);
    }
    let measure = || pids.iter().map(|pid| shared_part(*pid)).collect::<Result<Vec<_>>>();
    let at_first = measure()?;
    let images = scratch.directory("images")?;
    dump(&program, &images)?;
    let before = program.ended()?;
    memckpt(["restore", "-d", "-D"]).arg(&images).ok()?;
    program.wait_for(before + 3)?;
    let restored = measure()?;
    say(&format!("{NAME}: Pss {at_first:?} kB before, {restored:?} kB after"));
    for (before, after) in at_first.iter().zip(&restored) {
        ensure!(
            before.abs_diff(*after) * 100 <= *before,
            "Pss {at_first:?} kB before, {restored:?} kB after"
        );
    }
    Ok(())
}

/// The Pss of victim `sharing`'s mapping, in kB.
fn shared_part(pid: i32) -> Result<u64> {
    const SIZE: &str = "Size:              65536 kB";
    let smaps = fs::read_to_string(format!("/proc/{pid}/smaps"))?;
    let (_, rest) = smaps.split_once(SIZE).context("no mapping of 64 MiB")?;
    let line = rest.lines().find_map(|line| line.strip_prefix("Pss:")).context("no Pss")?;
    Ok(line.trim().trim_end_matches(" kB").parse()?)
}

/// The vDSO in the images is another kernel's, as of a process that was moved: its functions lead to this kernel's, which lies elsewhere.
#[test]
fn the_vdso_of_another_kernel() -> Result<()> {
    const NAME: &str = "the_vdso_of_another_kernel";
    let Some(scratch) = PAIR.place(NAME)? else { return Ok(()) };
    let mut program = Program::script("clocks.py", &scratch, &[])?;
    let (start, end) = vdso(program.pid)?;
    let mut page = vec![0; 4096];
    fs::File::open(format!("/proc/{}/mem", program.pid))?.read_exact_at(&mut page, start)?;
    let images = scratch.directory("1")?;
    dump(&program, &images)?;
    let before = program.ended()?;
    let pages = images.join("pages-1.img");
    let mut stored = fs::read(&pages)?;
    let at =
        stored.chunks(4096).position(|stored| stored == page).context("its vDSO is not in the images")?;
    // Padding of the ELF header, which means nothing.
    stored[at * 4096 + 15] ^= 1;
    fs::write(&pages, &stored)?;
    memckpt(["restore", "-d", "-D"]).arg(&images).refused(&["pages-1.img", "checksum", "--no-verify"])?;
    memckpt(["restore", "-d", "--no-verify", "-D"]).arg(&images).ok()?;
    program.wait_for(before + 10)?;
    let moved = vdso(program.pid)?;
    ensure!(moved.0 >= end || moved.1 <= start, "the vDSO is where the other one was");
    // As it is now it is dumped and restored like any other.
    let images = scratch.directory("2")?;
    dump(&program, &images)?;
    let before = program.lines()?;
    memckpt(["restore", "-d", "-D"]).arg(&images).ok()?;
    program.wait_for(before + 10)?;
    ensure!(vdso(program.pid)? == moved, "the vDSO has moved again");
    Ok(())
}

/// Where a process has its vDSO.
fn vdso(pid: i32) -> Result<(u64, u64)> {
    let maps = fs::read_to_string(format!("/proc/{pid}/maps"))?;
    let line = maps.lines().find(|line| line.ends_with("[vdso]")).context("no vDSO")?;
    let (start, end) = line.split(' ').next().and_then(|range| range.split_once('-')).context("no range")?;
    Ok((u64::from_str_radix(start, 16)?, u64::from_str_radix(end, 16)?))
}

/// pre-dump, pre-dump, dump: pages come from all three.
#[test]
fn a_chain() -> Result<()> {
    const NAME: &str = "a_chain";
    let Some(scratch) = PAIR.place(NAME)? else { return Ok(()) };
    let mut program = Program::victim("memory", &scratch)?;
    let pid = program.pid.to_string();
    for name in ["1", "2"] {
        let mut command = memckpt(["pre-dump", "-t", &pid, "-D"]).arg(scratch.directory(name)?);
        if name == "2" {
            command = command.args(&["--prev-images-dir", "../1", "--or-full"]);
        }
        command.ok()?;
        program.wait_for(program.lines()? + 2)?;
    }
    let last = scratch.directory("3")?;
    memckpt(["dump", "-t", &pid, "--prev-images-dir", "../2", "--or-full", "-D"]).arg(&last).ok()?;
    let before = program.ended()?;
    memckpt(["restore", "-d", "-D"]).arg(&last).ok()?;
    program.wait_for(before + 10)?;
    Ok(())
}

/// Of pages that the disk has lost, in whichever member of a chain, memckpt tells where they are, and makes nothing.
#[test]
fn pages_that_have_changed() -> Result<()> {
    const NAME: &str = "pages_that_have_changed";
    let Some(scratch) = PAIR.place(NAME)? else { return Ok(()) };
    let mut program = Program::victim("memory", &scratch)?;
    let pid = program.pid.to_string();
    let (first, last) = (scratch.directory("1")?, scratch.directory("2")?);
    memckpt(["pre-dump", "-t", &pid, "-D"]).arg(&first).ok()?;
    memckpt(["dump", "-t", &pid, "--prev-images-dir", "../1", "-D"]).arg(&last).ok()?;
    let before = program.ended()?;
    let changed = refused_when_changed(&[&first, &last], &last, &pid)?;
    ensure!(changed == 2, "two directories, {changed} files of pages");
    let sums = last.join("memckpt-checksums.json");
    let whole = fs::read(&sums)?;
    fs::remove_file(&sums)?;
    memckpt(["restore", "-d", "-D"]).arg(&last).refused(&["memckpt-checksums.json"])?;
    fs::write(&sums, &whole[..whole.len() / 2])?;
    memckpt(["restore", "-d", "-D"]).arg(&last).refused(&["memckpt-checksums.json is damaged"])?;
    fs::write(&sums, whole)?;
    memckpt(["restore", "-d", "-D"]).arg(&last).ok()?;
    program.wait_for(before + 10)
}

/// So it does of shared memory.
#[test]
fn shared_pages_that_have_changed() -> Result<()> {
    const NAME: &str = "shared_pages_that_have_changed";
    let Some(scratch) = PAIR.place(NAME)? else { return Ok(()) };
    let mut program = Program::script("segments.py", &scratch, &[])?;
    let _segment = Segment(fs::read_to_string(program.output.with_file_name("output.segment"))?);
    let images = scratch.directory("images")?;
    dump(&program, &images)?;
    program.ended()?;
    let changed = refused_when_changed(&[&images], &images, &program.pid.to_string())?;
    ensure!(changed == 4, "of two processes and two segments, {changed} files of pages");
    Ok(())
}

/// Changes all pages in each file of them in `directories`, one after the other, and has `last` be refused. How many files there were.
fn refused_when_changed(directories: &[&Path], last: &Path, pid: &str) -> Result<usize> {
    let mut changed = 0;
    for directory in directories {
        for entry in fs::read_dir(directory)? {
            let path = entry?.path();
            let name = path.file_name().and_then(|name| name.to_str()).context("a name")?.to_owned();
            if !name.starts_with("pages-") || path.metadata()?.len() == 0 {
                continue;
            }
            let whole = fs::read(&path)?;
            fs::write(&path, whole.iter().map(|byte| byte ^ 1).collect::<Vec<_>>())?;
            let within = directory.to_str().context("a path")?;
            memckpt(["restore", "-d", "-D"]).arg(last).refused(&[within, &name, "checksum"])?;
            ensure!(!Path::new("/proc").join(pid).exists(), "process {pid} is left");
            memckpt(["restore", "--dry-run", "--no-verify", "-D"]).arg(last).ok()?;
            fs::write(&path, whole)?;
            changed += 1;
        }
    }
    Ok(changed)
}

/// Without `-d` memckpt waits, and passes on how the root ends.
#[test]
fn its_end_is_told() -> Result<()> {
    const NAME: &str = "its_end_is_told";
    for (end, code) in [("exit 7", 7), ("kill -TERM $$", 128 + 15)] {
        let Some(scratch) = PAIR.place(NAME)? else { return Ok(()) };
        let go = scratch.path().join("go");
        let output = scratch.path().join("output");
        let text =
            format!("echo 1 ok > {}; until [ -e {} ]; do :; done; {end}", output.display(), go.display());
        let mut command = Command::new("/bin/sh");
        command.args(["-c", &text]);
        let mut program = Program::spawn(command, output)?;
        program.wait_for(1)?;
        let images = scratch.directory("images")?;
        dump(&program, &images)?;
        program.ended()?;
        fs::write(&go, "")?;
        let status =
            Command::new(memckpt_tests::command::binary()).args(["restore", "-D"]).arg(&images).status()?;
        ensure!(status.code() == Some(code), "{end}: {status}, signal {:?}", status.signal());
    }
    Ok(())
}

/// Killed while the tree is being made, once after each process of it, memckpt leaves none of them; or all, going on, should the kill
/// come too late.
#[test]
fn killed_it_leaves_nothing_or_everything() -> Result<()> {
    const NAME: &str = "killed_it_leaves_nothing_or_everything";
    let Some(scratch) = PAIR.place(NAME)? else { return Ok(()) };
    let mut program = Program::victim("ring", &scratch)?;
    let images = scratch.directory("images")?;
    dump(&program, &images)?;
    let before = program.ended()?;
    let written = fs::read(&program.output)?;
    let tree: serde_json::Value =
        serde_json::from_str(&memckpt(["show", "--json"]).arg(&images).ok()?.stdout)?;
    let pids: Vec<i64> = tree["processes"]
        .as_array()
        .context("no processes")?
        .iter()
        .filter_map(|p| p["pid"].as_i64())
        .collect();
    let states = || -> Vec<char> {
        let state = |pid: &i64| {
            let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
            stat.rsplit_once(") ")?.1.chars().next()
        };
        pids.iter().filter_map(state).collect()
    };
    let (mut nothing, mut everything) = (0, 0);
    for made in (1..pids.len()).step_by(if quick() { 4 } else { 1 }) {
        wait_until("the tree before is gone", || states().is_empty())?;
        fs::write(&program.output, &written)?;
        let mut restore = memckpt(["restore", "-d", "-D"]).arg(&images);
        let mut restore = restore.command().spawn()?;
        while states().len() < made && restore.try_wait()?.is_none() {}
        restore.kill()?;
        restore.wait()?;
        // What ends with memckpt is still there for a moment, and may be the whole tree: that has come back only if it goes on.
        let living = || states().iter().filter(|state| !matches!(state, 'Z' | 'X')).count();
        let goes_on = || program.lines().is_ok_and(|lines| lines >= before + 3);
        wait_until("all or nothing", || living() == 0 || goes_on())?;
        if living() > 0 {
            ensure!(living() == pids.len() - 2, "of {} processes {} live", pids.len() - 2, living());
            everything += 1;
            nix::sys::signal::killpg(
                nix::unistd::Pid::from_raw(program.pid),
                nix::sys::signal::Signal::SIGKILL,
            )?;
        } else {
            nothing += 1;
        }
    }
    say(&format!("{NAME}: {nothing} times nothing, {everything} times everything"));
    ensure!(nothing > everything, "hardly a kill came early enough to prove anything");
    Ok(())
}

fn wait_until(what: &str, done: impl Fn() -> bool) -> Result<()> {
    let deadline = Instant::now() + PATIENCE;
    while !done() {
        ensure!(Instant::now() < deadline, "not so: {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
    Ok(())
}
