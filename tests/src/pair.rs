//! Who dumps a program, and who restores it: memckpt or Debian's criu.

use std::path::Path;

use anyhow::Result;

use crate::{Scratch, criu, in_guest, is_root, memckpt};

/// A checkpointer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tool {
    /// Ours.
    Memckpt,
    /// Debian's criu.
    Criu,
}

/// Who dumps, and who restores.
#[derive(Clone, Copy, Debug)]
pub struct Pair {
    /// Dumps.
    pub dumper: Tool,
    /// Restores.
    pub restorer: Tool,
}

/// What both have to be told of a program.
#[derive(Clone, Debug, Default)]
pub struct Wants {
    /// It has TCP connections.
    pub connections: bool,
    /// It has locked files.
    pub locks: bool,
    /// It is connected to the socket for datagrams with this inode, which is somebody else's.
    pub outer_socket: Option<u64>,
    /// One of its pipes, with this inode, leads to us; we have this descriptor of it, which who restores inherits.
    pub outer_pipe: Option<(u64, i32)>,
}

impl Pair {
    /// Why the two cannot run here, if so.
    ///
    /// # Errors
    ///
    /// When there is no criu.
    pub fn missing(self) -> Result<Option<String>> {
        if self.dumper == Tool::Criu || self.restorer == Tool::Criu {
            return criu::missing();
        }
        Ok((!is_root()).then(|| "not root".to_owned()))
    }

    /// How many times a program goes on after another: each is dumped as the last one was restored. Guests are slow: there once as it
    /// was started and once as it was restored.
    #[must_use]
    pub fn rounds(self) -> usize {
        match (self.dumper, self.restorer) {
            _ if in_guest() => 2,
            (Tool::Memckpt, Tool::Memckpt) => 5,
            _ => 3,
        }
    }

    /// Dumps and ends process `pid`.
    ///
    /// # Errors
    ///
    /// When that fails.
    pub fn dump(self, pid: i32, images: &Path, wants: &Wants) -> Result<()> {
        let mut args = vec!["-t".to_owned(), pid.to_string()];
        args.extend(wants.flags());
        match self.dumper {
            Tool::Memckpt => {
                if let Some(inode) = wants.outer_socket {
                    args.extend(["--external".to_owned(), format!("unix[{inode}]")]);
                }
                if let Some((inode, _)) = wants.outer_pipe {
                    args.extend(["--external".to_owned(), format!("pipe:[{inode}]")]);
                }
                // What that criu cannot read is left out, or named.
                if self.restorer == Tool::Criu && (wants.connections || wants.locks) {
                    args.extend(["--criu-version", "3.17"].map(str::to_owned));
                }
                memckpt(["dump", "-D"]).arg(images).args(&args).ok()?;
            }
            Tool::Criu => {
                if wants.outer_socket.is_some() {
                    args.push("--ext-unix-sk".to_owned());
                }
                if wants.connections {
                    // There need be no iptables.
                    args.extend(["--network-lock", "nftables"].map(str::to_owned));
                }
                criu::run("dump", images, &args)?;
            }
        }
        Ok(())
    }

    /// Restores what is in `images`.
    ///
    /// # Errors
    ///
    /// When that fails.
    pub fn restore(self, images: &Path, wants: &Wants) -> Result<()> {
        let mut args = vec!["-d".to_owned()];
        if let Some((inode, fd)) = wants.outer_pipe {
            args.extend(["--inherit-fd".to_owned(), format!("fd[{fd}]:pipe:[{inode}]")]);
        }
        match self.restorer {
            Tool::Memckpt => {
                if wants.connections {
                    args.push("--tcp-established".to_owned());
                }
                if let Some(inode) = wants.outer_socket {
                    args.extend(["--external".to_owned(), format!("unix[{inode}]")]);
                }
                memckpt(["restore", "-D"]).arg(images).args(&args).ok()?;
            }
            Tool::Criu => {
                args.extend(wants.flags());
                if wants.outer_socket.is_some() {
                    args.push("--ext-unix-sk".to_owned());
                }
                criu::run("restore", images, &args)?;
            }
        }
        Ok(())
    }

    /// The commands that dump, in place of whose `@` comes the PID, `--`, and restore the job of a shell.
    ///
    /// # Errors
    ///
    /// When a path is no text.
    pub fn shell_job(self, images: &Path) -> Result<Vec<String>> {
        use anyhow::Context as _;
        let ours = crate::command::binary();
        let ours = ours.to_str().context("a path that is no text")?;
        let images = images.to_str().context("a path that is no text")?;
        let program = |tool| if tool == Tool::Criu { "criu" } else { ours };
        let mut words = vec![program(self.dumper), "dump", "--shell-job", "-t", "@", "-D", images, "--"];
        words.extend([program(self.restorer), "restore", "--shell-job", "-D", images]);
        if self.restorer == Tool::Criu {
            words.extend(["-v4", "-o", "restore.log"]);
        }
        Ok(words.into_iter().map(str::to_owned).collect())
    }

    /// Why the pair cannot be tried, and otherwise a place to try it in.
    ///
    /// # Errors
    ///
    /// When there is no criu, or no place.
    pub fn place(self, test: &str) -> Result<Option<Scratch>> {
        if let Some(reason) = self.missing()? {
            crate::skip(test, &reason);
            return Ok(None);
        }
        Scratch::new().map(Some)
    }
}

impl Wants {
    /// What the two call alike.
    fn flags(&self) -> Vec<String> {
        let flags = [(self.connections, "--tcp-established"), (self.locks, "--file-locks")];
        flags.iter().filter(|(wanted, _)| *wanted).map(|(_, flag)| (*flag).to_owned()).collect()
    }
}
