//! `stats-dump`: what a dump did, as CRIU's users read it.

use super::magic::ImageKind;
use super::meta::{Counters, Timings};
use super::proto::{DumpStatsEntry, StatsEntry};
use super::record::Image;

/// The content of `stats-dump`.
#[must_use]
pub fn encode(counters: &Counters, timings: &Timings) -> Vec<u8> {
    let time = |us: u64| u32::try_from(us).unwrap_or(u32::MAX);
    let dump = DumpStatsEntry {
        freezing_time: time(timings.freezing_us),
        frozen_time: time(timings.frozen_us),
        memdump_time: time(timings.memdump_us),
        memwrite_time: time(timings.memwrite_us),
        pages_scanned: counters.pages_scanned.get(),
        pages_skipped_parent: counters.pages_inherited.get(),
        pages_written: counters.pages_written.get(),
        shpages_scanned: Some(counters.shared_pages_written.get()),
        shpages_skipped_parent: Some(0),
        shpages_written: Some(counters.shared_pages_written.get()),
        ..Default::default()
    };
    Image::new(ImageKind::Stats).with(&StatsEntry { dump: Some(dump), restore: None }).into_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::addr::PageCount;
    use crate::image::record;

    #[test]
    fn counts_and_times_are_in_their_fields() {
        let counters = Counters {
            pages_scanned: PageCount(115),
            pages_written: PageCount(96),
            pages_inherited: PageCount(7),
            ..Default::default()
        };
        let timings = Timings {
            freezing_us: 2572,
            frozen_us: 22666,
            memdump_us: 11696,
            memwrite_us: u64::MAX,
            clear_us: 1,
        };
        let bytes = encode(&counters, &timings);
        let read: StatsEntry = record::single("stats-dump", ImageKind::Stats, &bytes).unwrap();
        let dump = read.dump.unwrap();
        assert_eq!((dump.freezing_time, dump.frozen_time, dump.memdump_time), (2572, 22666, 11696));
        assert_eq!((dump.memwrite_time, dump.pages_lazy), (u32::MAX, 0));
        assert_eq!((dump.pages_scanned, dump.pages_written, dump.pages_skipped_parent), (115, 96, 7));
        assert_eq!(bytes[..4], [0x40, 0x59, 0x10, 0x55]);
    }
}
