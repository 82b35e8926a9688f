//! The loop of a session: events, clients, samples, signals, and what ends it.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use nix::sys::signal::{SigSet, Signal};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::oneshot;
use tokio::time::{MissedTickBehavior, interval_at, sleep_until};

use super::{End, Sample, Session, SessionError, Summary};
use crate::tracker::control::{Call, ControlServer, Reply, Request, RequestKind, Seat};
use crate::tracker::session::record::Ending;

/// The agent's ring is looked at no more often than this, however fast events come in: it holds some ten thousand.
const EVENT_PAUSE: Duration = Duration::from_millis(2);
/// And no less often: not every kernel wakes us for every record.
const EVENT_TICK: Duration = Duration::from_millis(100);

/// How long an exiting target may take to end after its memory is gone.
const GOING: Duration = Duration::from_secs(30);

/// How long a session runs and how often it reports.
#[derive(Clone, Copy, Debug, Default)]
pub struct ServeOptions {
    /// Time between samples; no samples where `None`.
    pub interval: Option<Duration>,
    /// When to end by itself.
    pub duration: Option<Duration>,
    /// Called once clients can connect.
    pub on_listening: Option<fn() -> io::Result<()>>,
}

/// Runs `session` until it ends, in a tokio runtime. The session's files are gone, and its tracking undone, when this
/// returns. `report` gets each sample.
///
/// # Errors
/// The session could not go on. That the target ended is no error.
pub async fn serve(
    mut session: Session,
    seat: Seat,
    options: ServeOptions,
    report: &mut (dyn FnMut(&Sample) + '_),
) -> Result<Summary, SessionError> {
    let setup = |call| move |source| SessionError::Runtime { call, source };
    let mut server = ControlServer::serve(seat.listen()?).map_err(setup("epoll_ctl"))?;
    let mut signals = Signals::new().map_err(setup("sigaction"))?;
    // Held back until now, so that one that came during the attaching ends the session in order.
    end_signals().thread_unblock().map_err(|e| setup("sigprocmask")(e.into()))?;
    if let Some(tell) = options.on_listening {
        tell().map_err(setup("write"))?;
    }
    let target = watch_fd(session.pidfd()).map_err(setup("epoll_ctl"))?;
    let start = Instant::now();
    let deadline = options.duration.map(|d| tokio::time::Instant::from_std(start + d));
    let mut ticks = options.interval.map(|every| {
        let mut ticks = interval_at(tokio::time::Instant::now() + every, every);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Skip);
        ticks
    });
    let mut attachment = session.attachment();
    let mut events = event_fd(&session).map_err(setup("epoll_ctl"))?;
    let mut looked = tokio::time::Instant::now();
    let (mut stopping, mut failing) = (None, None);
    let end = loop {
        if session.attachment() != attachment {
            attachment = session.attachment();
            events = event_fd(&session).map_err(setup("epoll_ctl"))?;
        }
        let step = tokio::select! {
            biased;
            end = signals.next() => Ok(Some(end)),
            _ = target.readable() => Ok(Some(End::TargetEnded)),
            request = server.next() => match request {
                Some(request) => handle(&mut session, request, &mut stopping),
                None => Ok(Some(End::Failed { reason: "the control socket failed".to_owned() })),
            },
            () = sleep_or_never(deadline) => Ok(Some(End::Duration)),
            () = next_look(events.as_ref(), looked) => {
                looked = tokio::time::Instant::now();
                session.look()
            }
            _ = tick_or_never(ticks.as_mut()) => match session.sample() {
                Ok(sample) => {
                    report(&sample);
                    Ok(None)
                }
                Err(e) => Err(e),
            },
        };
        match step {
            Ok(None) => failing = None,
            Ok(Some(end)) => break end,
            // Whatever fails while the target goes away fails because of that.
            Err(_) if session.target_is_gone() => break End::TargetEnded,
            // An address space ends before its process does, and an exec has a moment between two.
            Err(e) if e.is_gone() && failing.get_or_insert_with(Instant::now).elapsed() < GOING => {
                tracing::debug!("the target is going: {e}");
            }
            Err(e) => return Err(e),
        }
    };
    let summary = session.summary(end, start.elapsed());
    if stopping.is_none() {
        server.close().await;
        drop(session);
        drop(seat);
    } else {
        drop(session);
        drop(seat);
        // Only now does the client that asked for the end see its connection close.
        drop(stopping);
        drop(server);
    }
    Ok(summary)
}

fn handle(
    session: &mut Session,
    request: Request,
    stopping: &mut Option<oneshot::Sender<Reply>>,
) -> Result<Option<End>, SessionError> {
    let connection = request.connection;
    let (call, answer) = match request.kind {
        RequestKind::Call(call, answer) => (call, answer),
        RequestKind::Closed => {
            session.vanished(connection)?;
            return Ok(None);
        }
    };
    let reply = match call {
        Call::Hello => session.info().map(|info| Reply::Hello(Box::new(info))),
        Call::Layout => session.layout().map(|(generation, vmas)| Reply::Layout { generation, vmas }),
        Call::Collect { generation } => {
            session.collect(connection, generation).map(|c| Reply::Collected(Box::new(c)))
        }
        Call::Pins => session.may_be_pinned().map(Reply::Pins),
        Call::Commit { checkpoint, carry } => {
            session.commit(connection, checkpoint, &carry).map(Reply::Committed)
        }
        Call::Abort { cleared } => {
            let ending = if cleared { Ending::Cleared } else { Ending::Untouched };
            session.abort(connection, ending).map(|()| Reply::Done)
        }
        Call::Stop => {
            *stopping = Some(answer);
            return Ok(Some(End::Stopped));
        }
    };
    let reply = match reply {
        Ok(reply) => reply,
        Err(e) => Reply::Refused { reason: super::with_sources(&e) },
    };
    // A client that does not wait for its answer has gone away, which is said separately.
    let _ = answer.send(reply);
    Ok(session.ended())
}

/// The signals that end a session. Whoever attaches one blocks them before; [`serve`] unblocks them.
#[must_use]
pub fn end_signals() -> SigSet {
    SigSet::from_iter([Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP])
}

struct Signals([(tokio::signal::unix::Signal, i32); 3]);

impl Signals {
    fn new() -> io::Result<Self> {
        let one = |kind: SignalKind| Ok::<_, io::Error>((signal(kind)?, kind.as_raw_value()));
        Ok(Self([one(SignalKind::interrupt())?, one(SignalKind::terminate())?, one(SignalKind::hangup())?]))
    }

    async fn next(&mut self) -> End {
        let [(a, an), (b, bn), (c, cn)] = &mut self.0;
        let signal = tokio::select! {
            _ = a.recv() => *an,
            _ = b.recv() => *bn,
            _ = c.recv() => *cn,
        };
        End::Signal(signal)
    }
}

fn watch_fd(fd: impl AsFd) -> io::Result<AsyncFd<OwnedFd>> {
    let fd = fd.as_fd().try_clone_to_owned()?;
    // SAFETY: an OwnedFd names one descriptor, which stays open as long as the AsyncFd that owns it.
    Ok(unsafe { AsyncFd::register_with_interest(fd, Interest::READABLE) }?)
}

fn event_fd(session: &Session) -> io::Result<Option<AsyncFd<OwnedFd>>> {
    session.event_fd().map(watch_fd).transpose()
}

/// Comes back when events wait, but not at once again, and not never.
async fn next_look(events: Option<&AsyncFd<OwnedFd>>, looked: tokio::time::Instant) {
    let tick = sleep_until(looked + EVENT_TICK);
    let Some(events) = events else { return tick.await };
    tokio::select! {
        () = tick => {}
        ready = async {
            sleep_until(looked + EVENT_PAUSE).await;
            events.readable().await
        } => {
            if let Ok(mut guard) = ready {
                guard.clear_ready();
            }
        }
    }
}

async fn sleep_or_never(until: Option<tokio::time::Instant>) {
    match until {
        Some(until) => sleep_until(until).await,
        None => std::future::pending().await,
    }
}

async fn tick_or_never(ticks: Option<&mut tokio::time::Interval>) {
    match ticks {
        Some(ticks) => {
            ticks.tick().await;
        }
        None => std::future::pending().await,
    }
}
