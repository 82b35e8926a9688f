//! What a restore refuses: it names that, and leaves nothing behind.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::process::Command;

use anyhow::{Result, ensure};
use memckpt::kernel::status;
use memckpt_tests::memckpt;
use memckpt_tests::pair::{Pair, Tool, Wants};
use memckpt_tests::program::Program;

const PAIR: Pair = Pair { dumper: Tool::Memckpt, restorer: Tool::Memckpt };

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

    let children = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children"))?;
    nix::sys::signal::killpg(nix::unistd::Pid::from_raw(program.pid), nix::sys::signal::Signal::SIGKILL)?;
    program.ended()?;
    // Nobody waits for these, but they have to die.
    for child in children.split_whitespace().map(str::parse) {
        let child = child?;
        while status::stat(child).is_ok_and(|stat| stat.state != 'Z') {
            std::thread::yield_now();
        }
    }
    fs::write(&file, "0123")?;
    restore().refused(&["file", "4 bytes now and had 10"])?;
    fs::remove_file(&file)?;
    restore().refused(&["file", &pid])?;
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

/// Somebody else listens at a port, and a user who may not restore tries to.
#[test]
fn a_port_that_is_taken_and_rights_that_are_missing() -> Result<()> {
    const NAME: &str = "a_port_that_is_taken_and_rights_that_are_missing";
    let Some(scratch) = PAIR.place(NAME)? else { return Ok(()) };
    let output = scratch.path().join("output");
    let text = "import itertools, os, socket, sys, time\n\
        server = socket.create_server(('127.0.0.1', 0))\n\
        open(sys.argv[1] + '.port', 'w').write(str(server.getsockname()[1]))\n\
        out = os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT | os.O_APPEND)\n\
        for number in itertools.count(1):\n \
            os.write(out, b'%d ok\\n' % number)\n \
            time.sleep(0.02)";
    let mut command = Command::new("/usr/bin/python3");
    command.args(["-c", text]).arg(&output);
    let mut program = Program::start(command, output)?;
    let port: u16 = fs::read_to_string(scratch.path().join("output.port"))?.parse()?;
    let images = scratch.directory("images")?;
    PAIR.dump(program.pid, &images, &Wants::default())?;
    let before = program.ended()?;
    let restore = || memckpt(["restore", "-d", "-D"]).arg(&images);
    let taken = std::net::TcpListener::bind(("127.0.0.1", port))?;
    restore().refused(&[&port.to_string(), "in use", "end its user first"])?;
    drop(taken);

    // Where we were built may be closed to others.
    let binary = scratch.path().join("memckpt");
    fs::copy(memckpt_tests::command::binary(), &binary)?;
    for (path, mode) in [(scratch.path(), 0o755), (&binary, 0o755), (&images, 0o755)] {
        fs::set_permissions(path, fs::Permissions::from_mode(mode))?;
    }
    for image in fs::read_dir(&images)? {
        fs::set_permissions(image?.path(), fs::Permissions::from_mode(0o644))?;
    }
    let mut command = Command::new("/usr/bin/setpriv");
    command.args(["--reuid", "65534", "--regid", "65534", "--clear-groups"]).arg(&binary);
    let ran = command.args(["restore", "-d", "-D"]).arg(&images).current_dir("/").output()?;
    let said = String::from_utf8_lossy(&ran.stderr);
    ensure!(!ran.status.success() && said.contains("CAP_CHECKPOINT_RESTORE"), "{}: {said}", ran.status);
    ensure!(!Path::new(&format!("/proc/{}", program.pid)).exists(), "a process is left");
    restore().ok()?;
    program.wait_for(before + 5)
}
