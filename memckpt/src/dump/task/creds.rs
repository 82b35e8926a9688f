//! Credentials of a thread: `/proc/TID/status`.

use crate::dump::error::DumpError;
use crate::image::proto::CredsEntry;
use crate::kernel::SyscallError;
use crate::kernel::process::ProcessError;

/// The credentials of a thread with these secure bits.
pub(super) fn of(tid: i32, secbits: u32) -> Result<CredsEntry, DumpError> {
    let path = format!("/proc/{tid}/status");
    let text = std::fs::read(&path).map_err(|e| SyscallError::new("read", path.clone(), e))?;
    parse(&String::from_utf8_lossy(&text), secbits).ok_or_else(|| ProcessError::Malformed { path }.into())
}

fn parse(text: &str, secbits: u32) -> Option<CredsEntry> {
    let field =
        |name: &str| text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':')).map(str::trim);
    let numbers = |name: &str| -> Option<Vec<u32>> {
        field(name)?.split_ascii_whitespace().map(|n| n.parse().ok()).collect()
    };
    // Two words of 32 bits each, the low one first.
    let capabilities = |name: &str| {
        let bits = u64::from_str_radix(field(name)?, 16).ok()?;
        Some(vec![bits as u32, (bits >> 32) as u32])
    };
    let [uid, euid, suid, fsuid] = numbers("Uid")?.try_into().ok()?;
    let [gid, egid, sgid, fsgid] = numbers("Gid")?.try_into().ok()?;
    Some(CredsEntry {
        uid,
        gid,
        euid,
        egid,
        suid,
        sgid,
        fsuid,
        fsgid,
        cap_inh: capabilities("CapInh")?,
        cap_prm: capabilities("CapPrm")?,
        cap_eff: capabilities("CapEff")?,
        cap_bnd: capabilities("CapBnd")?,
        secbits,
        groups: numbers("Groups")?,
        lsm_profile: None,
        lsm_sockcreate: None,
        apparmor_data: None,
        no_new_privs: Some(field("NoNewPrivs")?.parse().ok()?),
        cap_amb: capabilities("CapAmb")?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_field_has_its_place() {
        let text = "Name:\tx\nUid:\t1\t2\t3\t4\nGid:\t5\t6\t7\t8\nGroups:\t9 10 \nCapInh:\t0000000000000001\n\
                    CapPrm:\t000001ffffffffff\nCapEff:\t0000000000000002\nCapBnd:\t0000000000000003\n\
                    CapAmb:\t0000000000000004\nNoNewPrivs:\t1\n";
        let creds = parse(text, 0x2f).unwrap();
        assert_eq!((creds.uid, creds.euid, creds.suid, creds.fsuid), (1, 2, 3, 4));
        assert_eq!((creds.gid, creds.egid, creds.sgid, creds.fsgid), (5, 6, 7, 8));
        assert_eq!((creds.groups, creds.secbits, creds.no_new_privs), (vec![9, 10], 0x2f, Some(1)));
        assert_eq!((creds.cap_prm, creds.cap_amb), (vec![u32::MAX, 0x1ff], vec![4, 0]));
        assert_eq!(parse("Uid:\t1\n", 0), None);
    }
}
