//! A process to checkpoint that knows whether its memory is right: threads rewrite random pages of a hot part of 256 MiB every
//! 10 ms, map and unmap, and check every page against what they wrote.
//!
//! Prints `ready`, then `verified N` each time that all threads have checked all pages; ends with `wrong: ...` and code 1 at the
//! first word that is not as written. Ends by itself when its standard input closes.
#![allow(clippy::print_stdout, reason = "its report")]

use std::io::Read as _;
use std::process::exit;
use std::sync::{Arc, Barrier};
use std::thread;
use std::time::{Duration, Instant};

use memckpt_tests::memory::{PAGE, Pages, Random};

const THREADS: usize = 4;
const PAGES_PER_THREAD: usize = (256 << 20) / PAGE / THREADS;
/// A thread's hot part: 2 MiB of its 64.
const HOT_PAGES: usize = (2 << 20) / PAGE;
const WRITES_PER_ROUND: usize = 4;
const ROUND: Duration = Duration::from_millis(10);
const CHECK_EVERY: Duration = Duration::from_millis(500);

/// What a thread owns: pages, and how often each was written.
struct Part {
    thread: usize,
    pages: Pages,
    versions: Vec<u32>,
    random: Random,
}

impl Part {
    fn new(thread: usize) -> std::io::Result<Self> {
        let pages = Pages::map(PAGES_PER_THREAD)?;
        let mut part =
            Self { thread, pages, versions: vec![0; PAGES_PER_THREAD], random: Random(thread as u64 + 1) };
        for index in 0..PAGES_PER_THREAD {
            part.write(index);
        }
        Ok(part)
    }

    /// Word `word` of page `index` in its `version`.
    fn expected(&self, index: usize, word: usize) -> u64 {
        let seed = (self.thread as u64) << 56 | (index as u64) << 24 | u64::from(self.versions[index]);
        seed.wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(17) ^ (word as u64)
    }

    fn write(&mut self, index: usize) {
        self.versions[index] += 1;
        for word in 0..self.pages.page(index).len() {
            let value = self.expected(index, word);
            self.pages.page_mut(index)[word] = value;
        }
    }

    /// The first word that is wrong.
    fn check(&self) -> Option<String> {
        (0..self.pages.count()).find_map(|index| {
            let page = self.pages.page(index);
            let word = (0..page.len()).find(|&word| page[word] != self.expected(index, word))?;
            Some(format!("thread {} page {index} word {word} is {:x}", self.thread, page[word]))
        })
    }

    /// Rewrites a few hot pages; sometimes uses a mapping for a short while.
    fn round(&mut self, hot: usize) {
        for _ in 0..WRITES_PER_ROUND {
            let index = hot + self.random.below(HOT_PAGES);
            self.write(index);
        }
        if self.random.below(16) == 0 {
            let Ok(mut short) = Pages::map(1 + self.random.below(64)) else { return };
            short.page_mut(0)[0] = self.random.word();
        }
    }
}

fn main() {
    let started = Arc::new(Barrier::new(THREADS + 1));
    let checked = Arc::new(Barrier::new(THREADS + 1));
    for thread in 0..THREADS {
        let (started, checked) = (Arc::clone(&started), Arc::clone(&checked));
        thread::spawn(move || {
            let mut part = Part::new(thread).unwrap_or_else(|error| {
                println!("wrong: cannot map memory: {error}");
                exit(1);
            });
            started.wait();
            let hot = part.random.below(PAGES_PER_THREAD / HOT_PAGES) * HOT_PAGES;
            let mut next_check = Instant::now();
            loop {
                part.round(hot);
                thread::sleep(ROUND);
                if Instant::now() >= next_check {
                    if let Some(wrong) = part.check() {
                        println!("wrong: {wrong}");
                        exit(1);
                    }
                    checked.wait();
                    next_check = Instant::now() + CHECK_EVERY;
                }
            }
        });
    }
    thread::spawn(|| {
        let mut rest = Vec::new();
        let _ = std::io::stdin().read_to_end(&mut rest);
        exit(0);
    });
    started.wait();
    println!("ready");
    for count in 1_u64.. {
        checked.wait();
        println!("verified {count}");
    }
}
