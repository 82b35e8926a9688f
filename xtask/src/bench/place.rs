//! Where a measurement is made: in a guest, or on this machine.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result};

use crate::vm::{Guest, Kernel, Time, Verdict, quote};
use crate::{packages, workspace};

#[derive(Debug, clap::Args)]
pub(crate) struct Place {
    /// The guest's kernel.
    #[arg(short, long, value_enum, default_value = "6.12")]
    kernel: Kernel,
    /// Measure on this machine, and not in a guest.
    #[arg(long)]
    here: bool,
    /// The built programs' directory (what the guest is told).
    #[arg(long, hide = true)]
    programs: Option<PathBuf>,
}

impl Place {
    /// This machine.
    pub(crate) fn here() -> Self {
        Self { kernel: Kernel::V6_12, here: true, programs: None }
    }

    /// Measures there with release builds of memckpt and of these `victims`; `measure` gets their directory and says
    /// whether the criteria are met.
    pub(crate) fn run(
        &self,
        bench: &str,
        memory: &str,
        victims: &[&str],
        measure: fn(&Path) -> Result<bool>,
    ) -> Result<ExitCode> {
        let code = |passed| if passed { ExitCode::SUCCESS } else { ExitCode::FAILURE };
        if let Some(programs) = &self.programs {
            return measure(programs).map(code);
        }
        packages::install(packages::TEST)?;
        for victim in victims {
            workspace::build_bin("memckpt-tests", victim, true)?;
        }
        let memckpt = workspace::build_bin("memckpt", "memckpt", true)?;
        let programs = memckpt.parent().context("a directory")?;
        if self.here {
            return measure(programs).map(code);
        }
        packages::install(packages::VM)?;
        let xtask = std::env::current_exe()?;
        let guest = Guest {
            kernel: self.kernel,
            memory: memory.to_owned(),
            time: Time::Counted,
            timeout: Duration::from_secs(1800),
            script: format!(
                "{} bench {bench} --programs {}\n",
                quote(&xtask.to_string_lossy()),
                quote(&programs.to_string_lossy())
            ),
            files: Vec::new(),
        };
        let outcome = guest.run(&mut |line| println!("{line}"))?;
        if !matches!(outcome.verdict, Verdict::Exited(_)) {
            eprintln!("guest {}: {}", self.kernel.series(), outcome.verdict);
        }
        Ok(ExitCode::from(outcome.verdict.code()))
    }
}
