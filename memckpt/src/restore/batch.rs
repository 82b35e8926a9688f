//! System calls for a task, made when there are as many as fit at once.

use crate::target::{Answers, Arg, Calls, Nth};

use super::arena::{CALL_MAX, DATA_LEN};
use super::error::RestoreError;
use super::task::Task;

/// Calls that wait to be made. All must succeed; what they return is checked only where it is said what it must be.
#[derive(Debug)]
pub(super) struct Batch<'a> {
    task: Task<'a>,
    calls: Calls,
    /// What calls must return.
    wanted: Vec<(Nth, i64)>,
}

impl<'a> Batch<'a> {
    pub(super) fn of(task: Task<'a>) -> Self {
        Self { task, calls: Calls::new(), wanted: Vec::new() }
    }

    /// Adds a call without buffers.
    pub(super) fn call<const N: usize>(
        &mut self,
        name: &'static str,
        number: i64,
        args: [u64; N],
    ) -> Result<(), RestoreError> {
        self.make_room(0)?;
        self.calls.call(name, number, args.map(Arg::from));
        Ok(())
    }

    /// Adds a call that must return `wanted`.
    pub(super) fn call_for<const N: usize>(
        &mut self,
        wanted: i64,
        name: &'static str,
        number: i64,
        args: [u64; N],
    ) -> Result<(), RestoreError> {
        self.make_room(0)?;
        let nth = self.calls.call(name, number, args.map(Arg::from));
        self.wanted.push((nth, wanted));
        Ok(())
    }

    /// Adds a call with a buffer that holds `bytes`; `args` gets its address.
    pub(super) fn call_with<const N: usize>(
        &mut self,
        name: &'static str,
        number: i64,
        bytes: &[u8],
        args: impl FnOnce(u64) -> [u64; N],
    ) -> Result<(), RestoreError> {
        self.make_room(bytes.len())?;
        let at = self.place(bytes);
        self.calls.call(name, number, args(at).map(Arg::from));
        Ok(())
    }

    /// Adds a call with two buffers: `inner`, and what `outer` makes of its address; `args` gets the addresses of both.
    pub(super) fn call_with_two<const N: usize>(
        &mut self,
        name: &'static str,
        number: i64,
        inner: &[u8],
        outer: impl FnOnce(u64) -> Vec<u8>,
        args: impl FnOnce(u64, u64) -> [u64; N],
    ) -> Result<(), RestoreError> {
        /// More than any `outer` is long.
        const OUTER: usize = 256;
        self.make_room(inner.len() + OUTER)?;
        let inner = self.place(inner);
        let outer = self.place(&outer(inner));
        self.calls.call(name, number, args(inner, outer).map(Arg::from));
        Ok(())
    }

    fn place(&mut self, bytes: &[u8]) -> u64 {
        self.task.address(self.calls.buffer(bytes))
    }

    fn make_room(&mut self, len: usize) -> Result<(), RestoreError> {
        if self.calls.count() >= CALL_MAX || self.calls.data().len() + len + 64 > DATA_LEN {
            self.flush()?;
        }
        Ok(())
    }

    /// Makes those that wait, and gives what the last of them returned.
    pub(super) fn last_result(&mut self) -> Result<i64, RestoreError> {
        let calls = std::mem::take(&mut self.calls);
        let answers = self.task.run(&calls)?;
        self.check(&answers)?;
        Ok(answers.last()?)
    }

    /// Makes those that wait.
    pub(super) fn flush(&mut self) -> Result<(), RestoreError> {
        if self.calls.count() == 0 {
            return Ok(());
        }
        let calls = std::mem::take(&mut self.calls);
        let answers = self.task.run(&calls)?;
        self.check(&answers)
    }

    /// Makes those that wait, the last of which is a clone3(2); gives the new task.
    pub(super) fn fork(&mut self) -> Result<Task<'a>, RestoreError> {
        let calls = std::mem::take(&mut self.calls);
        let (answers, child) = self.task.fork(&calls)?;
        self.check(&answers)?;
        Ok(child)
    }

    fn check(&mut self, answers: &Answers) -> Result<(), RestoreError> {
        for (nth, wanted) in self.wanted.drain(..) {
            let got = answers.result(nth)?;
            if got != wanted {
                let what = format!("{} returned {got} instead of {wanted}", answers.name(nth));
                return Err(RestoreError::Task { tid: self.task.tid(), what });
            }
        }
        Ok(())
    }
}
