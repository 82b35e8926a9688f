//! What memckpt refuses: by name and reason, before the target is touched.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use memckpt_tests::outward::{Outward, status_field};
use memckpt_tests::{Scratch, Victim, command, elf32, is_root, memckpt, skip};
use nix::sys::ptrace;
use nix::unistd::Pid;

/// A victim of little memory.
fn plain(scratch: &Scratch) -> Result<Victim> {
    Victim::start("memory", ["stacks".as_ref(), scratch.path().as_os_str()])
}

/// `dump` and `pre-dump` refuse `pid` with `words`; the images directory stays empty.
fn refuse(scratch: &Scratch, pid: i32, words: &[&str]) -> Result<()> {
    for kind in ["pre-dump", "dump"] {
        let images = scratch.directory(kind)?;
        let mut run = memckpt([kind, "-t", &pid.to_string(), "-D"]).arg(&images);
        if kind == "dump" {
            run = run.arg("--leave-running");
        }
        run.refused(words)?;
        ensure!(!images.join("inventory.img").exists(), "{kind} left an inventory");
    }
    Ok(())
}

/// As [`refuse`], and `victim` is as it was.
fn refuse_untouched(scratch: &Scratch, victim: &Victim, words: &[&str]) -> Result<()> {
    let before = Outward::of(victim.pid())?;
    refuse(scratch, victim.pid(), words)?;
    let after = Outward::of(victim.pid())?;
    ensure!(before == after, "the target was touched:\n{}", before.differences(&after));
    Ok(())
}

/// A victim that has `what`; `None` and a skip where the kernel refuses.
fn odd(test: &str, what: &str) -> Result<Option<Victim>> {
    let mut command = Command::new(memckpt_tests::victim::program("odd"));
    command.arg(what);
    let victim = Victim::spawn(command)?;
    let line = victim.line()?;
    if let Some(reason) = line.strip_prefix("cannot ") {
        skip(test, reason);
        return Ok(None);
    }
    ensure!(line == "ready", "odd {what} says: {line}");
    Ok(Some(victim))
}

#[test]
fn no_such_process() -> Result<()> {
    let scratch = Scratch::new()?;
    let mut child = Command::new("true").spawn()?;
    let pid = i32::try_from(child.id())?;
    child.wait()?;
    refuse(&scratch, pid, &["no such process", &pid.to_string()])
}

/// Where there may be no other thread: its stack would be larger than the address space, here.
#[test]
fn one_thread_too_many() -> Result<()> {
    let scratch = Scratch::new()?;
    let mut victim = plain(&scratch)?;
    let images = scratch.directory("images")?;
    let mut dump = memckpt(["dump", "--leave-running", "-t", &victim.pid().to_string(), "-D"]).arg(&images);
    let mut restore = memckpt(["restore", "-D"]).arg(&images);
    for run in [&mut dump, &mut restore] {
        run.command().env("RUST_MIN_STACK", (1_u64 << 46).to_string());
    }
    for run in [dump, restore] {
        run.refused(&["clone", "a limit", "ulimit -u", "pids.max"])?;
    }
    ensure!(victim.is_alive()? && fs::read_dir(&images)?.next().is_none(), "something was done");
    Ok(())
}

#[test]
fn kernel_thread() -> Result<()> {
    // PF_KTHREAD in the flags of /proc/PID/stat, the seventh field after the name's closing parenthesis.
    let is_kernel_thread = |pid: &i32| {
        std::fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|stat| {
            let flags = stat.rsplit(')').next().and_then(|rest| rest.split_ascii_whitespace().nth(6));
            flags.and_then(|flags| flags.parse::<u32>().ok()).is_some_and(|flags| flags & 0x0020_0000 != 0)
        })
    };
    let pids =
        std::fs::read_dir("/proc")?.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse::<i32>().ok());
    let Some(pid) = pids.into_iter().find(is_kernel_thread) else {
        skip("kernel_thread", "no kernel threads in this PID namespace");
        return Ok(());
    };
    refuse(&Scratch::new()?, pid, &["kernel thread"])
}

#[test]
fn zombie() -> Result<()> {
    let mut child = Command::new("true").spawn()?;
    let pid = i32::try_from(child.id())?;
    let path = format!("/proc/{pid}/status");
    while !std::fs::read_to_string(&path)?.contains("State:\tZ") {
        std::thread::yield_now();
    }
    let result = refuse(&Scratch::new()?, pid, &["zombie"]);
    child.wait()?;
    result
}

#[test]
fn already_traced() -> Result<()> {
    let scratch = Scratch::new()?;
    let victim = plain(&scratch)?;
    let pid = Pid::from_raw(victim.pid());
    ptrace::seize(pid, ptrace::Options::empty())?;
    refuse_untouched(&scratch, &victim, &["traced", &std::process::id().to_string()])
}

#[test]
fn its_ancestor() -> Result<()> {
    refuse(&Scratch::new()?, i32::try_from(std::process::id())?, &["ancestor"])
}

#[test]
fn itself() -> Result<()> {
    let scratch = Scratch::new()?;
    let images = scratch.directory("images")?;
    let output = Command::new("sh")
        .args(["-c", "exec \"$0\" dump --leave-running -t $$ -D \"$1\""])
        .arg(command::binary())
        .arg(&images)
        .stdin(Stdio::null())
        .output()?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.code().is_some_and(|code| code != 0), "not refused: {}", output.status);
    ensure!(said.to_lowercase().contains("itself"), "{said}");
    Ok(())
}

#[test]
fn a_32_bit_task() -> Result<()> {
    let scratch = Scratch::new()?;
    let program = scratch.path().join("i386");
    std::fs::write(&program, elf32::pausing())?;
    std::fs::set_permissions(&program, std::fs::Permissions::from_mode(0o755))?;
    let spawned = Command::new(&program).stdin(Stdio::null()).spawn();
    let mut child = match spawned {
        Ok(child) => child,
        Err(error) if error.raw_os_error() == Some(libc::ENOEXEC) => {
            skip("a_32_bit_task", "this kernel runs no 32-bit programs");
            return Ok(());
        }
        Err(error) => return Err(error).context("start the 32-bit program"),
    };
    let result = refuse(&scratch, i32::try_from(child.id())?, &["32-bit"]);
    child.kill()?;
    child.wait()?;
    result
}

#[test]
fn a_user_of_userfaultfd() -> Result<()> {
    let Some(victim) = odd("a_user_of_userfaultfd", "userfaultfd")? else { return Ok(()) };
    refuse_untouched(&Scratch::new()?, &victim, &["userfaultfd"])
}

#[test]
fn a_device_mapping() -> Result<()> {
    let Some(victim) = odd("a_device_mapping", "device")? else { return Ok(()) };
    refuse_untouched(&Scratch::new()?, &victim, &["device", "/dev/mem"])
}

#[test]
fn registered_io_uring_buffers() -> Result<()> {
    let Some(victim) = odd("registered_io_uring_buffers", "io-uring-buffers")? else { return Ok(()) };
    refuse_untouched(&Scratch::new()?, &victim, &["io_uring"])
}

#[test]
fn a_mapped_io_uring() -> Result<()> {
    let Some(victim) = odd("a_mapped_io_uring", "io-uring-ring")? else { return Ok(()) };
    refuse_untouched(&Scratch::new()?, &victim, &["io_uring"])
}

#[test]
fn observed_remap_file_pages() -> Result<()> {
    let scratch = Scratch::new()?;
    let Some(mut victim) = odd("observed_remap_file_pages", "remap")? else { return Ok(()) };
    let pid = victim.pid().to_string();
    memckpt(["watch", &pid, "--background"]).ok()?;
    let answer = victim.ask("remap")?;
    ensure!(answer == "done", "remap_file_pages: {answer}");
    let images = scratch.directory("refused")?;
    memckpt(["pre-dump", "-t", &pid, "-D"])
        .arg(&images)
        .refused(&["non-linear", "--allow-emulated-nonlinear"])?;
    let images = scratch.directory("allowed")?;
    memckpt(["pre-dump", "--allow-emulated-nonlinear", "-t", &pid, "-D"]).arg(&images).ok()?;
    memckpt(["watch", &pid, "--stop"]).ok()?;
    Ok(())
}

#[test]
fn a_second_watch() -> Result<()> {
    let scratch = Scratch::new()?;
    let victim = plain(&scratch)?;
    let pid = victim.pid().to_string();
    memckpt(["watch", &pid, "--background"]).ok()?;
    memckpt(["watch", &pid, "--background"]).refused(&["already", &pid])?;
    memckpt(["watch", &pid, "--stop"]).ok()?;
    // And after the first has ended, there is room for another.
    memckpt(["watch", &pid, "--background"]).ok()?;
    memckpt(["watch", &pid, "--stop"]).ok()?;
    Ok(())
}

/// `dump --leave-running` of a victim to `images` is refused.
fn refuse_images(victim: &Victim, images: &Path, more: &[&str], words: &[&str]) -> Result<()> {
    let before = Outward::of(victim.pid())?;
    memckpt(["dump", "--leave-running", "-t", &victim.pid().to_string(), "-D"])
        .arg(images)
        .args(more)
        .refused(words)?;
    let after = Outward::of(victim.pid())?;
    ensure!(before == after, "the target was touched:\n{}", before.differences(&after));
    Ok(())
}

#[test]
fn images_directory_missing() -> Result<()> {
    let scratch = Scratch::new()?;
    let victim = plain(&scratch)?;
    let images = scratch.path().join("missing");
    refuse_images(&victim, &images, &[], &["missing", "does not exist"])?;
    ensure!(!images.exists(), "it was created");
    Ok(())
}

#[test]
fn images_directory_is_no_directory() -> Result<()> {
    let scratch = Scratch::new()?;
    let victim = plain(&scratch)?;
    let images = scratch.path().join("file");
    std::fs::write(&images, "")?;
    refuse_images(&victim, &images, &[], &["not a directory"])
}

#[test]
fn images_directory_not_writable() -> Result<()> {
    let scratch = Scratch::new()?;
    let victim = plain(&scratch)?;
    let Some(mount) = Mount::tmpfs("images_directory_not_writable", &scratch, "ro,size=1m")? else {
        return Ok(());
    };
    refuse_images(&victim, &mount.path, &[], &["read-only"])
}

#[test]
fn images_directory_holds_a_checkpoint() -> Result<()> {
    let scratch = Scratch::new()?;
    let victim = plain(&scratch)?;
    let images = scratch.directory("images")?;
    let pid = victim.pid().to_string();
    memckpt(["dump", "--leave-running", "-t", &pid, "-D"]).arg(&images).ok()?;
    let before = contents(&images)?;
    refuse_images(&victim, &images, &[], &["already holds a checkpoint"])?;
    ensure!(contents(&images)? == before, "the checkpoint was changed");
    Ok(())
}

#[test]
fn images_directory_is_its_own_ancestor() -> Result<()> {
    let scratch = Scratch::new()?;
    let victim = plain(&scratch)?;
    let images = scratch.directory("images")?;
    refuse_images(&victim, &images, &["--track-mem", "--prev-images-dir", "."], &["ancestor"])?;
    refuse_images(&victim, &images, &["--track-mem", "--prev-images-dir", "../images"], &["ancestor"])
}

#[test]
fn parent_is_missing() -> Result<()> {
    let scratch = Scratch::new()?;
    let victim = plain(&scratch)?;
    let images = scratch.directory("images")?;
    refuse_images(&victim, &images, &["--track-mem", "--prev-images-dir", "../nowhere"], &["nowhere"])
}

#[test]
fn dump_that_would_end_what_cannot_be_brought_back() -> Result<()> {
    let scratch = Scratch::new()?;
    let (one, two) = (scratch.directory("1")?, scratch.directory("2")?);
    let Some(mut strict) = odd("dump_that_would_end_what_cannot_be_brought_back", "strict")? else {
        return Ok(());
    };
    let dump = |pid: i32| memckpt(["dump", "-t", &pid.to_string(), "-D"]);
    dump(strict.pid()).arg(&one).refused(&["cannot be asked", "seccomp", "--leave-running"])?;
    ensure!(strict.is_alive()?, "the victim was harmed");
    let mut victim = Victim::start("layout", [scratch.path()])?;
    ensure!(victim.ask("shmat")? == "ok" && victim.ask("shm-part")? == "ok");
    dump(victim.pid())
        .arg(&two)
        .refused(&["System V segment of which a part was unmapped", "--leave-running"])?;
    ensure!(victim.ask("shmdt")? == "ok");
    Ok(())
}

#[test]
fn too_few_rights() -> Result<()> {
    if !is_root() {
        skip("too_few_rights", "only root can become somebody else");
        return Ok(());
    }
    let scratch = Scratch::new()?;
    std::fs::set_permissions(scratch.path(), std::fs::Permissions::from_mode(0o755))?;
    let victim = plain(&scratch)?;
    // Where we were built may be closed to others.
    let program = scratch.path().join("memckpt");
    std::fs::copy(command::binary(), &program)?;
    std::fs::set_permissions(&program, std::fs::Permissions::from_mode(0o755))?;
    let images = scratch.directory("images")?;
    std::fs::set_permissions(&images, std::fs::Permissions::from_mode(0o777))?;
    let before = Outward::of(victim.pid())?;
    let mut run = Command::new(&program);
    run.args(["dump", "--leave-running", "-t", &victim.pid().to_string(), "-D"]).arg(&images);
    let output = run.uid(65534).gid(65534).current_dir("/").stdin(Stdio::null()).output()?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.code().is_some_and(|code| code != 0), "not refused: {}", output.status);
    ensure!(said.contains("CAP_SYS_PTRACE"), "no capability is named:\n{said}");
    ensure!(before == Outward::of(victim.pid())?, "the target was touched");
    Ok(())
}

/// The disk fills up in the middle: the target lives on, the parent is intact, the torn directory visibly incomplete.
#[test]
fn no_space() -> Result<()> {
    let scratch = Scratch::new()?;
    let Some(mount) = Mount::tmpfs("no_space", &scratch, "size=4m,mode=755")? else { return Ok(()) };
    let mut victim = Victim::start("memory", ["heap".as_ref(), scratch.path().as_os_str()])?;
    let pid = victim.pid().to_string();
    let parent = scratch.directory("parent")?;
    memckpt(["pre-dump", "-t", &pid, "-D"]).arg(&parent).ok()?;
    let whole = contents(&parent)?;
    victim.ask("dirty 5 4000")?;
    let sum = victim.ask("sum")?;
    let torn = mount.path.join("torn");
    std::fs::create_dir(&torn)?;
    memckpt(["pre-dump", "-t", &pid, "-D"])
        .arg(&torn)
        .args(&["--prev-images-dir", "../../parent"])
        .refused(&["no space left on device"])?;
    ensure!(victim.ask("sum")? == sum, "the victim has changed");
    ensure!(contents(&parent)? == whole, "the parent has changed");
    ensure!(!torn.join("inventory.img").exists(), "the torn checkpoint has an inventory");
    memckpt(["show"]).arg(&torn).refused(&["no complete checkpoint"])?;
    let status = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
    ensure!(status_field(&status, "TracerPid") == Some("0"), "still traced");
    Ok(())
}

/// Whichever image cannot be written, a dump that would have ended the target leaves it alive.
#[test]
fn no_space_for_a_dump_that_ends_the_target() -> Result<()> {
    /// A full dump of one process has some twenty images.
    const MOST: u32 = 100;
    let scratch = Scratch::new()?;
    let mut victim = Victim::start("memory", ["heap".as_ref(), scratch.path().as_os_str()])?;
    let sum = victim.ask("sum")?;
    for files in 4..MOST {
        // The directory is a file, too.
        let options = format!("nr_inodes={files},mode=755");
        let test = "no_space_for_a_dump_that_ends_the_target";
        let Some(mount) = Mount::tmpfs(test, &scratch, &options)? else { return Ok(()) };
        let ran = memckpt(["dump", "-t", &victim.pid().to_string(), "-D"]).arg(&mount.path).run()?;
        if ran.code == Some(0) {
            ensure!(files > 10, "succeeded with {files} files");
            ensure!(!victim.is_alive()?, "the victim was to be ended");
            return Ok(());
        }
        let said = ran.stderr.to_lowercase();
        ensure!(said.contains("no space left on device"), "with {files} files ({:?}):\n{said}", ran.code);
        ensure!(!mount.path.join("inventory.img").exists(), "the torn checkpoint has an inventory");
        ensure!(victim.is_alive()? && victim.ask("sum")? == sum, "the victim was harmed with {files} files");
    }
    anyhow::bail!("no dump succeeded")
}

/// The names, sizes and modification times in a directory.
fn contents(directory: &Path) -> Result<Vec<(PathBuf, u64, std::time::SystemTime)>> {
    let mut files = Vec::new();
    for entry in std::fs::read_dir(directory)? {
        let entry = entry?;
        let metadata = entry.path().symlink_metadata()?;
        files.push((entry.path(), metadata.len(), metadata.modified()?));
    }
    files.sort();
    Ok(files)
}

/// A mounted file system, unmounted when dropped.
struct Mount {
    path: PathBuf,
}

impl Mount {
    fn tmpfs(test: &str, scratch: &Scratch, options: &str) -> Result<Option<Self>> {
        if !is_root() {
            skip(test, "only root can mount a file system");
            return Ok(None);
        }
        let path = scratch.directory("mount")?;
        let output =
            Command::new("mount").args(["-t", "tmpfs", "-o", options, "memckpt-test"]).arg(&path).output()?;
        ensure!(output.status.success(), "mount: {}", String::from_utf8_lossy(&output.stderr));
        Ok(Some(Self { path }))
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.path).status();
        let _ = std::fs::remove_dir(&self.path);
    }
}
