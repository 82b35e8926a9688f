//! Runs a plan here: on the host, or as the command of a guest. One line of results a test, written at once, so that
//! a guest that dies leaves what it had and the name of the test that it died in.

use std::fs::{File, OpenOptions};
use std::io::{Read as _, Seek as _, Write as _};
use std::os::unix::process::CommandExt as _;
use std::path::PathBuf;
use std::process::{Command, ExitCode, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;

use super::plan::{Binary, Outcome, Plan, Record};
use super::{cells, libtest};

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The plan, as JSON.
    #[arg(long)]
    plan: PathBuf,
    /// Where the results go, a JSON object a line.
    #[arg(long)]
    results: PathBuf,
}

/// `xtask run-tests`. The exit code says whether the plan was run, not whether the tests passed.
pub(crate) fn run(args: &Args) -> Result<ExitCode> {
    let plan: Plan = serde_json::from_slice(&std::fs::read(&args.plan)?).context("read the plan")?;
    let results = OpenOptions::new().create(true).append(true).open(&args.results)?;
    let mut runner = Runner { plan: &plan, results, position: 0 };
    for binary in &plan.binaries {
        if binary.isolated {
            runner.isolated(binary)?;
        } else if runner.is_ours() {
            runner.whole(binary)?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

struct Runner<'a> {
    plan: &'a Plan,
    results: File,
    /// How many tests of the plan were met, those of other shares too.
    position: usize,
}

/// How a child ended.
struct Ended {
    /// `None`: it was killed at its time limit.
    status: Option<ExitStatus>,
    output: String,
}

impl Runner<'_> {
    fn record(&mut self, record: &Record) -> Result<()> {
        let mut line = serde_json::to_vec(record)?;
        line.push(b'\n');
        self.results.write_all(&line).context("write the results")
    }

    fn wanted(&self, test: &str) -> bool {
        self.plan.filter.as_ref().is_none_or(|filter| test.contains(filter.as_str()))
    }

    /// Whether the next test of the plan is of our share.
    fn is_ours(&mut self) -> bool {
        let position = self.position;
        self.position += 1;
        self.plan.share.holds(position)
    }

    /// Every test in a process of its own.
    fn isolated(&mut self, binary: &Binary) -> Result<()> {
        let listing = self.execute(binary, &["--list", "--format", "terse"], self.plan.limit_seconds)?;
        if !listing.status.is_some_and(|status| status.success()) {
            let outcome = Some(Outcome::Failed(format!("cannot list its tests:\n{}", listing.output)));
            return self.record(&Record::new(&binary.name, outcome));
        }
        for name in libtest::names(&listing.output) {
            let test = format!("{}::{name}", binary.name);
            if !self.wanted(&test) || !self.is_ours() {
                continue;
            }
            self.record(&Record::new(&test, None))?;
            let start = Instant::now();
            let args = ["--exact", name, "--nocapture", "--test-threads=1"];
            let ended = self.execute(binary, &args, self.plan.limit_seconds)?;
            let outcome = judge(&ended, self.plan.limit_seconds);
            let seconds = start.elapsed().as_secs_f64();
            match &outcome {
                Outcome::Passed => println!("{}: {test} ... ok {seconds:.1} s", self.plan.place),
                Outcome::Failed(why) => {
                    println!("{}: {test} ... FAILED {seconds:.1} s\n{why}", self.plan.place);
                }
                Outcome::Skipped(reason) => println!("{}: {test} ... skipped: {reason}", self.plan.place),
            }
            for text in libtest::sayings(&ended.output) {
                println!("{}:     {text}", self.plan.place);
            }
            // Parts of it that could not run, under names of their own.
            if outcome == Outcome::Passed {
                for (part, reason) in libtest::skips(&ended.output).filter(|(part, _)| *part != name) {
                    let outcome = Some(Outcome::Skipped(reason.to_owned()));
                    self.record(&Record::new(format!("{test}/{part}"), outcome))?;
                }
            }
            let cells = cells::cells(&ended.output);
            self.record(&Record { cells, ..Record::new(test, Some(outcome)) })?;
        }
        Ok(())
    }

    /// All tests of a binary in one process.
    fn whole(&mut self, binary: &Binary) -> Result<()> {
        self.record(&Record::new(&binary.name, None))?;
        let start = Instant::now();
        let ended = self.execute(binary, &["--show-output"], self.plan.limit_seconds * 5)?;
        let mut records = libtest::results(&binary.name, &ended.output);
        records.retain(|record| self.wanted(&record.test));
        let failed = records.iter().any(|record| matches!(record.outcome, Some(Outcome::Failed(_))));
        if !failed && !ended.status.is_some_and(|status| status.success()) {
            let outcome = Some(judge(&ended, self.plan.limit_seconds * 5));
            records.push(Record::new(&binary.name, outcome));
        }
        let (count, seconds) = (records.len(), start.elapsed().as_secs_f64());
        if count > 0 {
            println!("{}: {}: {count} tests in {seconds:.1} s", self.plan.place, binary.name);
        }
        for record in &records {
            if let Some(Outcome::Failed(why)) = &record.outcome {
                println!("{}: {} ... FAILED\n{why}", self.plan.place, record.test);
            }
            self.record(record)?;
        }
        Ok(())
    }

    /// Runs the binary with a time limit. Its output goes to a file: victims that it leaves behind would keep a pipe
    /// open.
    fn execute(&self, binary: &Binary, args: &[&str], limit: u64) -> Result<Ended> {
        let mut output = tempfile::tempfile().context("create a file for a test's output")?;
        // In a group of its own no Ctrl-C reaches it: let it end with us.
        let mut child = Command::new("setpriv")
            .args(["--pdeathsig", "KILL"])
            .arg(&binary.path)
            .args(args)
            .args(
                (!binary.isolated && self.plan.filter.is_some())
                    .then(|| binary_filter(self.plan, binary))
                    .flatten(),
            )
            .current_dir(&binary.directory)
            .env("CARGO_MANIFEST_DIR", &binary.directory)
            .envs(self.plan.environment.iter().map(|(name, value)| (name, value)))
            .stdin(Stdio::null())
            .stdout(output.try_clone()?)
            .stderr(output.try_clone()?)
            .process_group(0)
            .spawn()
            .with_context(|| format!("cannot start {}", binary.path.display()))?;
        let group = Pid::from_raw(i32::try_from(child.id())?);
        let deadline = Instant::now() + Duration::from_secs(limit);
        let status = loop {
            if let Some(status) = child.try_wait()? {
                break Some(status);
            }
            if Instant::now() >= deadline {
                break None;
            }
            std::thread::sleep(Duration::from_millis(5));
        };
        // Also what it left behind. ESRCH: nothing.
        let _ = killpg(group, Signal::SIGKILL);
        child.wait()?;
        output.rewind()?;
        let mut bytes = Vec::new();
        output.read_to_end(&mut bytes)?;
        Ok(Ended { status, output: String::from_utf8_lossy(&bytes).into_owned() })
    }
}

/// A whole binary's filter: a test's name within it, when the filter goes beyond the binary's name.
fn binary_filter(plan: &Plan, binary: &Binary) -> Option<String> {
    let filter = plan.filter.as_deref()?;
    match filter.strip_prefix(&format!("{}::", binary.name)) {
        Some(rest) => Some(rest.to_owned()),
        None => (!binary.name.contains(filter)).then(|| filter.to_owned()),
    }
}

fn judge(ended: &Ended, limit: u64) -> Outcome {
    let tail = || {
        let lines: Vec<&str> = ended.output.lines().collect();
        lines[lines.len().saturating_sub(60)..].join("\n")
    };
    match ended.status {
        None => Outcome::Failed(format!("no end after {limit} s; killed\n{}", tail())),
        Some(status) if !status.success() => Outcome::Failed(format!("{status}\n{}", tail())),
        Some(_) => {
            let name =
                ended.output.lines().find_map(|line| line.strip_prefix("test ")?.split(" ... ").next());
            if let Some((_, reason)) = libtest::skips(&ended.output).find(|(part, _)| Some(*part) == name) {
                return Outcome::Skipped(reason.to_owned());
            }
            if ended.output.contains("test result: ok. 0 passed; 0 failed; 1 ignored") {
                return Outcome::Skipped("ignored".to_owned());
            }
            Outcome::Passed
        }
    }
}
