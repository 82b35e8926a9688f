//! POSIX timers: `/proc/PID/timers` says which there are and whom they notify (proc(5), Linux 3.10, CONFIG_CHECKPOINT_RESTORE),
//! the process how long they have to run.

use crate::dump::error::DumpError;
use crate::image::proto::PosixTimerEntry;
use crate::kernel::SyscallError;
use crate::target::{Calls, Infected};

/// The timers of a process, armed and disarmed.
pub(super) fn posix(pid: i32, parasite: &mut Infected<'_>) -> Result<Vec<PosixTimerEntry>, DumpError> {
    let path = format!("/proc/{pid}/timers");
    let text = std::fs::read_to_string(&path).map_err(|e| SyscallError::new("read", path.clone(), e))?;
    let Some(mut timers) = parse(&text) else {
        let unreadable = std::io::Error::from(std::io::ErrorKind::InvalidData);
        return Err(SyscallError::new("read", path, unreadable).into());
    };
    for batch in timers.chunks_mut(64) {
        let mut calls = Calls::new();
        let asked: Vec<_> = batch
            .iter()
            .map(|timer| {
                let value = calls.zeroes(size_of::<libc::itimerspec>());
                let id = u64::from(timer.it_id);
                let got = calls.call("timer_gettime", libc::SYS_timer_gettime, [id.into(), value.into()]);
                let overrun = calls.call("timer_getoverrun", libc::SYS_timer_getoverrun, [id.into()]);
                (got, overrun, value)
            })
            .collect();
        let answers = parasite.run(calls)?;
        for (timer, (got, overrun, value)) in batch.iter_mut().zip(asked) {
            answers.result(got)?;
            timer.overrun = answers.result(overrun)? as u32;
            let word = |n| answers.word(value, n);
            (timer.isec, timer.insec, timer.vsec, timer.vnsec) = (word(0), word(1), word(2), word(3));
        }
    }
    Ok(timers)
}

/// Reads the file: four lines a timer, `ID`, `signal: NUMBER/VALUE`, `notify: KIND/pid.ID` or `tid.ID`, `ClockID`.
fn parse(text: &str) -> Option<Vec<PosixTimerEntry>> {
    let mut timers: Vec<PosixTimerEntry> = Vec::new();
    for line in text.lines() {
        let (key, value) = line.split_once(':')?;
        let value = value.trim();
        if key == "ID" {
            timers.push(PosixTimerEntry { it_id: value.parse().ok()?, ..Default::default() });
            continue;
        }
        let timer = timers.last_mut()?;
        match key {
            "signal" => {
                let (signal, pointer) = value.split_once('/')?;
                timer.si_signo = signal.parse().ok()?;
                timer.sival_ptr = u64::from_str_radix(pointer.trim_start_matches("0x"), 16).ok()?;
            }
            "notify" => {
                let (kind, whom) = value.split_once('/')?;
                // sigevent(7), and SIGEV_THREAD_ID where a thread is named.
                timer.it_sigev_notify = match kind {
                    "signal" => 0,
                    "none" => 1,
                    "thread" => 2,
                    _ => return None,
                };
                if let Some(tid) = whom.strip_prefix("tid.") {
                    timer.it_sigev_notify |= libc::SIGEV_THREAD_ID as u32;
                    timer.notify_thread_id = Some(tid.parse().ok()?);
                }
            }
            // A negative number names a process's CPU clock.
            "ClockID" => timer.clock_id = value.parse::<i32>().ok()? as u32,
            _ => {}
        }
    }
    Some(timers)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn timers_are_read() {
        let text = "ID: 0\nsignal: 60/00007fff86e452a8\nnotify: signal/pid.2634\nClockID: 0\n\
                    ID: 3\nsignal: 10/0000000000000007\nnotify: signal/tid.99\nClockID: -6\n";
        let timers = parse(text).unwrap();
        let told: Vec<_> = timers
            .iter()
            .map(|t| {
                (t.it_id, t.si_signo, t.sival_ptr, t.it_sigev_notify, t.notify_thread_id, t.clock_id as i32)
            })
            .collect();
        assert_eq!(told, [(0, 60, 0x7fff_86e4_52a8, 0, None, 0), (3, 10, 7, 4, Some(99), -6)]);
        assert_eq!(parse(""), Some(Vec::new()));
        assert_eq!(parse("signal: 1/2\n"), None);
        assert_eq!(parse("ID: 0\nnotify: often/pid.1\n"), None);
    }
}
