//! `cargo xtask test`: every test, in every place.

mod cells;
mod libtest;
mod plan;
mod report;
pub(crate) mod runner;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::sync::Mutex;
use std::time::Duration;

use anyhow::{Context, Result, bail};

use self::plan::{Binary, Outcome, Plan, Record, Share};
use self::report::Report;
use crate::vm::{GUEST_OUT, Guest, Kernel, Time, Verdict};
use crate::{packages, workspace};

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Test on the host (default: host and all guests).
    #[arg(long)]
    host: bool,
    /// Test in a guest with this kernel.
    #[arg(long, value_enum, value_name = "KERNEL", num_args = 1..)]
    vm: Vec<Kernel>,
    /// Fewer repetitions in tests that repeat.
    #[arg(long)]
    quick: bool,
    /// Only tests whose `BINARY::NAME` contains this.
    filter: Option<String>,
}

/// `cargo xtask test`.
pub(crate) fn run(args: &Args) -> Result<ExitCode> {
    let everywhere = !args.host && args.vm.is_empty();
    let guests = if everywhere { Kernel::ALL.to_vec() } else { args.vm.clone() };
    packages::install(packages::TEST)?;
    if !guests.is_empty() {
        packages::install(packages::VM)?;
    }

    let programs = workspace::build(&["build", "--workspace", "--bins"])?;
    let program = |name: &str| {
        programs
            .iter()
            .find(|exe| exe.name == name)
            .map(|exe| exe.path.clone())
            .with_context(|| format!("no {name}"))
    };
    let (memckpt, xtask) = (program("memckpt")?, program("xtask")?);
    let tests = workspace::build(&["test", "--workspace", "--no-run"])?;
    let binaries: Vec<Binary> = tests
        .iter()
        .filter(|exe| exe.is_test)
        .map(|exe| Binary {
            name: exe.name.clone(),
            path: exe.path.clone(),
            directory: exe.package_dir.clone(),
            isolated: exe.kind == "test",
        })
        .collect();

    let mut report = Report::default();
    let plan = |place: &str, binaries: Vec<Binary>, limit_seconds: u64| {
        let text = |path: &Path| path.display().to_string();
        let mut environment = vec![
            ("MEMCKPT_BIN".to_owned(), text(&memckpt)),
            ("MEMCKPT_TEST_PLACE".to_owned(), place.replace(' ', "-")),
            ("RUST_BACKTRACE".to_owned(), "1".to_owned()),
            // Of panics, not of every anyhow error.
            ("RUST_LIB_BACKTRACE".to_owned(), "0".to_owned()),
            // insta would ask cargo, which a guest's root has but need not be able to run.
            ("INSTA_WORKSPACE_ROOT".to_owned(), text(&workspace::root())),
            ("INSTA_UPDATE".to_owned(), "no".to_owned()),
        ];
        // Guests are emulated, several times slower than the host: the same tests with fewer rounds.
        if args.quick || place != "host" {
            environment.push(("MEMCKPT_TEST_QUICK".to_owned(), "1".to_owned()));
        }
        for name in ["MEMCKPT_KILLS", "PROPTEST_CASES"] {
            if let Ok(value) = std::env::var(name) {
                environment.push((name.to_owned(), value));
            }
        }
        Plan {
            place: place.to_owned(),
            binaries,
            filter: args.filter.clone(),
            environment,
            share: Share::default(),
            limit_seconds,
        }
    };

    if everywhere || args.host {
        if args.filter.is_none() {
            report.add("doc", doc_tests()?);
        }
        report.add("host", on_host(&xtask, &plan("host", binaries.clone(), 240))?);
    }
    // xtask's own unit tests have nothing to find out in a guest.
    let own = workspace::root().join("xtask");
    let in_guest: Vec<Binary> = binaries.into_iter().filter(|binary| binary.directory != own).collect();
    let plans = guests
        .iter()
        .map(|kernel| (*kernel, plan(&format!("guest {}", kernel.series()), in_guest.clone(), 600)));
    for (place, records) in in_guests(plans.collect(), &xtask)? {
        report.add(&place, records);
    }
    let strict = std::env::var_os("CI").is_some_and(|value| value == "true" || value == "1");
    let totals = report.print(strict);
    Ok(if totals.failed == 0 && totals.passed > 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn doc_tests() -> Result<Vec<Record>> {
    eprintln!("xtask: cargo test --workspace --doc");
    let output =
        workspace::cargo().args(["test", "--workspace", "--doc"]).output().context("cannot start cargo")?;
    let text = String::from_utf8_lossy(&output.stdout);
    let mut records = libtest::results("doc", &text);
    let failed = records.iter().any(|record| matches!(record.outcome, Some(Outcome::Failed(_))));
    if !output.status.success() {
        eprintln!("{text}{}", String::from_utf8_lossy(&output.stderr));
        if !failed {
            let outcome = Some(Outcome::Failed("cargo test --doc failed".to_owned()));
            records.push(Record::new("doc", outcome));
        }
    }
    Ok(records)
}

fn on_host(xtask: &Path, plan: &Plan) -> Result<Vec<Record>> {
    let scratch = tempfile::Builder::new().prefix("memckpt-test-").tempdir()?;
    let (plan_file, results) = (scratch.path().join("plan.json"), scratch.path().join("results.jsonl"));
    std::fs::write(&plan_file, serde_json::to_vec(plan)?)?;
    let mut command = if nix::unistd::geteuid().is_root() {
        Command::new(xtask)
    } else if may_sudo() {
        eprintln!("xtask: running the tests with sudo");
        let mut sudo = Command::new("sudo");
        sudo.arg("-n").arg(xtask);
        sudo
    } else {
        eprintln!(
            "xtask: neither root nor sudo without a password: tests that need root will say that they cannot run"
        );
        Command::new(xtask)
    };
    let status = command
        .arg("run-tests")
        .arg("--plan")
        .arg(&plan_file)
        .arg("--results")
        .arg(&results)
        .stdin(Stdio::null())
        .status()
        .with_context(|| format!("cannot start {}", xtask.display()))?;
    if !status.success() {
        bail!("the test runner failed ({status})");
    }
    read(&results)
}

fn may_sudo() -> bool {
    packages::exists("sudo")
        && Command::new("sudo")
            .args(["-n", "true"])
            .stderr(Stdio::null())
            .status()
            .is_ok_and(|status| status.success())
}

/// A guest is emulated on one core, and has 4 GiB: more at once than this is not for every machine.
const GUESTS_AT_ONCE: usize = 2;

/// As many guests as run at once divide what a kernel has to test, so that no core waits for the kernel with the most. With a
/// filter there is little to divide.
fn in_guests(plans: Vec<(Kernel, Plan)>, xtask: &Path) -> Result<Vec<(String, Vec<Record>)>> {
    let shares = |(kernel, plan): (Kernel, Plan)| {
        let of = if plan.filter.is_none() { GUESTS_AT_ONCE } else { 1 };
        (0..of).map(move |number| (kernel, Plan { share: Share { number, of }, ..plan.clone() }))
    };
    let waiting = Mutex::new(plans.into_iter().flat_map(shares));
    let next = || waiting.lock().ok()?.next();
    let worker = || {
        let mut done = Vec::new();
        while let Some((kernel, plan)) = next() {
            done.push((plan.place.clone(), on_guest(kernel, xtask, &plan)?));
        }
        anyhow::Ok(done)
    };
    let done = std::thread::scope(|scope| {
        let workers: Vec<_> = (0..GUESTS_AT_ONCE).map(|_| scope.spawn(worker)).collect();
        workers.into_iter().map(std::thread::ScopedJoinHandle::join).collect::<Vec<_>>()
    });
    let mut places: BTreeMap<String, Vec<Record>> = BTreeMap::new();
    for records in done {
        for (place, records) in records.map_err(|_| anyhow::anyhow!("a guest's thread panicked"))?? {
            places.entry(place).or_default().extend(records);
        }
    }
    Ok(places.into_iter().collect())
}

fn on_guest(kernel: Kernel, xtask: &Path, plan: &Plan) -> Result<Vec<Record>> {
    let place = &plan.place;
    eprintln!("xtask: booting {place}, share {} of {}", plan.share.number + 1, plan.share.of);
    let guest = Guest {
        kernel,
        memory: "4G".to_owned(),
        time: Time::Real,
        timeout: Duration::from_mins(40),
        script: format!(
            "{} run-tests --plan {GUEST_OUT}/plan.json --results {GUEST_OUT}/results.jsonl\n",
            crate::vm::quote(&xtask.to_string_lossy())
        ),
        files: vec![("plan.json", serde_json::to_vec(plan)?)],
    };
    let outcome = guest.run(&mut |line| println!("{line}"))?;
    println!("{place}: {}", outcome.verdict);
    let results: PathBuf = outcome.out.path().join("results.jsonl");
    let mut records = if results.exists() { read(&results)? } else { Vec::new() };
    if outcome.verdict != Verdict::Exited(0) {
        let during = records.last().map_or("boot".to_owned(), |record| record.test.clone());
        let outcome =
            Some(Outcome::Failed(format!("{} (last: {during}; the rest was not run)", outcome.verdict)));
        records.push(Record::new("guest", outcome));
    }
    Ok(records)
}

fn read(results: &Path) -> Result<Vec<Record>> {
    let text = std::fs::read_to_string(results).with_context(|| format!("read {}", results.display()))?;
    // A guest that died may have left half a line.
    Ok(text.lines().filter_map(|line| serde_json::from_str(line).ok()).collect())
}
