/* Rows in which mappings or page tables change: 9 10 11 12 13 14 15 24 32 33. */
#include "rows.h"

#ifndef MREMAP_DONTUNMAP
#define MREMAP_DONTUNMAP 4
#endif

#define ANON (MAP_PRIVATE | MAP_ANONYMOUS)

/* 9: dropped pages; pages unmapped and mapped again in the same place. */
static char *nine;
static const char *drop_prepare(void) { nine = plain(9); return NULL; }
static const char *drop_deed(void) {
    if (madvise(nine, 2 * PAGE, MADV_DONTNEED)) return failed("MADV_DONTNEED");
    if (munmap(nine + 4 * PAGE, 2 * PAGE)) return failed("munmap");
    if (mmap(nine + 4 * PAGE, 2 * PAGE, PROT_READ | PROT_WRITE, ANON | MAP_FIXED, -1, 0) == MAP_FAILED) return failed("mmap");
    nine[4 * PAGE] = 1;
    tell("changed", nine, 2);
    tell("changed", nine + 4 * PAGE, 2);
    return NULL;
}

/* 10: freed before the first checkpoint, turned to zeroes after it, without a call that says so. */
static char *ten;
static const char *free_prepare(void) {
    ten = plain(10);
    settle();
    if (madvise(ten, 4 * PAGE, MADV_FREE)) return failed("MADV_FREE");
    settle();
    return NULL;
}
static const char *free_deed(void) {
    if (madvise(ten, 4 * PAGE, MADV_PAGEOUT)) return failed("MADV_PAGEOUT");
    int gone = 0;
    for (int page = 0; page < 4; page++)
        if (!(pagemap(ten + page * PAGE) >> 62)) tell("changed", ten + page * PAGE, 1), gone++;
    return gone ? NULL : "no freed page was reclaimed";
}

/* 11: whole page tables move. */
static char *source, *target;
static const char *move_prepare(void) {
    target = area(2 * HUGE / PAGE, 11);
    source = area(HUGE / PAGE, 12);
    tell("range", target, HUGE / PAGE);
    tell("control", target + HUGE, HUGE / PAGE);
    return NULL;
}
static const char *move_deed(void) {
    if (mremap(source, HUGE, HUGE, MREMAP_MAYMOVE | MREMAP_FIXED, target) != target) return failed("mremap");
    tell("changed", target, HUGE / PAGE);
    return NULL;
}

/* 12: moved away, and the old mapping stays, empty. */
static char *twelve;
static const char *leave_prepare(void) { twelve = plain(14); return NULL; }
static const char *leave_deed(void) {
    char *to = mremap(twelve, 8 * PAGE, 8 * PAGE, MREMAP_MAYMOVE | MREMAP_DONTUNMAP, NULL);
    if (to == MAP_FAILED) return failed("MREMAP_DONTUNMAP");
    tell("changed", twelve, 8);
    tell("range", to, 8);
    tell("changed", to, 8);
    return NULL;
}

/* 13: the heap and a stack grow, a mapping is new where something was. */
static char *hole;
static __attribute__((noinline)) const char *deeper(size_t bytes) {
    volatile char *stack = __builtin_alloca(bytes);
    for (size_t i = 0; i < bytes; i += PAGE) stack[bytes - 1 - i] = 1;
    tell("changed", (char *)stack + PAGE, bytes / PAGE - 1);
    tell("range", (char *)stack + PAGE, bytes / PAGE - 1);
    return NULL;
}
/* `count` more pages of heap, for which malloc did not ask: it knows how to go on behind them. */
static char *more_heap(size_t count, unsigned value) {
    uintptr_t end = (uintptr_t)sbrk(0);
    char *start = (char *)((end + PAGE - 1) & ~(uintptr_t)(PAGE - 1));
    if (brk(start + count * PAGE)) return NULL;
    fill(start, count, value);
    return start;
}
static const char *grow_prepare(void) {
    hole = plain(15);
    if (!more_heap(4, 16)) return failed("brk");
    return munmap(hole + 4 * PAGE, 4 * PAGE) ? failed("munmap") : NULL;
}
static const char *grow_deed(void) {
    char *heap = more_heap(8, 17);
    if (!heap) return failed("brk");
    tell("range", heap, 8);
    tell("changed", heap, 8);
    if (mmap(hole + 4 * PAGE, 4 * PAGE, PROT_READ | PROT_WRITE, ANON | MAP_FIXED, -1, 0) == MAP_FAILED) return failed("mmap");
    fill(hole + 4 * PAGE, 4, 18);
    tell("changed", hole + 4 * PAGE, 4);
    return deeper(300 * 1024);
}

/* 14: a new mapping, in the place of an old one, merges with its neighbours. It is never written to: it is all zeroes. */
static char *fourteen;
static const char *merge_prepare(void) { fourteen = plain(19); return NULL; }
static const char *merge_deed(void) {
    if (mmap(fourteen + 2 * PAGE, 4 * PAGE, PROT_READ | PROT_WRITE, ANON | MAP_FIXED, -1, 0) == MAP_FAILED) return failed("mmap");
    if (madvise(fourteen + 2 * PAGE, 4 * PAGE, MADV_NOHUGEPAGE)) return failed("madvise");
    volatile char seen = fourteen[3 * PAGE];
    (void)seen;
    tell("changed", fourteen + 2 * PAGE, 4);
    return NULL;
}

/* 15: as much, written to. */
static char *fifteen;
static const char *spread_prepare(void) {
    fifteen = plain(20);
    return munmap(fifteen, 4 * PAGE) ? failed("munmap") : NULL;
}
static const char *spread_deed(void) {
    if (mmap(fifteen, 4 * PAGE, PROT_READ | PROT_WRITE, ANON | MAP_FIXED, -1, 0) == MAP_FAILED) return failed("mmap");
    if (madvise(fifteen, 4 * PAGE, MADV_NOHUGEPAGE)) return failed("madvise");
    fill(fifteen, 4, 21);
    tell("changed", fifteen, 4);
    return NULL;
}

/* 24: the kernel may drop these pages whenever it likes. */
static char *droppable, *guarded;
static const char *drop_at_will_prepare(void) {
    guarded = area(16, 22);
    tell("control", guarded + 8 * PAGE, 8);
    droppable = reserve(8 * PAGE);
    if (mmap(droppable, 8 * PAGE, PROT_READ | PROT_WRITE, 0x08 /* MAP_DROPPABLE */ | MAP_ANONYMOUS | MAP_FIXED, -1, 0) == MAP_FAILED)
        return failed("MAP_DROPPABLE");
    fill(droppable, 8, 23);
    tell("range", droppable, 8);
    return NULL;
}
static const char *drop_at_will_deed(void) {
    droppable[PAGE] ^= 1;
    tell("changed", droppable + PAGE, 1);
    if (madvise(guarded + 2 * PAGE, 2 * PAGE, 102 /* MADV_GUARD_INSTALL */)) {
        /* Since 6.13. The rest of the row stands. */
        return errno == EINVAL ? NULL : failed("MADV_GUARD_INSTALL");
    }
    tell("changed", guarded + 2 * PAGE, 2);
    return NULL;
}

/* 32: another process cuts the file under a private mapping, and lets it grow again. */
static char *file_map;
static int file;
static const char *cut_prepare(void) {
    char path[4096];
    snprintf(path, sizeof path, "%s/cut", scratch);
    file = open(path, O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
    if (file < 0 || ftruncate(file, 16 * PAGE)) return failed("a file");
    file_map = reserve(16 * PAGE);
    if (mmap(file_map, 16 * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_FIXED, file, 0) == MAP_FAILED) return failed("mmap");
    fill(file_map, 16, 24);
    tell("control", file_map, 8);
    tell("range", file_map + 8 * PAGE, 8);
    return NULL;
}
static const char *cut_deed(void) {
    if (let_other(TRUNCATE, NULL, file, 8 * PAGE) || let_other(TRUNCATE, NULL, file, 16 * PAGE)) return failed("truncate");
    tell("changed", file_map + 8 * PAGE, 8);
    return NULL;
}

const struct row layouts[] = {
    {9, drop_prepare, drop_deed, NULL},
    {10, free_prepare, free_deed, NULL},
    {11, move_prepare, move_deed, NULL},
    {12, leave_prepare, leave_deed, NULL},
    {13, grow_prepare, grow_deed, NULL},
    {14, merge_prepare, merge_deed, NULL},
    {15, spread_prepare, spread_deed, NULL},
    {24, drop_at_will_prepare, drop_at_will_deed, NULL},
    {32, cut_prepare, cut_deed, NULL},
    {0},
};
