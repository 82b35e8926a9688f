//! Whether events account for each movement of the generation, which counts the mm's write locks.

/// What an event accounts for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Explains {
    /// No movement for certain.
    Nothing,
    /// So many movements, whichever they were.
    Moves(u64),
    /// The one movement that made the generation this.
    Lock(u64),
}

/// Runs of numbers kept. One more run is one more lock that nothing accounts for, and so needless to keep.
const RUNS: usize = 64;

/// What was accounted for since the generation was last looked at.
#[derive(Clone, Debug, Default)]
pub(super) struct Accounts {
    moves: u64,
    /// Numbers in order, from the first to the last of each run. Locks are told in their order.
    runs: Vec<(u64, u64)>,
}

impl Accounts {
    pub(super) fn add(&mut self, explains: Explains) {
        match explains {
            Explains::Nothing => {}
            Explains::Moves(moves) => self.moves = self.moves.saturating_add(moves),
            Explains::Lock(number) => {
                if let Some((_, last)) = self.runs.last_mut()
                    && last.checked_add(1) == Some(number)
                {
                    *last = number;
                } else if self.runs.len() < RUNS {
                    self.runs.push((number, number));
                }
            }
        }
    }

    /// Whether everything from `before`, exclusive, to `now`, inclusive, is accounted for. Looks at it anew afterwards:
    /// only what comes after `now` is kept. An event may arrive before `now` was read, though its lock came after; it
    /// does not hide another that came before.
    pub(super) fn settle(&mut self, before: Option<u64>, now: Option<u64>) -> bool {
        let explained = match (before, now) {
            (Some(before), Some(now)) => {
                let within = |&(first, last): &(u64, u64)| {
                    (last.min(now)).saturating_sub(first.max(before.saturating_add(1)).saturating_sub(1))
                };
                let named: u64 = self.runs.iter().map(within).sum();
                now.wrapping_sub(before) <= self.moves.saturating_add(named)
            }
            _ => false,
        };
        self.moves = 0;
        let now = now.unwrap_or(u64::MAX);
        self.runs.retain(|&(_, last)| last > now);
        explained
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn accounts(numbers: impl IntoIterator<Item = u64>) -> Accounts {
        let mut accounts = Accounts::default();
        numbers.into_iter().for_each(|n| accounts.add(Explains::Lock(n)));
        accounts
    }

    #[test]
    fn every_number_must_be_accounted_for() {
        assert!(accounts(6..=9).settle(Some(5), Some(9)));
        assert!(!accounts([6, 7, 9]).settle(Some(5), Some(9)), "8 is missing");
        assert!(!accounts([6, 7, 8]).settle(Some(5), Some(9)), "9 is missing");
        assert!(!accounts([7, 8, 9]).settle(Some(5), Some(9)), "6 is missing");
        assert!(accounts([]).settle(Some(5), Some(5)));
        assert!(!accounts([]).settle(None, Some(5)));
    }

    #[test]
    fn a_lock_before_or_after_hides_no_other() {
        assert!(!accounts([4, 5]).settle(Some(5), Some(6)), "late news");
        let mut accounts = accounts([7, 8]);
        assert!(!accounts.settle(Some(5), Some(6)), "6 is missing, 7 and 8 are early");
        assert!(accounts.settle(Some(6), Some(8)), "and are not forgotten");
        assert!(accounts.settle(Some(8), Some(8)));
    }

    #[test]
    fn what_has_no_number_counts_once() {
        let mut accounts = accounts([6]);
        accounts.add(Explains::Moves(2));
        assert!(accounts.settle(Some(5), Some(8)));
        assert!(!accounts.settle(Some(8), Some(9)));
    }

    #[test]
    fn endless_gaps_cost_no_memory() {
        let mut accounts = accounts((0..100_000).map(|n| 2 * n));
        assert_eq!(accounts.runs.len(), RUNS);
        assert!(!accounts.settle(Some(0), Some(200_000)));
    }
}
