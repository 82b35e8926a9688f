//! `pstree.img`: the processes and their threads.

use super::magic::ImageKind;
use super::proto::PstreeEntry;
use super::record::Image;

/// A process and its threads.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Process {
    /// PID, as the process itself sees it.
    pub pid: i32,
    /// Its parent in the tree; 0 for the root.
    pub ppid: i32,
    /// Process group.
    pub pgid: i32,
    /// Session.
    pub sid: i32,
    /// Its threads, the leader first.
    pub threads: Vec<i32>,
}

/// The content of `pstree.img`: parents come before their children, the root first.
#[must_use]
pub fn encode(processes: &[Process]) -> Vec<u8> {
    // Process IDs are positive; 0 stands for a group or session outside the PID namespace.
    let id = |id: i32| u32::try_from(id).unwrap_or(0);
    let entry = |process: &Process| PstreeEntry {
        pid: id(process.pid),
        ppid: id(process.ppid),
        pgid: id(process.pgid),
        sid: id(process.sid),
        threads: process.threads.iter().map(|&tid| id(tid)).collect(),
    };
    processes
        .iter()
        .fold(Image::new(ImageKind::Pstree), |image, process| image.with(&entry(process)))
        .into_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Byte for byte: 19 bytes of magic, length and fields.
    #[test]
    fn the_bytes_are_those_of_the_format() {
        let process = Process { pid: 300, ppid: 0, pgid: 300, sid: 1, threads: vec![300, 301] };
        let body = [0x08, 0xac, 2, 0x10, 0, 0x18, 0xac, 2, 0x20, 1, 0x28, 0xac, 2, 0x28, 0xad, 2];
        let mut want = vec![0x19, 0x43, 0x56, 0x54, 0x30, 0x30, 0x27, 0x50, body.len() as u8, 0, 0, 0];
        want.extend_from_slice(&body);
        assert_eq!(encode(&[process]), want);
    }
}
