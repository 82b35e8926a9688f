//! docs/cli.md is what the program itself says: a changed flag shows in review.
//! `MEMCKPT_UPDATE=1 cargo test -p memckpt-tests --test cli_reference` writes it anew.

use std::path::Path;

use anyhow::{Result, ensure};
use memckpt_tests::memckpt;

#[test]
fn docs_hold_the_whole_command_line_reference() -> Result<()> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/cli.md");
    let now = memckpt(["reference"]).ok()?.stdout;
    if std::env::var_os("MEMCKPT_UPDATE").is_some() {
        std::fs::write(&path, &now)?;
    }
    let written = std::fs::read_to_string(&path)?;
    ensure!(
        written == now,
        "docs/cli.md is not what `memckpt reference` prints: set MEMCKPT_UPDATE=1 to write it"
    );
    Ok(())
}
