//! What criu's own dump of a process says, memckpt's says too, field by field; what differs is explained here.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use memckpt_tests::{Scratch, Victim, criu, memckpt, say, skip};
use nix::sys::signal::Signal;
use serde_json::{Map, Value, json};

/// Fields that differ, by the end of their path, and why.
const EXPLAINED: &[(&str, &str)] = &[
    (".tc.cg_set", "cgroups are not captured: a restored process is where its restorer is"),
    (
        ".thread_core.blk_sigset",
        "criu has the leader's mask in `tc` alone, memckpt each thread's in its own record too",
    ),
    (".thread_core.seccomp_mode", "memckpt says that there is none"),
    (".xsave.bndcsr_state", "MPX, which Linux 5.6 dropped: criu writes zeroes"),
    (".tfd.vnsec", "a periodic timer that waits to be read: with criu's 0 it would never expire again"),
    (".ns_id", "the network namespace is the restorer's: nothing to tell apart"),
    (
        ".build_id",
        "of programs and libraries: memckpt has their sizes compared, as criu has where there is none",
    ),
    (".mm_saved_auxv.len", "the end marker, which criu 3.17 takes along where its array has room (6.1)"),
    (".dump_uptime", "criu says it in pre-dumps alone"),
    (".network_lock_method", "no connection, nothing to lock"),
    (".thp_disabled", "memckpt says it only where it is so"),
    (".seccomp.len", "criu writes an empty image where there are no filters"),
];

fn crit(directory: &Path, image: &str) -> Result<Vec<Value>> {
    if !directory.join(image).exists() {
        return Ok(Vec::new());
    }
    let output = Command::new("crit").arg("show").arg(directory.join(image)).output().context("crit")?;
    ensure!(output.status.success(), "crit show {image}: {}", String::from_utf8_lossy(&output.stderr));
    let mut decoded: Value = serde_json::from_slice(&output.stdout)?;
    Ok(decoded["entries"].as_array_mut().map(std::mem::take).unwrap_or_default())
}

/// The images of one process with numbers that each dumper gives as it likes replaced by what they mean.
struct Images<'a> {
    directory: &'a Path,
    pid: i32,
    files: BTreeMap<u64, Value>,
}

impl<'a> Images<'a> {
    fn read(directory: &'a Path, pid: i32) -> Result<Self> {
        let memfds = crit(directory, "memfd.img")?;
        let memfd = |inode: &Value| {
            let mut found =
                memfds.iter().find(|memfd| memfd["inode_id"] == *inode).cloned().unwrap_or_default();
            without(&mut found, &["inode_id", "shmid"]);
            found
        };
        let mut files = BTreeMap::new();
        for mut file in crit(directory, "files.img")? {
            let id = file["id"].as_u64().context("a file without a number")?;
            without(&mut file, &["id"]);
            for record in file.as_object_mut().into_iter().flat_map(Map::values_mut) {
                without(record, &["id"]);
                for part in ["tfd", "wd"] {
                    let list = record.get_mut(part).and_then(Value::as_array_mut);
                    list.into_iter().flatten().for_each(|entry| without(entry, &["id"]));
                }
                if record.get("inode_id").is_some() {
                    record["inode_id"] = memfd(&record["inode_id"]);
                }
            }
            files.insert(id, file);
        }
        Ok(Self { directory, pid, files })
    }

    fn file(&self, id: &Value) -> Value {
        let mut file = id.as_u64().and_then(|id| self.files.get(&id)).cloned().unwrap_or_default();
        // A FIFO's path is an entry of its own.
        let path = file["fifo"]["regf_id"].clone();
        if path.is_u64() {
            file["fifo"]["regf_id"] = self.file(&path);
        }
        file
    }

    fn memory(&self) -> Result<Value> {
        let mut mm = crit(self.directory, &format!("mm-{}.img", self.pid))?.remove(0);
        mm["exe_file_id"] = self.file(&mm["exe_file_id"]);
        let mut areas = Map::new();
        for mut area in mm["vmas"].as_array_mut().map(std::mem::take).unwrap_or_default() {
            let file = self.file(&area["shmid"]);
            if !file.is_null() {
                area["shmid"] = file;
            }
            // Flags of the kernel's own areas are the kernel's business; criu takes them for advice.
            let status = area["status"].to_string();
            if ["VVAR", "VDSO", "VSYSCALL"].iter().any(|kind| status.contains(kind)) {
                without(&mut area, &["madv"]);
            }
            areas.insert(area["start"].to_string(), area);
        }
        mm["vmas"] = Value::Object(areas);
        Ok(mm)
    }

    fn all(&self) -> Result<Value> {
        let crit = |image: &str| crit(self.directory, image);
        let table = crit("fdinfo-2.img")?;
        let mut descriptors = Map::new();
        let mut queues = Map::new();
        let packets = crit("sk-queues.img")?;
        for mut entry in table {
            let number = entry["fd"].to_string();
            let waiting: Vec<Value> = packets
                .iter()
                .filter(|packet| packet["id_for"] == entry["id"])
                .map(|packet| json!([packet["length"], packet["extra"]]))
                .collect();
            queues.insert(number.clone(), waiting.into());
            entry["id"] = self.file(&entry["id"]);
            descriptors.insert(number, entry);
        }
        let mut directories = crit(&format!("fs-{}.img", self.pid))?.remove(0);
        for name in ["cwd_id", "root_id"] {
            directories[name] = self.file(&directories[name]);
        }
        Ok(json!({
            "inventory": crit("inventory.img")?,
            "pstree": crit("pstree.img")?,
            "core": crit(&format!("core-{}.img", self.pid))?,
            "ids": crit(&format!("ids-{}.img", self.pid))?,
            "mm": self.memory()?,
            "descriptors": descriptors,
            "queues": queues,
            "directories": directories,
            "locks": crit("filelocks.img")?,
            "pipes": crit("pipes-data.img")?,
            "fifos": crit("fifo-data.img")?,
            "ghost": crit("ghost-file-1.img")?,
            "seccomp": crit("seccomp.img")?,
        }))
    }
}

fn without(value: &mut Value, fields: &[&str]) {
    if let Some(object) = value.as_object_mut() {
        fields.iter().for_each(|field| drop(object.remove(*field)));
    }
}

/// Paths at which `ours` and `theirs` differ, with both values.
fn differences(path: &str, ours: &Value, theirs: &Value, found: &mut Vec<(String, String)>) {
    match (ours, theirs) {
        (Value::Object(a), Value::Object(b)) => {
            let mut keys: Vec<&String> = a.keys().chain(b.keys()).collect();
            keys.sort();
            keys.dedup();
            for key in keys {
                let of = |map: &Map<String, Value>| map.get(key).cloned().unwrap_or_default();
                differences(&format!("{path}.{key}"), &of(a), &of(b), found);
            }
        }
        (Value::Array(a), Value::Array(b)) => {
            if a.len() != b.len() {
                found.push((format!("{path}.len"), format!("{} and {}", a.len(), b.len())));
            }
            for (n, (ours, theirs)) in a.iter().zip(b).enumerate() {
                differences(&format!("{path}[{n}]"), ours, theirs, found);
            }
        }
        _ if ours == theirs => {}
        _ => found.push((path.to_owned(), format!("{ours} and {theirs}"))),
    }
}

#[test]
fn every_field_is_as_criu_writes_it() -> Result<()> {
    const NAME: &str = "every_field_is_as_criu_writes_it";
    if let Some(reason) = criu::missing()? {
        skip(NAME, &reason);
        return Ok(());
    }
    let scratch = Scratch::new()?;
    let output = scratch.path().join("output");
    let mut command = Command::new(memckpt_tests::victim::program("descriptors"));
    command.arg(&output).arg(scratch.path()).arg("plain");
    let victim = Victim::spawn(command)?;
    std::fs::write(scratch.path().join("hold"), "")?;
    let deadline = Instant::now() + Duration::from_secs(60);
    while !scratch.path().join("resting").exists() {
        ensure!(Instant::now() < deadline, "it does not come to rest");
        std::thread::sleep(Duration::from_millis(10));
    }
    victim.signal(Signal::SIGSTOP)?;
    victim.wait_stopped()?;
    let pid = victim.pid();
    let (ours, theirs) = (scratch.directory("ours")?, scratch.directory("theirs")?);
    let tree = pid.to_string();
    let flags = ["--leave-stopped", "--file-locks", "-t", &tree];
    memckpt(["dump", "--criu-version", "3.17", "-D"]).arg(&ours).args(&flags).ok()?;
    criu::run("dump", &theirs, &flags)?;

    let (ours, theirs) = (Images::read(&ours, pid)?.all()?, Images::read(&theirs, pid)?.all()?);
    let mut found = Vec::new();
    differences("", &ours, &theirs, &mut found);
    let reason = |path: &str| EXPLAINED.iter().find(|(end, _)| path.ends_with(end)).map(|(_, why)| *why);
    let unexplained: Vec<_> = found.iter().filter(|(path, _)| reason(path).is_none()).collect();
    ensure!(unexplained.is_empty(), "memckpt and criu say: {unexplained:#?}");
    let mut told: BTreeMap<&str, usize> = BTreeMap::new();
    found.iter().filter_map(|(path, _)| reason(path)).for_each(|why| *told.entry(why).or_default() += 1);
    for (why, count) in told {
        say(&format!("differs from criu's, {count} times: {why}"));
    }
    Ok(())
}
