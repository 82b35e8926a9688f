//! Control groups: who is in one, and whether it is frozen. Version 2 (Documentation/admin-guide/cgroup-v2.rst) and the freezer
//! of version 1 (Documentation/admin-guide/cgroup-v1/freezer-subsystem.rst).

use std::io;
use std::path::{Path, PathBuf};

use super::SyscallError;

/// A directory of a cgroup file system.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cgroup {
    directory: PathBuf,
    freezer: Freezer,
}

/// Where its state is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Freezer {
    /// `cgroup.freeze` and `cgroup.events`, Linux 5.2.
    V2,
    /// `freezer.state`
    V1,
}

impl Cgroup {
    /// The cgroup at `directory`.
    ///
    /// # Errors
    /// There is none that could be frozen.
    pub fn open(directory: &Path) -> Result<Self, SyscallError> {
        let has = |name| directory.join(name).exists();
        let freezer = if has("freezer.state") {
            Freezer::V1
        } else if has("cgroup.events") && has("cgroup.freeze") {
            Freezer::V2
        } else {
            let error = io::Error::new(io::ErrorKind::NotFound, "no cgroup with a freezer");
            return Err(SyscallError::new("open", directory.display().to_string(), error));
        };
        Ok(Self { directory: directory.to_owned(), freezer })
    }

    /// Where it is.
    #[must_use]
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// Whether somebody has frozen it, or one above it, or is about to.
    ///
    /// # Errors
    /// It is gone.
    pub fn is_frozen(&self) -> Result<bool, SyscallError> {
        Ok(match self.freezer {
            // What is asked for, and what has come of it: it takes until the last process stands.
            Freezer::V2 => {
                read(&self.directory.join("cgroup.freeze"))?.trim() == "1"
                    || read(&self.directory.join("cgroup.events"))?.lines().any(|l| l == "frozen 1")
            }
            Freezer::V1 => read(&self.directory.join("freezer.state"))?.trim() != "THAWED",
        })
    }

    /// The processes in it and in those below it, without any that have ended.
    ///
    /// # Errors
    /// It is gone.
    pub fn processes(&self) -> Result<Vec<i32>, SyscallError> {
        let mut processes = Vec::new();
        collect(&self.directory, &mut processes)?;
        Ok(processes)
    }
}

fn collect(directory: &Path, processes: &mut Vec<i32>) -> Result<(), SyscallError> {
    let text = read(&directory.join("cgroup.procs"))?;
    processes.extend(text.lines().filter_map(|line| line.parse::<i32>().ok()));
    let failed = |e| SyscallError::new("getdents64", directory.display().to_string(), e);
    for entry in std::fs::read_dir(directory).map_err(failed)? {
        let entry = entry.map_err(failed)?;
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            collect(&entry.path(), processes)?;
        }
    }
    Ok(())
}

fn read(path: &Path) -> Result<String, SyscallError> {
    std::fs::read_to_string(path).map_err(|e| SyscallError::new("read", path.display().to_string(), e))
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn files(directory: &Path, files: &[(&str, &str)]) {
        fs::create_dir_all(directory).unwrap();
        for (name, content) in files {
            fs::write(directory.join(name), content).unwrap();
        }
    }

    #[test]
    fn both_versions_are_read() {
        let scratch = tempfile::tempdir().unwrap();
        let (v1, v2) = (scratch.path().join("1"), scratch.path().join("2"));
        files(&v1, &[("freezer.state", "THAWED\n"), ("cgroup.procs", "5\n")]);
        files(
            &v2,
            &[("cgroup.events", "populated 1\nfrozen 0\n"), ("cgroup.freeze", "0\n"), ("cgroup.procs", "")],
        );
        files(&v2.join("below"), &[("cgroup.procs", "7\n8\n")]);
        let (first, second) = (Cgroup::open(&v1).unwrap(), Cgroup::open(&v2).unwrap());
        assert_eq!((first.is_frozen().unwrap(), first.processes().unwrap()), (false, vec![5]));
        assert_eq!((second.is_frozen().unwrap(), second.processes().unwrap()), (false, vec![7, 8]));
        files(&v1, &[("freezer.state", "FREEZING\n")]);
        files(&v2, &[("cgroup.events", "populated 1\nfrozen 1\n")]);
        assert!(first.is_frozen().unwrap() && second.is_frozen().unwrap());
        files(&v2, &[("cgroup.events", "populated 1\nfrozen 0\n"), ("cgroup.freeze", "1\n")]);
        assert!(second.is_frozen().unwrap());
        assert!(Cgroup::open(scratch.path()).unwrap_err().to_string().contains("no cgroup with a freezer"));
    }
}
