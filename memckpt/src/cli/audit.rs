//! `memckpt watch --audit`: a client of the session beside it, which makes it prove itself at each interval.

use std::io::{self, Write};
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::thread::JoinHandle;
use std::time::Duration;

use memckpt::dump::{self, DumpError};

/// How long the process may take to stop.
const TIMEOUT: Duration = Duration::from_secs(10);

/// The thread that audits until it is told to end.
pub(crate) struct Auditor {
    end: Sender<()>,
    thread: JoinHandle<Tally>,
    json: bool,
}

/// What all audits found.
#[derive(Debug, Default, serde::Serialize)]
struct Tally {
    audits: u64,
    vmas: u64,
    pages: u64,
    disagreements: u64,
}

impl Auditor {
    /// Begins with the first interval.
    pub(crate) fn start(pid: i32, interval: Duration, json: bool) -> io::Result<Self> {
        let (end, ended) = channel();
        let work = move || {
            let mut tally = Tally::default();
            while ended.recv_timeout(interval) == Err(RecvTimeoutError::Timeout) {
                let audit = match dump::audit_session(pid, TIMEOUT) {
                    Ok(audit) => audit,
                    Err(DumpError::Audit(audit)) => *audit,
                    Err(error) => {
                        // The session or the process ends, or a checkpoint is being taken: another time.
                        tracing::info!("no audit this time: {error}");
                        continue;
                    }
                };
                tally.audits += 1;
                tally.vmas += audit.vmas;
                tally.pages += audit.pages_scanned.get();
                tally.disagreements += audit.disagreements;
                for wrong in &audit.told {
                    let _ = writeln!(io::stderr(), "audit: {}: {}", wrong.range, wrong.what);
                }
            }
            tally
        };
        let thread = std::thread::Builder::new().name("audit".to_owned()).spawn(work)?;
        Ok(Self { end, thread, json })
    }

    /// Ends it, says what it found, and whether all was right.
    pub(crate) fn finish(self) -> bool {
        drop(self.end);
        let Ok(tally) = self.thread.join() else { return false };
        let text = if self.json {
            serde_json::json!({ "audit": tally }).to_string()
        } else {
            format!(
                "audited {} times: {} mappings and {} pages compared, {} disagreements",
                tally.audits, tally.vmas, tally.pages, tally.disagreements
            )
        };
        let _ = writeln!(io::stdout(), "{text}");
        tally.disagreements == 0
    }
}
