//! `cargo xtask vm`: a command in a QEMU guest that runs a stock Debian kernel and sees the host's files.
//!
//! No KVM: it is rarely to be had where tests run, and emulation boots in four seconds.

pub(crate) mod console;
mod cpio;
mod kernel;
mod modules;
mod vmlinux;

use std::fs;
use std::io::{BufRead as _, BufReader, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

pub(crate) use self::console::Verdict;
pub(crate) use self::kernel::Kernel;
use crate::packages;

/// What runs in the guest as PID 1.
const INIT: &str = include_str!("../../guest/init");

/// Where the guest finds the directory that it shares with us.
pub(crate) const GUEST_OUT: &str = "/memckpt-out";

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The kernel to boot.
    #[arg(short, long, value_enum, default_value = "6.12")]
    kernel: Kernel,
    /// Give up after this many seconds.
    #[arg(short, long, default_value_t = 300)]
    timeout: u64,
    /// The guest's memory.
    #[arg(short, long, default_value = "4G")]
    memory: String,
    /// What its clocks go by.
    #[arg(long, value_enum, default_value = "real")]
    time: Time,
    /// What to run, in the current directory; several words are quoted, one is a shell command line.
    #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true)]
    command: Vec<String>,
}

/// `cargo xtask vm`.
pub(crate) fn run(args: &Args) -> Result<ExitCode> {
    let command = match args.command.as_slice() {
        [line] => line.clone(),
        words => words.iter().map(|word| quote(word)).collect::<Vec<_>>().join(" "),
    };
    let here = std::env::current_dir().context("no current directory")?;
    let guest = Guest {
        kernel: args.kernel,
        memory: args.memory.clone(),
        time: args.time,
        timeout: Duration::from_secs(args.timeout),
        script: format!("cd {}\n{command}\n", quote(&here.to_string_lossy())),
        files: Vec::new(),
    };
    let mut out = std::io::stdout();
    let verdict = guest.run(&mut |line| {
        // Nobody left to read us: the guest goes on all the same.
        let _ = writeln!(out, "{line}");
    })?;
    eprintln!("memckpt-vm: {}: {}", args.kernel.series(), verdict.verdict);
    Ok(ExitCode::from(verdict.verdict.code()))
}

/// A word for a shell.
pub(crate) fn quote(word: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_./=:,+@%".contains(c);
    if !word.is_empty() && word.chars().all(plain) {
        word.to_owned()
    } else {
        format!("'{}'", word.replace('\'', r"'\''"))
    }
}

/// What a guest's clocks go by.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Time {
    /// The machine's: emulation is faster or slower from one moment to the next, by a fifth and more.
    Real,
    /// Instructions, of 2 ns each: what is measured depends on what the guest does only.
    Counted,
}

/// One boot of a guest.
#[derive(Debug)]
pub(crate) struct Guest {
    /// The kernel to boot.
    pub(crate) kernel: Kernel,
    /// The guest's memory, as QEMU writes it (`4G`).
    pub(crate) memory: String,
    /// What its clocks go by.
    pub(crate) time: Time,
    /// After this the guest is killed.
    pub(crate) timeout: Duration,
    /// A shell script.
    pub(crate) script: String,
    /// Files that the guest finds in [`GUEST_OUT`].
    pub(crate) files: Vec<(&'static str, Vec<u8>)>,
}

/// What became of a guest.
#[derive(Debug)]
pub(crate) struct Outcome {
    /// How it ended.
    pub(crate) verdict: Verdict,
    /// The directory that it saw as [`GUEST_OUT`]; removed when dropped.
    pub(crate) out: tempfile::TempDir,
}

impl Guest {
    /// Boots, hands every line of the console to `line`, waits for the end.
    ///
    /// # Errors
    ///
    /// When the guest cannot be started at all. What goes wrong after that is in the verdict.
    pub(crate) fn run(&self, line: &mut dyn FnMut(&str)) -> Result<Outcome> {
        packages::install(packages::VM)?;
        let image = self.kernel.fetch()?;
        let run = tempfile::Builder::new().prefix("memckpt-vm-").tempdir()?;
        let initrd = run.path().join("initrd");
        fs::write(&initrd, initramfs(&image)?)?;
        // Root in the guest maps to us: 9p's security_model=none.
        let out = tempfile::Builder::new().prefix("memckpt-vm-out-").tempdir()?;
        fs::write(out.path().join("cmd"), &self.script)?;
        for (name, content) in &self.files {
            fs::write(out.path().join(name), content)?;
        }

        let mut qemu =
            self.qemu(&image.vmlinux(), &initrd, out.path()).spawn().context("cannot start QEMU")?;
        let stdout = qemu.stdout.take().context("QEMU has no standard output")?;
        let (sender, lines) = mpsc::channel();
        let reader = std::thread::spawn(move || {
            for bytes in BufReader::new(stdout).split(b'\n').map_while(Result::ok) {
                let text = String::from_utf8_lossy(&bytes).trim_end_matches('\r').to_owned();
                if sender.send(text).is_err() {
                    break;
                }
            }
        });
        let deadline = Instant::now() + self.timeout;
        let mut complaint = None;
        let timed_out = loop {
            match lines.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
                Ok(text) => {
                    complaint = complaint.or_else(|| console::judge(&text));
                    if !text.ends_with("reboot: Power down") {
                        line(&text);
                    }
                }
                Err(RecvTimeoutError::Disconnected) => break false,
                Err(RecvTimeoutError::Timeout) => break true,
            }
        };
        if timed_out {
            qemu.kill().context("kill QEMU")?;
        }
        qemu.wait().context("wait for QEMU")?;
        drop(lines);
        let _ = reader.join();
        let code = fs::read_to_string(out.path().join("rc")).ok().and_then(|text| text.trim().parse().ok());
        let verdict = match (complaint, code) {
            (Some(complaint), _) => complaint,
            (None, Some(code)) => Verdict::Exited(code),
            (None, None) if timed_out => Verdict::TimedOut(self.timeout.as_secs()),
            (None, None) => Verdict::Died,
        };
        Ok(Outcome { verdict, out })
    }

    fn qemu(&self, vmlinux: &Path, initrd: &Path, out: &Path) -> Command {
        let share = |id: &str, path: &Path, extra: &str| {
            format!(
                "local,id={id},path={},security_model=none{extra}",
                path.display().to_string().replace(',', ",,")
            )
        };
        // However xtask ends, the guest ends with it.
        let mut qemu = Command::new("setpriv");
        qemu.args(["--pdeathsig", "KILL", "qemu-system-x86_64"])
            .args(["-machine", "q35", "-accel", "tcg,thread=single,tb-size=512", "-smp", "2"])
            .args(match self.time {
                Time::Real => &[][..],
                Time::Counted => &["-icount", "shift=1,sleep=off"],
            })
            // Emulated `rep movsb` is ten times slower than what the kernel uses without it.
            .args(["-cpu", "max,la57=off,erms=off,fsrm=off", "-m", &self.memory])
            .args(["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-monitor", "none", "-net", "none"])
            .args(["-serial", "stdio", "-kernel"])
            .arg(vmlinux)
            .arg("-initrd")
            .arg(initrd)
            .arg("-append")
            .arg(
                "console=ttyS0 quiet loglevel=3 panic=-1 nokaslr mitigations=off init_on_alloc=0 no_timer_check \
                 tsc=reliable watchdog_thresh=30",
            )
            .args(["-fsdev", &share("r", Path::new("/"), ",readonly=on,multidevs=remap")])
            .args(["-device", "virtio-9p-pci,fsdev=r,mount_tag=hostroot"])
            .args(["-fsdev", &share("o", out, "")])
            .args(["-device", "virtio-9p-pci,fsdev=o,mount_tag=hostout"])
            .stdin(Stdio::null())
            .stdout(Stdio::piped());
        qemu
    }
}

/// busybox, the init and the modules.
fn initramfs(image: &kernel::Image) -> Result<Vec<u8>> {
    let busybox = PathBuf::from("/bin/busybox");
    let mut archive = cpio::Archive::default();
    for directory in ["bin", "dev", "proc", "sys", "modules", "mnt", "mnt/ro", "mnt/rw", "mnt/root"] {
        archive.directory(directory);
    }
    archive.file(
        "bin/busybox",
        0o755,
        &fs::read(&busybox).with_context(|| format!("read {}", busybox.display()))?,
    );
    archive.symlink("bin/sh", "busybox");
    archive.file("init", 0o755, INIT.as_bytes());
    for (name, content) in image.modules()? {
        archive.file(&format!("modules/{name}"), 0o644, &content);
    }
    Ok(archive.finish())
}

#[cfg(test)]
mod tests {
    #[test]
    fn words_survive_a_shell() {
        assert_eq!(super::quote("target/debug/x-1"), "target/debug/x-1");
        assert_eq!(super::quote("it's $HOME"), r"'it'\''s $HOME'");
        assert_eq!(super::quote(""), "''");
    }
}
