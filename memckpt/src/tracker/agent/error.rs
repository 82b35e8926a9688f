//! Why there is no agent.

use super::hooks::HookChoice;
use crate::kernel::SyscallError;
use crate::kernel::btf::BtfError;

/// Why the agent could not be attached.
#[derive(Debug, thiserror::Error)]
pub enum AgentError {
    /// The kernel's type information is missing, or lacks a structure.
    #[error(transparent)]
    Btf(#[from] BtfError),
    /// A system call failed.
    #[error(transparent)]
    Syscall(#[from] SyscallError),
    /// The maps could not be created: too few rights (CAP_BPF, CAP_PERFMON), or no BPF.
    #[error("loading the BPF object: {0}")]
    Load(#[source] Box<aya::EbpfError>),
    /// The embedded object lacks a map.
    #[error("the BPF object has no map {0} of the expected type")]
    Object(&'static str),
    /// The target's address space could not be identified.
    #[error("finding the target's mm by {hook}: {reason}")]
    Capture {
        /// The hook used.
        hook: String,
        /// What went wrong.
        reason: String,
    },
    /// No hook of the family that was asked for attaches.
    #[error("{choice} hooks do not work here: {hook}: {reason}")]
    Choice {
        /// What was asked for.
        choice: HookChoice,
        /// The first hook that failed.
        hook: String,
        /// Why.
        reason: String,
    },
    /// A variable for tests is set to something else.
    #[error("{variable}={value:?} means nothing: it is for tests only; unset it")]
    Sabotage {
        /// Its name.
        variable: &'static str,
        /// Its value.
        value: String,
    },
}
