//! For tests only: a hook less than is claimed, and a ring that overflows.
//!
//! The audit must find out that a hook is missing whose facts are believed; this is how a test takes one away
//! (`docs/soundness.md`, "Checked by sabotage"). It is no option on purpose: whoever sets a variable of this name means it.

use std::ffi::OsString;
use std::fmt;

use super::table::{PURPOSES, Purpose};
use super::{AgentError, Fact};

/// Names a purpose of the table, whose hook is not attached although its facts are claimed; or a fact, for all hooks that
/// it rests on; or two of these with `+` between. Checkpoints are wrong then.
const WITHOUT_HOOK: &str = "MEMCKPT_UNSOUND_WITHOUT_HOOK";
/// Size of the event ring in bytes: a power of two, at least a page. Sound: what is lost is counted.
const RING_BYTES: &str = "MEMCKPT_TEST_RING_BYTES";

/// What to go without: one thing or two.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Without {
    first: Left,
    second: Option<Left>,
}

/// What is left out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Left {
    /// One purpose, by its name.
    Purpose(&'static str),
    /// Every purpose that gives this, or completes it.
    Fact(Fact),
}

impl Left {
    fn named(name: &str) -> Option<Self> {
        let purpose = PURPOSES.iter().find(|purpose| name == purpose.name);
        let fact =
            || PURPOSES.iter().flat_map(|p| p.ways).flat_map(|w| w.gives).find(|f| *name == f.to_string());
        purpose.map(|p| Self::Purpose(p.name)).or_else(|| fact().map(|f| Self::Fact(*f)))
    }

    fn means(self, purpose: &Purpose) -> bool {
        match self {
            Self::Purpose(name) => purpose.name == name,
            Self::Fact(fact) => {
                purpose.completes == Some(fact) || purpose.ways.iter().any(|w| w.gives.contains(&fact))
            }
        }
    }
}

impl fmt::Display for Left {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Purpose(name) => f.write_str(name),
            Self::Fact(fact) => write!(f, "{fact}"),
        }
    }
}

impl Without {
    fn named(names: &OsString) -> Option<Self> {
        let mut names = names.to_str()?.split('+');
        let first = Left::named(names.next()?)?;
        let second = names.next().map(|name| Left::named(name).ok_or(())).transpose().ok()?;
        names.next().is_none().then_some(Self { first, second })
    }

    pub(super) fn means(self, purpose: &Purpose) -> bool {
        self.first.means(purpose) || self.second.is_some_and(|second| second.means(purpose))
    }
}

/// What the environment asks for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Sabotage {
    /// What goes without its hooks.
    pub without: Option<Without>,
    /// The event ring's size.
    pub ring_bytes: Option<u32>,
}

impl Sabotage {
    /// Reads the environment.
    ///
    /// # Errors
    /// A variable is set and means nothing.
    pub fn from_environment() -> Result<Self, AgentError> {
        Self::of(std::env::var_os(WITHOUT_HOOK), std::env::var_os(RING_BYTES))
    }

    fn of(without: Option<OsString>, ring_bytes: Option<OsString>) -> Result<Self, AgentError> {
        let wrong = |variable, value: &OsString| AgentError::Sabotage {
            variable,
            value: value.to_string_lossy().into_owned(),
        };
        let without = match &without {
            None => None,
            Some(name) => Some(Without::named(name).ok_or_else(|| wrong(WITHOUT_HOOK, name))?),
        };
        let ring_bytes = match &ring_bytes {
            None => None,
            Some(text) => Some(
                text.to_str()
                    .and_then(|text| text.parse().ok())
                    .filter(|bytes: &u32| *bytes >= 4096 && bytes.is_power_of_two())
                    .ok_or_else(|| wrong(RING_BYTES, text))?,
            ),
        };
        Ok(Self { without, ring_bytes })
    }

    /// What everybody must be told.
    #[must_use]
    pub fn warning(&self) -> Option<String> {
        let Without { first, second } = self.without?;
        let second = second.map_or_else(String::new, |second| format!(" and {second}"));
        Some(format!(
            "UNSOUND, for tests only: {WITHOUT_HOOK} leaves out the hook for {first}{second}: writes are lost"
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_exists_can_be_left_out() {
        let read = |hook: &str| Sabotage::of(Some(hook.into()), None);
        let one = |first| Some(Without { first, second: None });
        assert_eq!(read("faults").unwrap().without, one(Left::Purpose("faults")));
        assert_eq!(read("dropped pages").unwrap().without, one(Left::Fact(Fact::Zaps)));
        let two = Without { first: Left::Purpose("exec"), second: Some(Left::Purpose("faults")) };
        assert_eq!(read("exec+faults").unwrap().without, Some(two));
        assert!(read("faults").unwrap().warning().unwrap().contains("UNSOUND"));
        for wrong in ["", "1", "Faults", "exec+", "exec+faults+exec"] {
            assert!(matches!(read(wrong), Err(AgentError::Sabotage { .. })), "{wrong}");
        }
        assert_eq!(Sabotage::of(None, None).unwrap(), Sabotage::default());
        assert_eq!(Sabotage::default().warning(), None);
    }

    #[test]
    fn a_ring_is_a_power_of_two_of_a_page_or_more() {
        let read = |bytes: &str| Sabotage::of(None, Some(bytes.into())).map(|s| s.ring_bytes);
        assert_eq!(read("4096").unwrap(), Some(4096));
        for wrong in ["", "0", "2048", "5000", "-4096", "4k"] {
            assert!(read(wrong).is_err(), "{wrong}");
        }
    }
}
