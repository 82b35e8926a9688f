//! Debian's `crit` (criu) decodes every image that is written here.

use std::path::Path;
use std::process::Command;

use serde_json::{Value, json};

use super::core::{Rseq, TaskState, ThreadState, XsaveLayout, core_entry};
use super::inventory::Inventory;
use super::meta::{META, PageMode};
use super::mm::{MmNumbers, VmaRecord};
use super::pagemap::{PagemapFlags, PagemapImage};
use super::pstree::Process;
use super::{ImagesDir, core, magic, meta, mm, pstree, stats};
use crate::addr::{AddrRange, PAGE_SIZE};
use crate::kernel::maps::{Prot, Vma};

const PID: i32 = 28093;
const TID: i32 = 28094;

fn thread(xstate: &[u8]) -> ThreadState<'_> {
    // SAFETY: the struct holds integers only, for which all zeroes are valid.
    let mut regs: libc::user_regs_struct = unsafe { std::mem::zeroed() };
    regs.rip = 0x7fe5_aa98_a545;
    regs.rax = -516_i64 as u64;
    regs.orig_rax = 0xe6;
    ThreadState {
        regs,
        xstate,
        blocked: 1 << 9,
        clear_tid_addr: 0,
        robust_list: (140_624_383_408_544, 24),
        rseq: Some(Rseq { pointer: 4096, size: 32, signature: 1_392_848_979 }),
        sigaltstack: None,
        sched: Some((-5, 0, 0)),
        creds: None,
        comm: "t".into(),
        pdeath_signal: 0,
        pending: Some(Vec::new()),
        seccomp: None,
    }
}

fn write(dir: &Path) {
    let mut images = ImagesDir::open(dir).unwrap();
    let layout = XsaveLayout::of_this_processor();
    let xstate = vec![0u8; 4096];
    let task = TaskState { comm: "t".into(), rlimits: vec![(1, 2); 16], ..Default::default() };
    for (tid, task) in [(PID, Some(&task)), (TID, None)] {
        let entry = core_entry(&thread(&xstate), task, &layout).unwrap();
        images.write(&magic::core_name(tid), &core::encode(&entry)).unwrap();
    }
    let process = Process { pid: PID, ppid: 0, pgid: PID, sid: 1, threads: vec![PID, TID] };
    images.write(magic::PSTREE, &pstree::encode(&[process])).unwrap();

    let heap = Vma {
        range: AddrRange::new(0x5615_a18f_2000, 0x5615_a191_3000),
        prot: Prot::READ | Prot::WRITE,
        shared: false,
        offset: 0,
        dev: (0, 0),
        inode: 0,
        name: "[heap]".into(),
    };
    let record = VmaRecord { vma: &heap, status: 545, flags: 0x22, madv: 0x8000, shmid: 0, fdflags: None };
    let entry =
        mm::mm_entry(&MmNumbers { brk: 0x5615_a191_3000, ..Default::default() }, &[6, 4096], &[record]);
    images.write(&magic::mm_name(PID), &mm::encode(&entry)).unwrap();

    let mut map = PagemapImage::new(1);
    let run = |first: u64, pages: u64| {
        AddrRange::new(
            heap.range.start.get() + first * PAGE_SIZE,
            heap.range.start.get() + (first + pages) * PAGE_SIZE,
        )
    };
    map.push(run(0, 2), PagemapFlags::PRESENT | PagemapFlags::LAZY).unwrap();
    map.push(run(2, 5), PagemapFlags::PARENT).unwrap();
    images.create_pages().unwrap().1.write_at(0, &[1; 2 * PAGE_SIZE as usize]).unwrap();
    images.write(&magic::pagemap_name(PID), &map.encode()).unwrap();

    let sample = meta::tests::sample();
    images.write(magic::STATS_DUMP, &stats::encode(&sample.counters, &sample.timings)).unwrap();
    images.write(META, &sample.encode().unwrap()).unwrap();
    let inventory = Inventory {
        pre_dump_mode: Some(PageMode::Splice),
        uptime_us: 77,
        run_id: Some(sample.id.to_string()),
        blocks_connections: true,
        root_ids: None,
    };
    images.finish(&inventory.encode()).unwrap();
}

fn crit(args: &[&str], file: &Path) -> Value {
    let output = Command::new("crit").args(args).arg(file).output().unwrap();
    assert!(output.status.success(), "{}: {}", file.display(), String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap()
}

#[test]
#[expect(clippy::print_stderr, reason = "the test runner reads which tests could not run")]
fn crit_decodes_every_image() {
    if Command::new("crit").arg("--help").output().is_err() {
        eprintln!("memckpt-test-skip: crit_decodes_every_image: crit (Debian: criu) is not installed");
        return;
    }
    let tmp = tempfile::tempdir().unwrap();
    write(tmp.path());
    let mut decoded = 0;
    for entry in std::fs::read_dir(tmp.path()).unwrap() {
        let name = entry.unwrap().file_name().into_string().unwrap();
        if name == META || name.starts_with("pages-") {
            continue;
        }
        crit(&["decode", "-i"], &tmp.path().join(&name));
        decoded += 1;
    }
    assert_eq!(decoded, 7);

    let show = |name: &str| crit(&["show"], &tmp.path().join(name));
    let inventory = show("inventory.img");
    assert_eq!(inventory["magic"], "INVENTORY");
    let entry = &inventory["entries"][0];
    assert_eq!(entry["img_version"], 2);
    assert_eq!((&entry["fdinfo_per_id"], &entry["ns_per_id"]), (&json!(true), &json!(true)));
    assert_eq!((&entry["pre_dump_mode"], &entry["dump_uptime"]), (&json!(1), &json!(77)));

    assert_eq!(
        show("pstree.img")["entries"],
        json!([{"pid": PID, "ppid": 0, "pgid": PID, "sid": 1, "threads": [PID, TID]}])
    );

    let leader = &show("core-28093.img")["entries"][0];
    assert_eq!(leader["mtype"], "X86_64");
    assert_eq!(leader["thread_info"]["gpregs"]["ax"], "0xfffffffffffffffc");
    assert_eq!(leader["thread_info"]["gpregs"]["mode"], "NATIVE");
    assert_eq!(leader["tc"]["task_state"], "Alive");
    assert_eq!(leader["tc"]["rlimits"]["rlimits"].as_array().map(Vec::len), Some(16));
    let thread = &show("core-28094.img")["entries"][0];
    assert!(thread.get("tc").is_none());
    assert_eq!(thread["thread_core"]["sched_nice"], -5);
    assert_eq!(thread["thread_core"]["blk_sigset"], 512);
    assert_eq!(thread["thread_core"]["rseq_entry"]["signature"], 1_392_848_979);
    assert_eq!(thread["thread_info"]["fpregs"]["xmm_space"].as_array().map(Vec::len), Some(64));

    let mm = &show("mm-28093.img")["entries"][0];
    assert_eq!(mm["mm_brk"], "0x5615a1913000");
    assert_eq!(
        mm["vmas"],
        json!([{
            "start": "0x5615a18f2000",
            "end": "0x5615a1913000",
            "pgoff": 0,
            "shmid": 0,
            "prot": "PROT_READ | PROT_WRITE",
            "flags": "MAP_PRIVATE | MAP_ANON",
            "status": "VMA_AREA_REGULAR | VMA_AREA_HEAP | VMA_ANON_PRIVATE",
            "fd": -1,
            "madv": "0x8000"
        }])
    );

    // crit 3.17 does not know the wide count and prints the old one; 4.x prints both.
    let pagemap = &show("pagemap-28093.img")["entries"];
    assert_eq!(pagemap[0], json!({"pages_id": 1}));
    let count = |entry: &Value| {
        let old = entry.get("nr_pages").or_else(|| entry.get("compat_nr_pages"));
        (entry["vaddr"].clone(), entry["flags"].clone(), old.cloned())
    };
    assert_eq!(count(&pagemap[1]), (json!("0x5615a18f2000"), json!("PE_LAZY | PE_PRESENT"), Some(json!(2))));
    assert_eq!(count(&pagemap[2]), (json!("0x5615a18f4000"), json!("PE_PARENT"), Some(json!(5))));

    assert_eq!(show("stats-dump")["entries"][0]["dump"]["pages_written"], 3);
}
