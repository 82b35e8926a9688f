use proptest::prelude::*;

use super::*;
use crate::addr::PAGE_SIZE;

const PAGES: u64 = 48;

fn page(number: u64) -> AddrRange {
    AddrRange::new(number * PAGE_SIZE, (number + 1) * PAGE_SIZE)
}

fn set(bits: &[bool]) -> RangeSet {
    (0..PAGES).filter(|n| bits[*n as usize]).map(page).collect()
}

/// A whole situation, page by page.
#[derive(Clone, Debug)]
struct Case {
    areas: Vec<Area>,
    states: Vec<PageFlags>,
    touched: Vec<bool>,
    parent: Option<Vec<bool>>,
    changed: Vec<bool>,
    doubtful: Vec<bool>,
    tracking: bool,
}

fn areas() -> impl Strategy<Value = Vec<Area>> {
    let handling = prop_oneof![
        6 => Just(Handling::Tracked),
        1 => Just(Handling::Always),
        1 => Just(Handling::Whole),
        1 => Just(Handling::Nothing),
    ];
    prop::collection::vec((0u64..4, 1u64..12, handling, any::<bool>(), any::<bool>()), 0..10).prop_map(
        |parts| {
            let mut at = 0;
            let mut areas = Vec::new();
            for (gap, pages, handling, readable, lazy) in parts {
                let range = AddrRange::new((at + gap) * PAGE_SIZE, (at + gap + pages).min(PAGES) * PAGE_SIZE);
                at += gap + pages;
                if !range.is_empty() {
                    areas.push(Area { range, handling, readable, lazy });
                }
            }
            areas
        },
    )
}

fn rarely() -> impl Strategy<Value = Vec<bool>> {
    prop::collection::vec(prop::bool::weighted(0.15), PAGES as usize)
}

fn often() -> impl Strategy<Value = Vec<bool>> {
    prop::collection::vec(prop::bool::weighted(0.6), PAGES as usize)
}

fn cases() -> impl Strategy<Value = Case> {
    let state = prop_oneof![
        3 => Just(PageFlags::PRESENT),
        3 => Just(PageFlags::PRESENT | PageFlags::DIRTY),
        1 => Just(PageFlags::SWAPPED),
        2 => Just(PageFlags::empty()),
        2 => (0u8..32).prop_map(PageFlags::from_bits_truncate),
    ];
    let states = prop::collection::vec(state, PAGES as usize);
    let parent = prop::option::weighted(0.85, often());
    (areas(), states, often(), parent, rarely(), rarely(), prop::bool::weighted(0.85)).prop_map(
        |(areas, states, touched, parent, changed, doubtful, tracking)| Case {
            areas,
            states,
            touched,
            parent,
            changed,
            doubtful,
            tracking,
        },
    )
}

/// Page by page, as the rules read.
fn reference(case: &Case, scanned: &RangeSet, n: u64) -> Option<PageAction> {
    let i = n as usize;
    let area = case.areas.iter().find(|area| area.range.contains(page(n).start))?;
    match area.handling {
        Handling::Nothing => return None,
        Handling::Whole => return Some(PageAction::Dump),
        Handling::Tracked | Handling::Always => {}
    }
    let in_parent = case.parent.as_ref().is_some_and(|parent| parent[i]);
    if !scanned.contains(page(n).start) {
        return in_parent.then_some(PageAction::Inherit);
    }
    let state = case.states[i];
    if !state.contains(PageFlags::PRESENT) && !state.contains(PageFlags::SWAPPED) {
        return None;
    }
    if state.contains(PageFlags::FILE) || state.contains(PageFlags::ZERO) {
        return None;
    }
    let inherit = area.handling == Handling::Tracked
        && case.tracking
        && in_parent
        && !state.contains(PageFlags::DIRTY)
        && !case.changed[i]
        && !case.doubtful[i];
    Some(if inherit { PageAction::Inherit } else { PageAction::Dump })
}

/// Runs of equal, non-empty states of the scanned pages, as a dirty source reports them.
fn runs(case: &Case, scanned: &RangeSet) -> Vec<PageRun> {
    let mut runs: Vec<PageRun> = Vec::new();
    for n in (0..PAGES).filter(|n| scanned.contains(page(*n).start)) {
        let flags = case.states[n as usize];
        match runs.last_mut() {
            Some(last) if last.range.end == page(n).start && last.flags == flags => {
                last.range.end = page(n).end;
            }
            _ if flags.is_empty() => {}
            _ => runs.push(PageRun { range: page(n), flags }),
        }
    }
    runs
}

fn with_evidence<T>(case: &Case, hints: bool, check: impl FnOnce(&Evidence<'_>) -> T) -> T {
    let (changed, doubtful) = (set(&case.changed), set(&case.doubtful));
    let parent = case.parent.as_ref().map(|bits| set(bits));
    let nothing = RangeSet::new();
    let mut evidence = Evidence {
        areas: &case.areas,
        scanned: &nothing,
        pages: &[],
        parent: parent.as_ref(),
        changed: &changed,
        doubtful: &doubtful,
        tracking: case.tracking,
    };
    let touched = set(&case.touched);
    let scanned = must_scan(&evidence, hints.then_some(touched.as_slice()));
    let pages = runs(case, &scanned);
    evidence.scanned = &scanned;
    evidence.pages = &pages;
    check(&evidence)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1000))]

    #[test]
    fn runs_say_what_the_rules_say_of_each_page(case in cases(), hints in any::<bool>()) {
        with_evidence(&case, hints, |evidence| {
            let composed = compose(evidence).unwrap();
            let grabbed = to_dump(evidence).unwrap();
            prop_assert!(composed.windows(2).all(|w| w[0].range.end <= w[1].range.start));
            prop_assert!(grabbed.windows(2).all(|w| w[0].range.end <= w[1].range.start));
            for n in 0..PAGES {
                let at = page(n).start;
                let want = reference(&case, evidence.scanned, n);
                let planned = composed.iter().find(|run| run.range.contains(at));
                prop_assert_eq!(planned.map(|run| run.action), want, "page {}", n);
                let grab = grabbed.iter().find(|run| run.range.contains(at));
                prop_assert_eq!(grab.is_some(), want == Some(PageAction::Dump), "page {}", n);
                let area = case.areas.iter().find(|area| area.range.contains(at));
                if let (Some(grab), Some(area)) = (grab, area) {
                    prop_assert_eq!((grab.readable, grab.lazy), (area.readable, area.lazy));
                }
            }
            Ok(())
        })?;
    }

    /// Invariant 1, said without looking at how the decision is made.
    #[test]
    fn no_write_is_lost(case in cases(), hints in any::<bool>()) {
        with_evidence(&case, hints, |evidence| {
            let composed = compose(evidence).unwrap();
            for n in 0..PAGES {
                let i = n as usize;
                let action = composed.iter().find(|run| run.range.contains(page(n).start)).map(|run| run.action);
                let handling =
                    case.areas.iter().find(|area| area.range.contains(page(n).start)).map(|area| area.handling);
                if action == Some(PageAction::Inherit) {
                    prop_assert_eq!(handling, Some(Handling::Tracked));
                    prop_assert!(case.tracking && !case.changed[i] && !case.doubtful[i]);
                    prop_assert!(case.parent.as_ref().is_some_and(|parent| parent[i]));
                    // Unscanned only where complete hints say that nothing happened.
                    let scanned = evidence.scanned.contains(page(n).start);
                    prop_assert!(scanned || (hints && !case.touched[i]));
                    prop_assert!(!scanned || !case.states[i].contains(PageFlags::DIRTY));
                }
                let private = matches!(handling, Some(Handling::Tracked | Handling::Always));
                let state = case.states[i];
                let has_bytes = state.intersects(PageFlags::PRESENT | PageFlags::SWAPPED)
                    && !state.intersects(PageFlags::FILE | PageFlags::ZERO);
                if private && has_bytes && evidence.scanned.contains(page(n).start) {
                    prop_assert!(action.is_some(), "page {} is lost", n);
                }
            }
            Ok(())
        })?;
    }
}

#[test]
fn what_was_not_scanned_and_not_known_is_an_error() {
    let areas = [Area {
        range: AddrRange::new(0, 4 * PAGE_SIZE),
        handling: Handling::Tracked,
        readable: true,
        lazy: true,
    }];
    let (none, parent) = (RangeSet::new(), RangeSet::from_iter([page(1)]));
    let evidence = Evidence {
        areas: &areas,
        scanned: &none,
        pages: &[],
        parent: Some(&parent),
        changed: &none,
        doubtful: &none,
        tracking: true,
    };
    let whole = areas[0].range;
    assert_eq!(
        compose(&evidence),
        Ok(vec![PlannedRun { range: page(1), action: PageAction::Inherit, lazy: true }])
    );
    assert_eq!(compose(&Evidence { tracking: false, ..evidence }), Err(PlanError::NotScanned(whole)));
    assert_eq!(compose(&Evidence { parent: None, ..evidence }), Err(PlanError::NotScanned(whole)));
    assert_eq!(compose(&Evidence { changed: &parent, ..evidence }), Err(PlanError::NotScanned(whole)));
    assert_eq!(compose(&Evidence { doubtful: &parent, ..evidence }), Err(PlanError::NotScanned(whole)));
    let always = [Area { handling: Handling::Always, ..areas[0] }];
    assert_eq!(compose(&Evidence { areas: &always, ..evidence }), Err(PlanError::NotScanned(whole)));
}

#[test]
fn two_states_of_one_page_are_an_error() {
    let areas = [Area { range: page(0), handling: Handling::Tracked, readable: true, lazy: false }];
    let (none, scanned) = (RangeSet::new(), RangeSet::from_iter([page(0)]));
    let run = PageRun { range: page(0), flags: PageFlags::PRESENT };
    let evidence = Evidence {
        areas: &areas,
        scanned: &scanned,
        pages: &[run, run],
        parent: None,
        changed: &none,
        doubtful: &none,
        tracking: false,
    };
    assert_eq!(to_dump(&evidence), Err(PlanError::Twice(page(0))));
    assert_eq!(compose(&evidence), Err(PlanError::Twice(page(0))));
}

#[test]
fn guard_regions_are_those_scanned_and_elsewhere_the_parents() {
    let area = Area {
        range: AddrRange::new(0, 40 * PAGE_SIZE),
        handling: Handling::Tracked,
        readable: true,
        lazy: false,
    };
    let set = |pages: &[u64]| pages.iter().map(|n| page(*n)).collect::<RangeSet>();
    let (scanned, before, none) = (set(&[4, 5, 6]), set(&[2, 5, 44]), RangeSet::new());
    // No page is one of these and something else.
    let pages: Vec<PageRun> =
        [(4, PageFlags::GUARD), (5, PageFlags::PRESENT), (9, PageFlags::GUARD)].map(run).into();
    let evidence = Evidence {
        areas: &[area],
        scanned: &scanned,
        pages: &pages,
        parent: Some(&none),
        changed: &none,
        doubtful: &none,
        tracking: true,
    };
    // 5 was removed, 9 nobody has asked for, 44 is no longer mapped.
    assert_eq!(guards(&evidence, &before), set(&[2, 4]));
    assert_eq!(guards(&Evidence { tracking: false, ..evidence }, &before), set(&[4]));
}

fn run((number, flags): (u64, PageFlags)) -> PageRun {
    PageRun { range: page(number), flags }
}
