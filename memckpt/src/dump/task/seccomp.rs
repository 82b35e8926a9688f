//! seccomp: the mode of each thread, and the filters of all, each stored once.

use crate::dump::error::DumpError;
use crate::image::proto::{SeccompEntry, SeccompFilter, SeccompMode};
use crate::kernel::{ptrace, status};

/// The filters of a tree. A filter stands on the one that was installed before it.
#[derive(Debug, Default)]
pub(in crate::dump) struct Filters(SeccompEntry);

impl Filters {
    /// The mode of a stopped thread, and the number of its newest filter.
    pub(super) fn of(&mut self, tid: i32) -> Result<(SeccompMode, Option<u32>), DumpError> {
        match status::status(tid)?.seccomp {
            0 => Ok((SeccompMode::Disabled, None)),
            1 => Ok((SeccompMode::Strict, None)),
            _ => {
                let mut filters = Vec::new();
                while let Some(filter) = ptrace::seccomp_filter(tid, filters.len())? {
                    filters.push(filter.iter().flat_map(encode).collect::<Vec<u8>>());
                }
                // The newest comes first.
                let newest =
                    filters.into_iter().rev().fold(None, |before, filter| Some(self.number(filter, before)));
                Ok((SeccompMode::Filter, newest))
            }
        }
    }

    /// What goes into `seccomp.img`, if there are any.
    pub(in crate::dump) fn entry(&self) -> Option<&SeccompEntry> {
        (!self.0.seccomp_filters.is_empty()).then_some(&self.0)
    }

    fn number(&mut self, filter: Vec<u8>, prev: Option<u32>) -> u32 {
        let filters = &mut self.0.seccomp_filters;
        let same = |known: &SeccompFilter| known.filter == filter && known.prev == prev;
        match filters.iter().position(same) {
            Some(at) => at as u32,
            None => {
                filters.push(SeccompFilter { filter, prev, flags: None });
                filters.len() as u32 - 1
            }
        }
    }
}

/// struct sock_filter as the kernel lays it out.
fn encode(step: &libc::sock_filter) -> [u8; 8] {
    let [a, b] = step.code.to_ne_bytes();
    let [c, d, e, f] = step.k.to_ne_bytes();
    [a, b, step.jt, step.jf, c, d, e, f]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_filter_is_the_same_only_on_the_same_ground() {
        let mut filters = Filters::default();
        let first = filters.number(vec![1], None);
        let second = filters.number(vec![2], Some(first));
        assert_eq!((first, second), (0, 1));
        assert_eq!(filters.number(vec![2], Some(first)), second);
        assert_eq!(filters.number(vec![2], None), 2);
        let step = libc::sock_filter { code: 0x06, jt: 1, jf: 2, k: 0x7fff_0000 };
        assert_eq!(encode(&step), [6, 0, 1, 2, 0, 0, 0xff, 0x7f]);
    }
}
