//! What memckpt dumped, memckpt restores: the programs go on, and say themselves whether all is right.

use std::fs;
use std::os::unix::fs::{FileExt as _, PermissionsExt as _};
use std::os::unix::process::ExitStatusExt as _;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
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
    let mut changed = 0;
    for directory in [&first, &last] {
        for entry in fs::read_dir(directory)? {
            let path = entry?.path();
            let name = path.file_name().and_then(|name| name.to_str()).context("a name")?.to_owned();
            let whole = fs::read(&path)?;
            if !name.starts_with("pages-") || whole.is_empty() {
                continue;
            }
            fs::write(&path, whole.iter().map(|byte| byte ^ 1).collect::<Vec<_>>())?;
            let within = path.parent().and_then(Path::to_str).context("a path")?;
            memckpt(["restore", "-d", "-D"]).arg(&last).refused(&[within, &name, "checksum"])?;
            ensure!(!Path::new("/proc").join(&pid).exists(), "process {pid} is left");
            memckpt(["restore", "--dry-run", "--no-verify", "-D"]).arg(&last).ok()?;
            fs::write(&path, whole)?;
            changed += 1;
        }
    }
    ensure!(changed >= 3, "of process, shared memory and parent only {changed} were there");
    let sums = last.join("memckpt-checksums.json");
    let whole = fs::read(&sums)?;
    fs::remove_file(&sums)?;
    memckpt(["restore", "-d", "-D"]).arg(&last).refused(&["memckpt-checksums.json"])?;
    fs::write(&sums, &whole[..whole.len() / 2])?;
    memckpt(["restore", "-d", "-D"]).arg(&last).refused(&["memckpt-checksums.json is damaged"])?;
    fs::write(&sums, whole)?;
    memckpt(["restore", "-d", "-D"]).arg(&last).ok()?;
    program.wait_for(before + 10)?;
    say(&format!("{NAME}: found in {changed} files of pages"));
    Ok(())
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

/// Its process ID belongs to somebody; an image is cut off; a file has another length. Each is named, and no process is left.
#[test]
fn what_cannot_be_is_named_and_nothing_is_left() -> Result<()> {
    const NAME: &str = "what_cannot_be_is_named_and_nothing_is_left";
    let Some(scratch) = PAIR.place(NAME)? else { return Ok(()) };
    let file = scratch.path().join("file");
    fs::write(&file, "0123456789")?;
    let output = scratch.path().join("output");
    let text =
        format!("exec 5< {}; echo 1 ok > {}; sleep 1000 & sleep 1000", file.display(), output.display());
    let mut command = Command::new("/bin/sh");
    command.args(["-c", &text]);
    let mut program = Program::spawn(command, output)?;
    program.wait_for(1)?;
    let images = scratch.directory("images")?;
    memckpt(["dump", "--leave-running", "-t", &program.pid.to_string(), "-D"]).arg(&images).ok()?;
    let restore = || memckpt(["restore", "-d", "-D"]).arg(&images);
    let pid = program.pid.to_string();
    restore().refused(&[&pid, "needs its ID", "sh"])?;

    nix::sys::signal::killpg(nix::unistd::Pid::from_raw(program.pid), nix::sys::signal::Signal::SIGKILL)?;
    program.ended()?;
    fs::write(&file, "0123")?;
    restore().refused(&["file", "4 bytes now and had 10"])?;
    fs::write(&file, "0123456789")?;
    let core = images.join(format!("core-{pid}.img"));
    let whole = fs::read(&core)?;
    fs::write(&core, &whole[..whole.len() / 2])?;
    restore().refused(&["core-", "cut off"])?;
    fs::write(&core, &whole)?;
    let pages = images.join("pages-1.img");
    let whole = fs::read(&pages)?;
    fs::write(&pages, &whole[..whole.len() / 2])?;
    restore().refused(&["pages-1.img", "bytes where the pagemap counts"])?;
    ensure!(!Path::new(&format!("/proc/{pid}")).exists(), "process {pid} is left");
    fs::write(&pages, &whole)?;
    restore().ok()?;
    ensure!(Path::new(&format!("/proc/{pid}")).exists(), "whole, it is restored");
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
        // What ends with memckpt ends at once, but is told to its parents one after the other.
        wait_until("all or nothing", || {
            let living = states().iter().filter(|state| !matches!(state, 'Z' | 'X')).count();
            living == 0 || living == pids.len() - 2
        })?;
        let living = states().iter().any(|state| !matches!(state, 'Z' | 'X'));
        if living {
            everything += 1;
            program.wait_for(before + 3)?;
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
