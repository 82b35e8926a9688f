//! The victims themselves: what the other tests rely on.

use anyhow::{Result, ensure};
use memckpt_tests::outward::Outward;
use memckpt_tests::{Scratch, Victim};

/// Two victims given the same commands are the same; every kind of memory takes writes and layout changes.
#[test]
fn memory_is_a_function_of_its_commands() -> Result<()> {
    for kinds in
        ["anon", "heap", "stacks", "file", "prot-none", "sparse", "vmas", "anon,heap,stacks,file,prot-none"]
    {
        // A directory each: truncating a file drops the pages that the other has COWed of it.
        let scratch = (Scratch::new()?, Scratch::new()?);
        let start = |scratch: &Scratch| Victim::start("memory", [kinds.as_ref(), scratch.path().as_os_str()]);
        let (mut one, mut two) = (start(&scratch.0)?, start(&scratch.1)?);
        let first = one.ask("sum")?;
        for step in 0..20 {
            for victim in [&mut one, &mut two] {
                victim.ask(&format!("dirty {step} 100"))?;
                victim.ask(&format!("layout {step}"))?;
            }
        }
        let sums = (one.ask("sum")?, two.ask("sum")?);
        ensure!(sums.0 == sums.1, "{kinds}: {sums:?}");
        ensure!(sums.0 != first, "{kinds}: nothing has changed");
    }
    Ok(())
}

/// The outward state sees what it is there to see.
#[test]
fn a_new_mapping_is_seen_from_outside() -> Result<()> {
    let scratch = Scratch::new()?;
    let mut victim = Victim::start("memory", ["anon".as_ref(), scratch.path().as_os_str()])?;
    let before = Outward::of(victim.pid())?;
    ensure!(before == Outward::of(victim.pid())?, "not stable");
    victim.ask("layout 1")?;
    let after = Outward::of(victim.pid())?;
    ensure!(before.maps != after.maps, "layout changes nothing");
    ensure!(before.differences(&after).contains("  + "), "{}", before.differences(&after));
    Ok(())
}

#[test]
fn ten_thousand_vmas_are_there() -> Result<()> {
    let scratch = Scratch::new()?;
    let victim = Victim::start("memory", ["vmas".as_ref(), scratch.path().as_os_str()])?;
    let count = Outward::of(victim.pid())?.maps.len();
    ensure!(count >= 10_000, "{count}");
    Ok(())
}
