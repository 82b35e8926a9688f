//! docs/specification.md names only tests that exist.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, ensure};

#[test]
fn every_promise_names_tests_that_exist() -> Result<()> {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    let text = fs::read_to_string(here.join("../docs/specification.md"))?;
    let mut named = 0;
    for name in
        text.split('`').filter(|word| word.contains("::") && !word.contains(' ') && *word != "FILE::test")
    {
        let (file, test) = name.split_once("::").context("FILE::test")?;
        let source =
            fs::read_to_string(here.join(format!("tests/{file}.rs"))).with_context(|| name.to_owned())?;
        ensure!(source.contains(&format!("fn {test}()")), "there is no test {name}");
        named += 1;
    }
    ensure!(named > 40, "only {named} tests are named");
    Ok(())
}
