//! The end of a run: a table, every test that did not run and why, and a verdict.

use super::cells::Cells;
use super::plan::{Outcome, Record};
use crate::table;

/// Skips that lie in a place's nature; any other is a failure in CI.
const EXPECTED_SKIPS: &str = include_str!("../../expected-skips");

/// All results so far.
#[derive(Debug, Default)]
pub(crate) struct Report {
    places: Vec<(String, Vec<Record>)>,
}

/// What it comes to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Totals {
    pub(crate) passed: usize,
    pub(crate) failed: usize,
    pub(crate) skipped: usize,
}

impl Report {
    /// Adds what a place has to say.
    pub(crate) fn add(&mut self, place: &str, mut records: Vec<Record>) {
        records.retain(|record| record.outcome.is_some());
        self.places.push((place.to_owned(), records));
    }

    /// Prints it. With `strict`, a skip that is not expected counts as a failure.
    pub(crate) fn print(&self, strict: bool) -> Totals {
        let mut rows = vec![["place", "passed", "failed", "cannot run"].map(str::to_owned).to_vec()];
        let mut totals = Totals { passed: 0, failed: 0, skipped: 0 };
        let (mut failures, mut skips) = (Vec::new(), Vec::new());
        let mut cells = Cells::default();
        for (place, records) in &self.places {
            let mut here = Totals { passed: 0, failed: 0, skipped: 0 };
            for record in records {
                cells.add(place, &record.cells);
                match &record.outcome {
                    Some(Outcome::Passed) => here.passed += 1,
                    Some(Outcome::Failed(why)) => {
                        here.failed += 1;
                        failures.push(format!("  {place}: {}: {}", record.test, shortened(why)));
                    }
                    Some(Outcome::Skipped(reason)) => {
                        let known = expected(EXPECTED_SKIPS, place, &record.test);
                        let note = if known { "" } else { "  <- not expected in this place" };
                        skips.push(format!("  {place}: {}: {reason}{note}", record.test));
                        if strict && !known {
                            here.failed += 1;
                            failures.push(format!("  {place}: {}: cannot run: {reason}", record.test));
                        } else {
                            here.skipped += 1;
                        }
                    }
                    None => {}
                }
            }
            rows.push(vec![
                place.clone(),
                here.passed.to_string(),
                here.failed.to_string(),
                here.skipped.to_string(),
            ]);
            totals.passed += here.passed;
            totals.failed += here.failed;
            totals.skipped += here.skipped;
        }
        if let Some(cells) = cells.table() {
            println!("\nwhat becomes of each row of docs/soundness.md:\n{cells}");
        }
        let empty = cells.empty();
        totals.failed += empty.len();
        failures.extend(empty.into_iter().map(|text| format!("  {text}")));
        println!("\n{}", table::format(&rows));
        list("could not run:", &skips);
        list("failed:", &failures);
        println!("{} passed, {} failed, {} skipped", totals.passed, totals.failed, totals.skipped);
        totals
    }
}

/// The first line of `why` and the last ones, which name the cause: often the end of a log is all that is kept of it.
fn shortened(why: &str) -> String {
    const LAST: usize = 20;
    let mut lines = why.lines();
    let first = lines.next().unwrap_or_default();
    let rest: Vec<&str> = lines.collect();
    let last = rest[rest.len().saturating_sub(LAST)..].iter();
    last.fold(first.to_owned(), |text, line| text + "\n      " + line)
}

fn list(title: &str, lines: &[String]) {
    if !lines.is_empty() {
        println!("{title}\n{}\n", lines.join("\n"));
    }
}

/// Whether a line `PLACE TEST` of `file` (either may hold `*`; `#` starts a comment) names this test. A space in the place is
/// written `-`.
fn expected(file: &str, place: &str, test: &str) -> bool {
    let place = place.replace(' ', "-");
    file.lines().any(|line| {
        let line = line.split('#').next().unwrap_or_default();
        line.trim().split_once(char::is_whitespace).is_some_and(|(place_pattern, test_pattern)| {
            matches(place_pattern, &place) && matches(test_pattern.trim(), test)
        })
    })
}

/// Whether `text` matches `pattern`, in which `*` stands for anything.
fn matches(pattern: &str, text: &str) -> bool {
    match pattern.split_once('*') {
        None => pattern == text,
        Some((head, rest)) => text.strip_prefix(head).is_some_and(|text| {
            (0..=text.len()).any(|at| text.is_char_boundary(at) && matches(rest, &text[at..]))
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::{expected, matches, shortened};

    #[test]
    fn expected_skips_are_patterns_of_place_and_test() {
        let file = "# comment\nhost exactness::soft_dirty*  # no soft-dirty there\nguest-* redis::*\n";
        assert!(expected(file, "host", "exactness::soft_dirty_heap"));
        assert!(!expected(file, "guest 6.12", "exactness::soft_dirty_heap"));
        assert!(expected(file, "guest 6.1", "redis::chain"));
        assert!(!expected(file, "host", "comment"));
    }

    #[test]
    fn a_failure_keeps_its_end() {
        assert_eq!(shortened("exit status: 101"), "exit status: 101");
        let long = (0..100).map(|line| format!("{line}\n")).collect::<String>();
        let short = shortened(&long);
        assert!(short.starts_with("0\n      80\n") && short.ends_with("\n      99"), "{short}");
    }

    #[test]
    fn a_star_stands_for_anything() {
        assert!(matches("a*c*e", "abcde"));
        assert!(matches("*", ""));
        assert!(!matches("a*c", "abcd"));
        assert!(!matches("abc", "abcd"));
    }
}
