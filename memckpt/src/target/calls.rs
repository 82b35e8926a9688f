//! System calls that the target makes for us, to say what nothing else tells: a batch of them in one command.

use std::io;
use std::sync::atomic::{Ordering, compiler_fence};

use super::blob::{CALL_MAX, CALLS, Call, DATA, DATA_LEN, UNDO, UNDO_DATA, UNDO_DATA_LEN, UNDO_MAX, op};
use super::commit::Host;
use super::infected::{CommandError, Infected};
use super::seccomp;
use crate::kernel::SyscallError;

/// A list of system calls, and the memory that they read and write.
#[derive(Debug, Default)]
pub struct Calls {
    calls: Vec<Planned>,
    data: Vec<u8>,
}

#[derive(Debug)]
struct Planned {
    name: &'static str,
    number: i64,
    args: [Arg; 6],
}

/// An argument of a call.
#[derive(Clone, Copy, Debug)]
pub enum Arg {
    /// A number, or an address that the target knows.
    Value(u64),
    /// The address of a buffer.
    Buffer(Buffer),
}

/// A part of the calls' memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Buffer {
    offset: usize,
    len: usize,
}

impl Buffer {
    /// Where it begins among the buffers of its list.
    pub(crate) const fn offset(self) -> usize {
        self.offset
    }
}

/// Which call of a list.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Nth(usize);

/// What came of the calls.
#[derive(Debug)]
pub struct Answers {
    results: Vec<(&'static str, Option<i64>)>,
    data: Vec<u8>,
    pid: i32,
}

impl From<u64> for Arg {
    fn from(value: u64) -> Self {
        Self::Value(value)
    }
}

impl From<Buffer> for Arg {
    fn from(buffer: Buffer) -> Self {
        Self::Buffer(buffer)
    }
}

impl Calls {
    /// An empty list.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// A buffer that holds `bytes`.
    pub fn buffer(&mut self, bytes: &[u8]) -> Buffer {
        let offset = self.data.len().next_multiple_of(16);
        self.data.resize(offset, 0);
        self.data.extend_from_slice(bytes);
        Buffer { offset, len: bytes.len() }
    }

    /// A buffer of `len` zeroes.
    pub fn zeroes(&mut self, len: usize) -> Buffer {
        self.buffer(&vec![0; len])
    }

    /// Adds a call. Missing arguments are 0.
    pub fn call<const N: usize>(&mut self, name: &'static str, number: i64, args: [Arg; N]) -> Nth {
        let mut all = [Arg::Value(0); 6];
        all.iter_mut().zip(args).for_each(|(to, arg)| *to = arg);
        self.calls.push(Planned { name, number, args: all });
        Nth(self.calls.len() - 1)
    }

    /// Adds setsockopt(2) of an int, which is in `value`.
    pub fn set_socket_option(&mut self, fd: i32, level: i32, name: i32, value: Buffer) -> Nth {
        let [fd, level, name] = [fd, level, name].map(|n| Arg::from(n as u64));
        let len = Arg::from(value.len as u64);
        self.call("setsockopt", libc::SYS_setsockopt, [fd, level, name, value.into(), len])
    }

    /// Refuses what is more than `calls` calls, or than `bytes` bytes of buffers.
    pub(crate) fn fit(
        &self,
        whose: impl Into<String>,
        calls: usize,
        bytes: usize,
    ) -> Result<(), SyscallError> {
        if self.calls.len() <= calls && self.data.len() <= bytes {
            return Ok(());
        }
        let error = io::Error::from_raw_os_error(libc::E2BIG);
        Err(SyscallError::new("a batch of system calls", whose, error))
    }

    /// How many calls there are.
    pub(crate) fn count(&self) -> usize {
        self.calls.len()
    }

    /// The buffers, one behind the other.
    pub(crate) fn data(&self) -> &[u8] {
        &self.data
    }

    /// As they are made, where the buffers lie at `data`: number, arguments, and a result to come.
    pub(crate) fn resolved(&self, data: u64) -> Vec<Call> {
        let resolve = |arg: Arg| match arg {
            Arg::Value(value) => value,
            Arg::Buffer(buffer) => data + buffer.offset as u64,
        };
        let calls = self.calls.iter();
        calls
            .map(|call| Call { number: call.number as u64, args: call.args.map(resolve), result: 0 })
            .collect()
    }

    /// Whether one more call with a buffer of `len` bytes fits into one command.
    #[must_use]
    pub fn has_room_for(&self, len: usize) -> bool {
        self.calls.len() < CALL_MAX && self.data.len() + len + 16 <= DATA_LEN
    }
}

impl Answers {
    /// What came of `calls`: what each of those that were made returned, and the buffers.
    pub(crate) fn of(calls: &Calls, results: &[i64], data: Vec<u8>, pid: i32) -> Self {
        let results = calls.calls.iter().zip(results).map(|(call, result)| (call.name, Some(*result)));
        Self { results: results.collect(), data, pid }
    }

    /// What a call is called.
    pub(crate) fn name(&self, call: Nth) -> &'static str {
        self.results.get(call.0).map_or("no such call", |(name, _)| name)
    }

    /// What the last call that was made returned.
    pub(crate) fn last(&self) -> Result<i64, SyscallError> {
        self.result(Nth(self.results.len().saturating_sub(1)))
    }

    /// What a call returned.
    ///
    /// # Errors
    /// Its errno; EPERM where the target's seccomp filters do not allow it, and it was not made.
    pub fn result(&self, call: Nth) -> Result<i64, SyscallError> {
        let (name, result) = self.results.get(call.0).copied().unwrap_or(("no such call", None));
        let failed = |errno| {
            SyscallError::new(name, format!("process {}", self.pid), io::Error::from_raw_os_error(errno))
        };
        match result {
            Some(result) if result >= 0 => Ok(result),
            Some(result) => Err(failed(-result as i32)),
            None => Err(failed(libc::EPERM)),
        }
    }

    /// What a buffer holds now.
    #[must_use]
    pub fn bytes(&self, buffer: Buffer) -> &[u8] {
        self.data.get(buffer.offset..buffer.offset + buffer.len).unwrap_or_default()
    }

    /// The `n`-th 64-bit word of a buffer.
    #[must_use]
    pub fn word(&self, buffer: Buffer, n: usize) -> u64 {
        let bytes = self.bytes(buffer).get(n * 8..n * 8 + 8).and_then(|b| b.try_into().ok());
        bytes.map_or(0, u64::from_ne_bytes)
    }

    /// The first 32-bit word of a buffer.
    #[must_use]
    pub fn half(&self, buffer: Buffer) -> u32 {
        let bytes = self.bytes(buffer).get(..4).and_then(|b| b.try_into().ok());
        bytes.map_or(0, u32::from_ne_bytes)
    }
}

impl Infected<'_> {
    /// Has the target make the calls, one after the other, on the parasite's thread. One that its seccomp filters would
    /// not simply allow is left out.
    ///
    /// # Errors
    /// The list is too long for one command (E2BIG); the parasite failed. A call that fails is in the answers.
    pub fn run(&mut self, calls: Calls) -> Result<Answers, CommandError> {
        let host = self.host()?;
        let pid = self.frozen.pid();
        calls.fit(format!("process {pid}"), CALL_MAX, DATA_LEN)?;
        let base = host.injection.segment.base();
        let wanted = calls.resolved(host.injection.address + DATA as u64);
        let allowed: Vec<bool> = wanted.iter().map(|call| is_allowed(host, call)).collect();
        let made: Vec<Call> = wanted.iter().zip(&allowed).filter(|(_, ok)| **ok).map(|(c, _)| *c).collect();
        let p = self.parameters()?;
        // SAFETY: the list and the data fit, as was checked; the parasite reads them only after the command.
        unsafe {
            let list = base.add(CALLS).cast::<Call>();
            for (n, call) in made.iter().enumerate() {
                list.add(n).write(*call);
            }
            base.add(DATA).copy_from_nonoverlapping(calls.data.as_ptr(), calls.data.len());
            (*p).call_count = made.len() as u32;
        }
        self.command(op::CALLS)?;
        let mut data = vec![0; calls.data.len()];
        let mut results = Vec::with_capacity(calls.calls.len());
        // SAFETY: as above; the parasite is done with them.
        unsafe {
            data.as_mut_ptr().copy_from_nonoverlapping(base.add(DATA), data.len());
            let mut next = base.add(CALLS).cast::<Call>();
            for (call, ok) in calls.calls.iter().zip(allowed) {
                results.push((call.name, ok.then(|| (&raw const (*next).result).read_volatile())));
                next = next.add(usize::from(ok));
            }
        }
        Ok(Answers { results, data, pid })
    }

    /// Has the parasite make the calls before it closes its descriptors: when it is told to, is cured, or we die. Their results
    /// are lost. They take the place of those given before. Whether the target's seccomp filters would allow them all; if not,
    /// none is made.
    ///
    /// # Errors
    /// The list is too long (E2BIG).
    pub fn undo_with(&mut self, calls: &Calls) -> Result<bool, CommandError> {
        let host = self.host()?;
        calls.fit(format!("process {}", self.frozen.pid()), UNDO_MAX, UNDO_DATA_LEN)?;
        let base = host.injection.segment.base();
        let wanted = calls.resolved(host.injection.address + UNDO_DATA as u64);
        if !wanted.iter().all(|call| is_allowed(host, call)) {
            return Ok(false);
        }
        let p = self.parameters()?;
        // SAFETY: the list and the data fit, as was checked; the parasite looks at them only after a command, or when we are
        // dead. The count is 0 while they change.
        unsafe {
            let count = &raw mut (*p).undo_count;
            count.write_volatile(0);
            compiler_fence(Ordering::SeqCst);
            let list = base.add(UNDO).cast::<Call>();
            for (n, call) in wanted.iter().enumerate() {
                list.add(n).write(*call);
            }
            base.add(UNDO_DATA).copy_from_nonoverlapping(calls.data.as_ptr(), calls.data.len());
            // x86-64 stores become visible in their order.
            compiler_fence(Ordering::SeqCst);
            count.write_volatile(wanted.len() as u32);
        }
        Ok(true)
    }

    /// Has the parasite make the calls of [`Infected::undo_with`] now, and close what it has open.
    ///
    /// # Errors
    /// The parasite failed.
    pub fn undo(&mut self) -> Result<(), CommandError> {
        self.close_all()
    }
}

fn is_allowed(host: &Host, call: &Call) -> bool {
    let call = seccomp::Call { number: call.number as i64, ip: host.injection.address, args: call.args };
    seccomp::allowed(&host.filters, &call)
}
