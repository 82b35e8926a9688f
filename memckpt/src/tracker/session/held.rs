//! The target, frozen for a moment.

use std::os::fd::OwnedFd;
use std::sync::mpsc;
use std::thread::JoinHandle;
use std::time::Duration;

use super::{SessionError, with_sources};
use crate::target::{Frozen, Injection};

/// A frozen target. It is thawed when this is dropped.
///
/// ptrace binds it to the thread that seized it, so that is a thread of its own: were it to end in whatever way, the
/// kernel lets go of everything.
#[derive(Debug)]
pub(super) struct Held {
    release: Option<mpsc::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

/// The userfaultfd that the target was made to create, or why there is none; `None` where none was asked for.
pub(super) type Made = Option<Result<OwnedFd, String>>;

impl Held {
    /// Freezes `pid` within `timeout`; on request makes a userfaultfd in it and takes that over. That this failed is
    /// no reason not to freeze.
    pub(super) fn freeze(
        pid: i32,
        timeout: Duration,
        userfaultfd: bool,
    ) -> Result<(Self, Made), SessionError> {
        let (release, released) = mpsc::channel::<()>();
        let (tell, told) = mpsc::channel();
        let work = move || {
            // Whatever takes time comes before the freeze.
            let injection = userfaultfd.then(|| Injection::prepare(pid).map_err(|e| with_sources(&e)));
            let mut frozen = match Frozen::freeze(pid, timeout) {
                Ok(frozen) => frozen,
                Err(e) => {
                    let _ = tell.send(Err(SessionError::from(e)));
                    return;
                }
            };
            let made = injection.map(|i| i.and_then(|i| make_userfaultfd(&mut frozen, i)));
            // Whoever waited may have given up: then there is nobody to release us.
            if tell.send(Ok(made)).is_ok() {
                let _ = released.recv();
            }
            frozen.thaw();
        };
        let thread = std::thread::Builder::new()
            .name("freeze".to_owned())
            .spawn(work)
            .map_err(|source| SessionError::Runtime { call: "clone", source })?;
        let held = Self { release: Some(release), thread: Some(thread) };
        match told.recv() {
            Ok(made) => made.map(|made| (held, made)),
            Err(_) => Err(SessionError::Runtime {
                call: "freeze",
                source: std::io::Error::other("the freezing thread ended without a word"),
            }),
        }
    }
}

fn make_userfaultfd(frozen: &mut Frozen, injection: Injection) -> Result<OwnedFd, String> {
    let mut infected = frozen.infect(injection).map_err(|e| with_sources(&e))?;
    let made = infected.userfaultfd().map_err(|e| with_sources(&e));
    // Cured whatever came of it.
    infected.cure().map_err(|e| with_sources(&e))?;
    made
}

impl Drop for Held {
    fn drop(&mut self) {
        drop(self.release.take());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
