//! Reading what a libtest binary prints.

use super::plan::{Outcome, Record};

/// What a test writes on a line of its own when it cannot run: `memckpt-test-skip: NAME: REASON`.
const SKIP: &str = "memckpt-test-skip: ";

/// What a test writes on a line of its own that is to be seen although it passes: `memckpt-test-says: TEXT`.
const SAYS: &str = "memckpt-test-says: ";

/// What the tests had to say.
pub(crate) fn sayings(output: &str) -> impl Iterator<Item = &str> {
    output.lines().filter_map(|line| Some(line.split_once(SAYS)?.1))
}

/// The tests that `--list --format terse` names.
pub(crate) fn names(listing: &str) -> impl Iterator<Item = &str> {
    listing.lines().filter_map(|line| line.strip_suffix(": test"))
}

/// (name, reason) of every skip line.
pub(crate) fn skips(output: &str) -> impl Iterator<Item = (&str, &str)> {
    output.lines().filter_map(|line| {
        // With --nocapture it may follow `test NAME ... ` on one line.
        let (_, rest) = line.split_once(SKIP)?;
        rest.split_once(": ")
    })
}

/// The results in the output of a whole binary that was run with `--show-output`.
pub(crate) fn results(binary: &str, output: &str) -> Vec<Record> {
    let skipped: Vec<_> = skips(output).collect();
    let mut records: Vec<Record> = output
        .lines()
        .filter_map(|line| {
            let (name, result) = line.strip_prefix("test ")?.rsplit_once(" ... ")?;
            let name = name.strip_suffix(" - should panic").unwrap_or(name);
            let skip = skipped.iter().find(|(skipped, _)| *skipped == name);
            let outcome = match (result.split([',', ' ', '<']).next()?, skip) {
                ("ok", Some((_, reason))) => Outcome::Skipped((*reason).to_owned()),
                ("ok", None) => Outcome::Passed,
                ("ignored", _) => Outcome::Skipped(result.to_owned()),
                ("FAILED", _) => Outcome::Failed(captured(output, name)),
                _ => return None,
            };
            Some(Record::new(format!("{binary}::{name}"), Some(outcome)))
        })
        .collect();
    // A part of a test that could not run, under a name of its own.
    for (name, reason) in skipped {
        let test = format!("{binary}::{name}");
        if !records.iter().any(|record| record.test == test) {
            records.push(Record::new(test, Some(Outcome::Skipped(reason.to_owned()))));
        }
    }
    records
}

/// What libtest kept of one test's output.
fn captured(output: &str, name: &str) -> String {
    let head = format!("---- {name} stdout ----");
    let Some((_, rest)) = output.split_once(&head) else { return String::new() };
    rest.split("\n---- ")
        .next()
        .unwrap_or(rest)
        .split("\n\nfailures:\n")
        .next()
        .unwrap_or(rest)
        .trim()
        .to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    const OUTPUT: &str = "
running 5 tests
test a::passes ... ok
test a::panics - should panic ... ok
test b::fails ... FAILED
test b::later ... ignored, takes an hour
test c::cannot ... ok

successes:

---- c::cannot stdout ----
memckpt-test-skip: c::cannot: no soft-dirty on this kernel

failures:

---- b::fails stdout ----
thread panicked at x.rs:1: 1 != 2

failures:
    b::fails

test result: FAILED. 3 passed; 1 failed; 1 ignored; 0 measured; 0 filtered out; finished in 0.01s
";

    #[test]
    fn a_run_is_read_test_by_test() {
        let results: Vec<_> = results("unit", OUTPUT)
            .into_iter()
            .map(|record| (record.test, record.outcome.unwrap()))
            .collect();
        let expect = [
            ("unit::a::passes", Outcome::Passed),
            ("unit::a::panics", Outcome::Passed),
            ("unit::b::fails", Outcome::Failed("thread panicked at x.rs:1: 1 != 2".into())),
            ("unit::b::later", Outcome::Skipped("ignored, takes an hour".into())),
            ("unit::c::cannot", Outcome::Skipped("no soft-dirty on this kernel".into())),
        ];
        assert_eq!(results, expect.map(|(test, outcome)| (test.to_owned(), outcome)));
    }

    #[test]
    fn a_skip_behind_the_name_of_its_test_is_seen() {
        let output = "test redis ... memckpt-test-skip: redis: no redis-server\nok\n";
        assert_eq!(skips(output).collect::<Vec<_>>(), [("redis", "no redis-server")]);
        let output = "test moved ... memckpt-test-says: 0 stale\nok\n";
        assert_eq!(sayings(output).collect::<Vec<_>>(), ["0 stale"]);
        assert_eq!(names("a::b: test\nc: benchmark\n\n").collect::<Vec<_>>(), ["a::b"]);
    }
}
