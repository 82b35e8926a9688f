//! `memckpt check`: what works on this machine, what that enables, and how to get the rest.

use std::process::ExitCode;

use clap::Args;
use memckpt::kernel::features::{Feature, FeatureName, Features};
use memckpt::tracker::agent::{Agent, FamilyProbe, HintMode, HookChoice, HookReport};
use memckpt::tracker::dirty::TrackerKind;
use serde::Serialize;

/// Options of `memckpt check`.
#[derive(Args, Debug)]
pub(crate) struct CheckArgs {
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

/// All findings.
#[derive(Serialize)]
struct Findings {
    #[serde(flatten)]
    features: Features,
    hooks: Hooks,
    /// The modes that memckpt would choose by itself.
    mode: Mode,
}

/// What the eBPF agent can hook, family by family.
#[derive(Serialize)]
struct Hooks {
    /// Why no family could even be tried.
    error: Option<String>,
    families: Vec<Family>,
}

#[derive(Serialize)]
struct Family {
    name: HookChoice,
    error: Option<String>,
    report: Option<HookReport>,
}

#[derive(Serialize)]
struct Mode {
    tracker: Option<TrackerKind>,
    hints: HintMode,
    memory: &'static str,
    incremental: bool,
}

/// Tries everything and prints it. The exit code says whether any checkpoint is possible.
pub(crate) fn run(args: &CheckArgs) -> anyhow::Result<ExitCode> {
    let features = Features::probe();
    let hooks = Hooks::try_all();
    let mode = Mode::of(&features, &hooks);
    let possible = features.works(FeatureName::PtraceSeize) && features.works(FeatureName::ProcMem);
    let findings = Findings { features, hooks, mode };
    if args.json {
        println!("{}", serde_json::to_string_pretty(&findings)?);
    } else {
        print!("{}", findings.table());
    }
    Ok(if possible { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

impl Hooks {
    fn try_all() -> Self {
        match Agent::probe() {
            Ok(families) => Self { error: None, families: families.into_iter().map(Family::from).collect() },
            Err(error) => Self { error: Some(error.to_string()), families: Vec::new() },
        }
    }

    /// The best that hooks can do here.
    fn hint_mode(&self) -> HintMode {
        let modes = || self.families.iter().filter_map(|family| Some(family.report.as_ref()?.hint_mode()));
        modes()
            .find(|mode| *mode == HintMode::Complete)
            .or_else(|| modes().find(|mode| *mode != HintMode::None))
            .unwrap_or(HintMode::None)
    }
}

impl From<FamilyProbe> for Family {
    fn from(tried: FamilyProbe) -> Self {
        let name = tried.choice;
        match tried.outcome {
            Ok(report) => Self { name, error: None, report: Some(report) },
            Err(error) => Self { name, error: Some(error), report: None },
        }
    }
}

impl Mode {
    fn of(features: &Features, hooks: &Hooks) -> Self {
        let tracker = if features.works(FeatureName::SoftDirty) {
            Some(TrackerKind::SoftDirty)
        } else {
            features.works(FeatureName::UffdWpAsync).then_some(TrackerKind::UffdWp)
        };
        let splice =
            [FeatureName::SysvShm, FeatureName::Vmsplice, FeatureName::Pidfd, FeatureName::PtraceSeize];
        let memory = if splice.into_iter().all(|name| features.works(name)) { "splice" } else { "read" };
        let hints = hooks.hint_mode();
        Self { tracker, incremental: tracker.is_some() && hints != HintMode::None, hints, memory }
    }

    fn sentence(&self) -> String {
        let tracker = match self.tracker {
            Some(tracker) => format!("tracker {tracker}"),
            None => "no tracker: full checkpoints only".to_owned(),
        };
        let hints = match &self.hints {
            HintMode::Complete => "complete hints: only touched chunks are scanned".to_owned(),
            HintMode::Incomplete { missing } => {
                let missing: Vec<String> = missing.iter().map(word).collect();
                format!("incomplete hints (not seen: {}): every scan is a full one", missing.join(", "))
            }
            HintMode::None => "no hints: no watching, full checkpoints only".to_owned(),
        };
        format!("{tracker}; {hints}; memory by {}", self.memory)
    }
}

impl Findings {
    fn table(&self) -> String {
        let mut text = format!("kernel {}\n\n", self.features.kernel);
        let width = self.features.features.iter().map(|f| f.name.name().len()).max().unwrap_or(0);
        for feature in &self.features.features {
            text.push_str(&feature_lines(feature, width));
        }
        text.push_str("\neBPF hooks\n");
        if let Some(error) = &self.hooks.error {
            text.push_str(&format!("  no   {:width$}  {error}\n", "all", width = width));
        }
        for family in &self.hooks.families {
            text.push_str(&family_lines(family, width));
        }
        text.push_str(&format!("\nmemckpt will run with: {}\n", self.mode.sentence()));
        text
    }
}

fn feature_lines(feature: &Feature, width: usize) -> String {
    let name = feature.name.name();
    match &feature.reason {
        None => format!("  yes  {name:width$}  {}\n", feature.enables),
        Some(reason) => {
            let indent = " ".repeat(width + 9);
            format!(
                "  no   {name:width$}  {reason}\n{indent}would enable: {}\n{indent}to get it: {}\n",
                feature.enables, feature.remedy
            )
        }
    }
}

fn family_lines(family: &Family, width: usize) -> String {
    let name = word(&family.name);
    let Some(report) = &family.report else {
        return format!("  no   {name:width$}  {}\n", family.error.as_deref().unwrap_or_default());
    };
    let mut text = format!("  yes  {name:width$}  {}\n", hint_word(&report.hint_mode()));
    let indent = " ".repeat(width + 9);
    for hook in &report.hooks {
        let by = if hook.attached.is_empty() { "not hooked".to_owned() } else { hook.attached.join(", ") };
        text.push_str(&format!("{indent}{}: {by}\n", hook.purpose));
        if hook.attached.is_empty() {
            for refusal in &hook.refused {
                text.push_str(&format!("{indent}  {}: {}\n", refusal.hook, refusal.reason));
            }
        }
        for fact in &hook.gives {
            let worth = match report.withdrawn.get(fact) {
                Some(why) => format!("not believed: {why}"),
                None => format!("spares {}", fact.spares()),
            };
            text.push_str(&format!("{indent}  tells {fact}; {worth}\n"));
        }
    }
    if let HintMode::Incomplete { .. } = report.hint_mode() {
        text.push_str(&format!("{indent}hints are {}: every page's state is read\n", report.hint_mode()));
    }
    text
}

fn hint_word(mode: &HintMode) -> &'static str {
    match mode {
        HintMode::Complete => "hints are complete",
        HintMode::Incomplete { .. } => "hints are incomplete",
        HintMode::None => "no fault is seen",
    }
}

/// A value's name as JSON writes it.
fn word(value: &impl Serialize) -> String {
    serde_json::to_value(value).ok().and_then(|v| v.as_str().map(str::to_owned)).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;
    use memckpt::tracker::agent::{Fact, HookState, Refusal};

    fn feature(name: FeatureName, reason: Option<&str>) -> Feature {
        Feature {
            name,
            works: reason.is_none(),
            reason: reason.map(str::to_owned),
            enables: "this",
            remedy: "that",
        }
    }

    fn findings(features: Vec<Feature>) -> Findings {
        let features = Features { kernel: "6.0".to_owned(), features };
        let hooks = Hooks { error: Some("no BPF".to_owned()), families: Vec::new() };
        let mode = Mode::of(&features, &hooks);
        Findings { features, hooks, mode }
    }

    #[test]
    fn what_fails_says_why_and_what_to_do() {
        let text = findings(vec![
            feature(FeatureName::SoftDirty, Some("not compiled in")),
            feature(FeatureName::UffdWpAsync, None),
        ])
        .table();
        assert!(text.contains("  no   soft-dirty     not compiled in\n"), "{text}");
        assert!(text.contains("to get it: that"), "{text}");
        assert!(text.contains("  yes  uffd-wp-async  this\n"), "{text}");
        assert!(text.contains("  no   all            no BPF\n"), "{text}");
        assert!(text.contains("tracker uffd-wp; no hints"), "{text}");
    }

    #[test]
    fn each_hook_says_what_it_tells_and_what_that_spares() {
        let hook = |purpose: &str, attached: &[&str], gives: &[Fact], refused: &[(&str, &str)]| HookState {
            purpose: purpose.to_owned(),
            attached: attached.iter().map(|s| (*s).to_owned()).collect(),
            gives: gives.to_vec(),
            family: None,
            refused: refused
                .iter()
                .map(|(hook, reason)| Refusal { hook: (*hook).to_owned(), reason: (*reason).to_owned() })
                .collect(),
        };
        let report = HookReport {
            hooks: vec![
                hook("faults", &["fexit/handle_mm_fault"], &[Fact::OwnFaults, Fact::RemoteFaults], &[]),
                hook("huge-page collapses", &[], &[], &[("fexit/collapse_huge_page", "no such function")]),
            ],
            facts: [Fact::OwnFaults].into(),
            withdrawn: [(Fact::RemoteFaults, "self-test: no mark".to_owned())].into(),
        };
        let family = Family { name: HookChoice::Fentry, error: None, report: Some(report) };
        let expected = "  yes  fentry  hints are incomplete
               faults: fexit/handle_mm_fault
                 tells own faults; spares reading chunks in which the target did not fault
                 tells faults by others; not believed: self-test: no mark
               huge-page collapses: not hooked
                 fexit/collapse_huge_page: no such function
               hints are incomplete (not seen: faults by others, dropped pages, huge-page collapses, layout calls, \
VMA generation, end of the address space, count of missed hook runs): every page's state is read
";
        assert_eq!(family_lines(&family, 6), expected);
    }

    #[test]
    fn json_names_the_features_and_the_mode() {
        let found = findings(vec![feature(FeatureName::SoftDirty, None)]);
        let json = serde_json::to_value(&found).unwrap();
        assert_eq!(json["kernel"], "6.0");
        assert_eq!(json["features"][0]["name"], "soft-dirty");
        assert_eq!(json["features"][0]["works"], true);
        assert_eq!(json["mode"]["tracker"], "soft-dirty");
        assert_eq!(json["mode"]["incremental"], false);
        assert_eq!(json["hooks"]["error"], "no BPF");
    }
}
