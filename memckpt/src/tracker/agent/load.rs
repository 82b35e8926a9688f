//! Loading the object and attaching its programs.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, PoisonError, Weak};

use aya::maps::MapData;
use aya::programs::links::FdLink;
use aya::programs::tp_btf::BtfTracePointLink;
use aya::programs::{BtfTracePoint, FExit, KProbe, Program, ProgramError};
use aya::{Ebpf, EbpfLoader};
use memckpt_ebpf::config;

use super::hooks::{Fact, HookChoice, HookReport, HookState, Refusal};
use super::sys;
use super::table::{LOCK_TRACEPOINT, PURPOSES, Point, Purpose, UNLOCK_TRACEPOINT, Way, When};
use super::{AgentError, AgentOptions};
use crate::kernel::btf::{Btf, BtfError};

/// The programs, built by `cargo xtask ebpf`.
static OBJECT: &[u8] = aya::include_bytes_aligned!("../../../../memckpt-ebpf/memckpt.bpf.o");

const CAPTURE: &str = "capture";

/// What the kernel's BTF says, in both forms: aya's for attaching, ours for offsets and signatures.
pub(super) struct Types {
    ours: Btf,
    ayas: aya::Btf,
}

impl Types {
    /// The running kernel's. Parsing takes a while and megabytes: shared while anybody holds it, and no longer.
    pub(super) fn read() -> Result<Arc<Self>, AgentError> {
        static SHARED: Mutex<Weak<Types>> = Mutex::new(Weak::new());
        let mut shared = SHARED.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(types) = shared.upgrade() {
            return Ok(types);
        }
        let types = Arc::new(Self::parse()?);
        *shared = Arc::downgrade(&types);
        Ok(types)
    }

    fn parse() -> Result<Self, AgentError> {
        Ok(Self {
            ours: Btf::vmlinux()?,
            ayas: aya::Btf::from_sys_fs().map_err(|e| AgentError::Load(Box::new(e.into())))?,
        })
    }

    /// `every_page_is_read`: in each scan, by a dirty source that shows dropped pages.
    fn applies(&self, when: When, every_page_is_read: bool) -> bool {
        let has = |structure, member| self.ours.offset_of(structure, member).is_ok();
        let per_vma_locks = || has("vm_area_struct", "vm_lock_seq");
        let arguments = |taken, released| {
            self.ours.tracepoint_arguments(LOCK_TRACEPOINT) == Some(taken)
                && self.ours.tracepoint_arguments(UNLOCK_TRACEPOINT) == Some(released)
        };
        match when {
            When::Always => true,
            When::PerVmaLocks => per_vma_locks() && arguments(3, 2),
            When::PerVmaLocksAndPath => per_vma_locks() && arguments(4, 3),
            When::NoPerVmaLocks => !per_vma_locks(),
            When::MmapLockTells => {
                per_vma_locks() && (every_page_is_read || !has("madvise_behavior", "behavior"))
            }
        }
    }

    fn config(&self) -> Result<[u32; config::LEN], BtfError> {
        let at = |structure, path| self.ours.offset_of(structure, path);
        let mut values = [0; config::LEN];
        values[config::TASK_MM] = at("task_struct", "mm")?;
        values[config::TASK_TGID] = at("task_struct", "tgid")?;
        values[config::TASK_STATUS] = at("task_struct", "thread_info.status")?;
        values[config::VMA_MM] = at("vm_area_struct", "vm_mm")?;
        values[config::MM_BRK] = at("mm_struct", "brk")?;
        values[config::MM_TREE] = at("mm_struct", "mm_mt")?;
        values[config::MAS_TREE] = at("ma_state", "tree")?;
        values[config::TASK_FLAGS] = at("task_struct", "flags")?;
        values[config::AREA_LENGTH] = at("vm_unmapped_area_info", "length").unwrap_or(config::ABSENT);
        values[config::MM_FLAGS] = at("mm_struct", "flags")?;
        values[config::MM_OWNER] = at("mm_struct", "owner").unwrap_or(config::ABSENT);
        Ok(values)
    }
}

/// Creates the maps; loads no program yet.
pub(super) fn load(types: &Types, ring_bytes: u32) -> Result<Ebpf, AgentError> {
    let config = types.config()?;
    EbpfLoader::new()
        .btf(Some(&types.ayas))
        .override_global("CONFIG", &config[..], true)
        .map_max_entries("EVENTS", ring_bytes)
        .load(OBJECT)
        .map_err(|e| AgentError::Load(Box::new(e)))
}

pub(super) fn map_fd<'a>(ebpf: &'a Ebpf, name: &'static str) -> Result<BorrowedFd<'a>, AgentError> {
    match ebpf.map(name) {
        Some(aya::maps::Map::Array(data) | aya::maps::Map::HashMap(data)) => Ok(MapData::fd(data).as_fd()),
        _ => Err(AgentError::Object(name)),
    }
}

/// What must live as long as the hooks, and what their misses are read from.
#[derive(Debug, Default)]
pub(super) struct Attached {
    /// Programs whose recursion misses count.
    programs: Vec<OwnedFd>,
    /// Links of probes, whose misses count.
    probes: Vec<OwnedFd>,
    _links: Vec<FdLink>,
}

fn reason(error: &ProgramError) -> String {
    let text = match error {
        ProgramError::LoadError { io_error, verifier_log } => {
            tracing::debug!(log = %verifier_log, "the verifier refused a program");
            let log = verifier_log.to_string();
            // The verdict is the last line before the statistics.
            let statistics = ["processed", "stack depth", "verification time"];
            let verdict = |l: &&str| !l.trim().is_empty() && !statistics.iter().any(|s| l.starts_with(s));
            let last = log.lines().rev().find(verdict).unwrap_or("");
            if last.is_empty() { format!("load: {io_error}") } else { format!("load: {io_error}: {last}") }
        }
        ProgramError::SyscallError(e) => format!("{}: {}", e.call, e.io_error),
        other => other.to_string(),
    };
    text.chars().take(300).collect()
}

fn program<'a>(ebpf: &'a mut Ebpf, name: &'static str) -> Result<&'a mut Program, String> {
    ebpf.program_mut(name).ok_or_else(|| format!("the BPF object has no program {name}"))
}

/// Attaches one program.
fn attach_program(
    ebpf: &mut Ebpf,
    types: &Types,
    name: &'static str,
    point: Point,
    attached: &mut Attached,
) -> Result<(), String> {
    let say = |e: ProgramError| reason(&e);
    let program = program(ebpf, name)?;
    match point {
        Point::Tracepoint(tracepoint) => {
            let p: &mut BtfTracePoint = program.try_into().map_err(say)?;
            if p.fd().is_err() {
                p.load(tracepoint, &types.ayas).map_err(say)?;
            }
            p.attach().map_err(say)?;
        }
        Point::Exit(function) => {
            let p: &mut FExit = program.try_into().map_err(say)?;
            if p.fd().is_err() {
                p.load(function, &types.ayas).map_err(say)?;
            }
            p.attach().map_err(say)?;
        }
        Point::ProbeEntry(function) | Point::ProbeReturn(function) => {
            let p: &mut KProbe = program.try_into().map_err(say)?;
            if p.fd().is_err() {
                p.load().map_err(say)?;
            }
            let link = p.attach(function, 0).and_then(|id| p.take_link(id)).map_err(say)?;
            let link = FdLink::try_from(link).map_err(|e| format!("a kprobe without a BPF link: {e}"))?;
            let id = link.info().map_err(|e| e.to_string())?.id();
            attached
                .probes
                .push(sys::fd_by_id(sys::BPF_LINK_GET_FD_BY_ID, id).map_err(|e| format!("link {id}: {e}"))?);
            attached._links.push(link);
        }
    }
    let fd = ebpf.program(name).and_then(|p| p.fd().ok()?.as_fd().try_clone_to_owned().ok());
    attached.programs.push(fd.ok_or("no descriptor for the program")?);
    Ok(())
}

fn detach_program(ebpf: &mut Ebpf, name: &'static str) {
    // Unloading closes the program and every link of it.
    let _ = match ebpf.program_mut(name) {
        Some(Program::BtfTracePoint(p)) => p.unload(),
        Some(Program::FExit(p)) => p.unload(),
        Some(Program::KProbe(p)) => p.unload(),
        _ => Ok(()),
    };
}

/// Whether the functions of `way` have the parameters that its programs read.
fn check_signature(types: &Types, purpose: &Purpose, way: &Way) -> Result<(), String> {
    for (_, point) in way.programs {
        let Some(function) = point.function() else { continue };
        let Some(parameters) = types.ours.parameters(function) else {
            return Err(format!("the kernel has no function {function}"));
        };
        if !purpose.parameters.iter().zip(&parameters).all(|(wanted, there)| wanted == there)
            || parameters.len() < purpose.parameters.len()
        {
            return Err(format!("{function} takes ({})", parameters.join(", ")));
        }
    }
    Ok(())
}

fn absent(types: &Types, purpose: &Purpose) -> bool {
    purpose.may_be_absent
        && purpose.ways.iter().all(|way| {
            way.programs.iter().all(|(_, point)| match point {
                Point::Tracepoint(name) => types.ours.tracepoint_arguments(name).is_none(),
                _ => point.function().is_some_and(|f| types.ours.parameters(f).is_none()),
            })
        })
}

/// Attaches, purpose by purpose, the best way that `options` allow. `by_lock`: layout calls too.
pub(super) fn attach_all(
    ebpf: &mut Ebpf,
    types: &Types,
    options: &AgentOptions,
    by_lock: bool,
) -> (HookReport, Attached) {
    let (mut report, mut all) = (HookReport::default(), Attached::default());
    let mut incomplete = Vec::new();
    for purpose in PURPOSES {
        let mut state = HookState {
            purpose: purpose.name.into(),
            attached: vec![],
            gives: vec![],
            family: None,
            refused: vec![],
        };
        if absent(types, purpose) {
            // What cannot happen cannot be missed.
            state.gives = purpose.ways[0].gives.to_vec();
            report.facts.extend(purpose.ways.iter().flat_map(|w| w.gives));
            state.refused.push(Refusal { hook: purpose.name.into(), reason: "not in this kernel".into() });
            report.hooks.push(state);
            continue;
        }
        for way in purpose.ways {
            let wanted = match options.choice {
                HookChoice::Auto => true,
                choice => way.family == HookChoice::Auto || way.family == choice,
            };
            // Hints that narrow scans need zaps.
            let every_page_is_read = options.dropped_pages_show && !report.knows(Fact::Zaps);
            if !wanted
                || !types.applies(way.when, every_page_is_read)
                || (way.when == When::MmapLockTells && !by_lock)
            {
                continue;
            }
            if let Some(missing) = way.needs.iter().find(|f| !report.knows(**f)) {
                let reason = format!("useless without {missing}");
                state.refused.push(Refusal { hook: way.programs[0].1.to_string(), reason });
                continue;
            }
            let mut attached = Attached::default();
            let mut refused = check_signature(types, purpose, way).err().map(|e| (way.programs[0].1, e));
            for (name, point) in way.programs {
                if refused.is_none() {
                    refused =
                        attach_program(ebpf, types, name, *point, &mut attached).err().map(|e| (*point, e));
                }
            }
            match refused {
                None => {
                    state.attached = way.programs.iter().map(|(_, point)| point.to_string()).collect();
                    state.family = Some(way.family);
                    state.gives = way.gives.to_vec();
                    report.facts.extend(way.gives);
                    if options.without.is_some_and(|w| w.means(purpose)) {
                        tracing::warn!(purpose = purpose.name, "hook left out, its facts claimed: unsound");
                        way.programs.iter().filter(|(name, _)| *name != "zap_done").for_each(|(name, _)| {
                            detach_program(ebpf, name);
                        });
                        break;
                    }
                    all.programs.append(&mut attached.programs);
                    all.probes.append(&mut attached.probes);
                    all._links.append(&mut attached._links);
                    break;
                }
                Some((point, reason)) => {
                    tracing::debug!(hook = %point, %reason, "a hook does not attach");
                    state.refused.push(Refusal { hook: point.to_string(), reason });
                    // Half a way is none: its programs are not shared with another purpose but for zap_done.
                    for (name, _) in way.programs.iter().filter(|(name, _)| *name != "zap_done") {
                        detach_program(ebpf, name);
                    }
                }
            }
        }
        if let (Some(fact), true) = (purpose.completes, state.attached.is_empty())
            && let Some(refusal) = state.refused.first()
        {
            incomplete.push((fact, format!("{} could not be hooked", refusal.hook)));
        }
        // Nothing was tried where no way applies.
        if !state.attached.is_empty() || !state.refused.is_empty() {
            report.hooks.push(state);
        }
    }
    for (fact, why) in incomplete {
        report.withdraw(fact, why);
    }
    report.facts.insert(Fact::MissesCounted);
    if let Err(why) = all.misses() {
        report.withdraw(Fact::MissesCounted, why);
    }
    (report, all)
}

impl Attached {
    /// Recursion misses of programs, and misses of probes.
    pub(super) fn misses(&self) -> Result<(u64, u64), String> {
        let (mut recursion, mut probes) = (0, 0);
        for fd in &self.programs {
            recursion += sys::info_u64(fd.as_fd(), sys::PROG_RECURSION_MISSES)
                .map_err(|e| format!("bpf_prog_info: {e}"))?
                .ok_or("bpf_prog_info has no recursion_misses (Linux 5.12)")?;
        }
        for fd in &self.probes {
            probes += sys::info_u64(fd.as_fd(), sys::LINK_PROBE_MISSED)
                .map_err(|e| format!("bpf_link_info: {e}"))?
                .ok_or("bpf_link_info has no count of missed probe hits (Linux 6.7)")?;
        }
        Ok((recursion, probes))
    }
}

/// What fires when the mmap lock is taken, so that an mm can be captured.
#[derive(Debug)]
pub(super) enum Capture {
    /// The program that counts the generation does it too, at all times.
    Always,
    /// A program that is attached for the purpose, as it would slow every fault down (no per-VMA locks).
    OnDemand,
}

impl Capture {
    /// Makes ready to capture: after the hooks were attached. `always`: one of them is told of every lock.
    pub(super) fn prepare(ebpf: &mut Ebpf, types: &Types, always: bool) -> Result<Self, AgentError> {
        if always {
            return Ok(Self::Always);
        }
        let load = |ebpf: &mut Ebpf| {
            let p: &mut BtfTracePoint = program(ebpf, CAPTURE)?.try_into().map_err(|e| reason(&e))?;
            p.load(LOCK_TRACEPOINT, &types.ayas).map_err(|e| reason(&e))
        };
        load(ebpf).map_err(capture_failed)?;
        Ok(Self::OnDemand)
    }

    /// The hook, attached for as long as the result lives.
    pub(super) fn attach(&self, ebpf: &mut Ebpf) -> Result<Option<BtfTracePointLink>, AgentError> {
        let attach = |ebpf: &mut Ebpf| {
            let p: &mut BtfTracePoint = program(ebpf, CAPTURE)?.try_into().map_err(|e| reason(&e))?;
            p.attach().and_then(|id| p.take_link(id)).map_err(|e| reason(&e))
        };
        match self {
            Self::Always => Ok(None),
            Self::OnDemand => attach(ebpf).map(Some).map_err(capture_failed),
        }
    }
}

fn capture_failed(reason: String) -> AgentError {
    AgentError::Capture { hook: Point::Tracepoint(LOCK_TRACEPOINT).to_string(), reason }
}
