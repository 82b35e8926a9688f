/* Rows in which the kernel has a part of its own: 5 6 8 16 17 18 22 23 33 35 36. */
#include "rows.h"

#include <linux/aio_abi.h>
#include <linux/io_uring.h>
#include <sys/swap.h>

#ifndef MADV_COLD
#define MADV_COLD 20
#endif
#ifndef MADV_COLLAPSE
#define MADV_COLLAPSE 25
#endif

#define ANON (MAP_PRIVATE | MAP_ANONYMOUS)

/* The first mapping whose line in /proc/self/maps ends with `name`; pages in it. */
static char *find_mapping(const char *name, size_t *pages) {
    static char line[4096];
    FILE *maps = fopen("/proc/self/maps", "re");
    char *found = NULL;
    while (maps && !found && fgets(line, sizeof line, maps)) {
        unsigned long start, end;
        line[strcspn(line, "\n")] = 0;
        size_t length = strlen(line), tail = strlen(name);
        if (length < tail || strcmp(line + length - tail, name) || sscanf(line, "%lx-%lx", &start, &end) != 2) continue;
        found = (char *)start;
        *pages = (end - start) / PAGE;
    }
    if (maps) fclose(maps);
    return found;
}

/* A number in /proc or /sys; -1 when there is none. */
static long number(const char *path) {
    long value;
    FILE *f = fopen(path, "re");
    int good = f && fscanf(f, "%ld", &value) == 1;
    if (f) fclose(f);
    return good ? value : -1;
}
static int set_number(const char *path, long value) {
    FILE *f = fopen(path, "we");
    if (!f) return -1;
    fprintf(f, "%ld\n", value);
    return fclose(f);
}

/* The number of field `name`, in kB, of smaps for the mapping of `at`. */
static long smaps(const void *at, const char *name) {
    static char line[4096];
    FILE *f = fopen("/proc/self/smaps", "re");
    long found = -1;
    int here = 0;
    while (f && found < 0 && fgets(line, sizeof line, f)) {
        unsigned long start, end;
        if (sscanf(line, "%lx-%lx ", &start, &end) == 2) here = start <= (uintptr_t)at && (uintptr_t)at < end;
        else if (here && !strncmp(line, name, strlen(name))) found = atol(line + strlen(name));
    }
    if (f) fclose(f);
    return found;
}

/* 5: the kernel writes an AIO ring when a read has ended. */
static aio_context_t aio;
static int zeroes;
static const char *aio_prepare(void) {
    zeroes = open("/dev/zero", O_RDONLY | O_CLOEXEC);
    if (zeroes < 0 || syscall(SYS_io_setup, 4, &aio)) return failed("io_setup");
    tell("range", (void *)aio, 1);
    plain(40);
    return NULL;
}
static const char *aio_deed(void) {
    static char buffer[64];
    struct iocb control = {.aio_fildes = (uint32_t)zeroes, .aio_lio_opcode = IOCB_CMD_PREAD,
                           .aio_buf = (uintptr_t)buffer, .aio_nbytes = sizeof buffer}, *list[] = {&control};
    struct io_event event;
    if (syscall(SYS_io_submit, aio, 1, list) != 1) return failed("io_submit");
    if (syscall(SYS_io_getevents, aio, 1, 1, &event, NULL) != 1) return failed("io_getevents");
    tell("changed", (void *)aio, 1);
    return NULL;
}

/* 6: huge pages of hugetlbfs. */
static char *large;
static const char *hugetlb_prepare(void) {
    static const char reserved[] = "/proc/sys/vm/nr_hugepages";
    if (number(reserved) < 2 && set_number(reserved, 2)) return failed("nr_hugepages");
    if (number(reserved) < 2) return "no two huge pages are free";
    large = mmap(NULL, 2 * HUGE, PROT_READ | PROT_WRITE, ANON | MAP_HUGETLB, -1, 0);
    if (large == MAP_FAILED) return failed("MAP_HUGETLB");
    fill(large, 2 * HUGE / PAGE, 41);
    tell("range", large, 2 * HUGE / PAGE);
    tell("control", area(8, 42), 8);
    return NULL;
}
static const char *hugetlb_deed(void) {
    large[3 * PAGE] ^= 0x55;
    tell("changed", large + 3 * PAGE, 1);
    return NULL;
}

/* 8: pages of a shared file mapping are reclaimed, and the file is written to. */
static char *reclaimed;
static int shared_file;
static const char *reclaim_prepare(void) {
    char path[4096];
    snprintf(path, sizeof path, "%s/reclaimed", scratch);
    shared_file = open(path, O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
    if (shared_file < 0 || ftruncate(shared_file, 8 * PAGE)) return failed("a file");
    reclaimed = reserve(8 * PAGE);
    if (mmap(reclaimed, 8 * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, shared_file, 0) == MAP_FAILED)
        return failed("mmap");
    fill(reclaimed, 8, 43);
    tell("range", reclaimed, 8);
    tell("control", area(8, 44), 8);
    return NULL;
}
static const char *reclaim_deed(void) {
    uint64_t word = 0x7373737373737373;
    reclaimed[PAGE] ^= 0x55;
    settle();
    if (msync(reclaimed, 8 * PAGE, MS_SYNC) || madvise(reclaimed, 8 * PAGE, MADV_PAGEOUT)) return failed("MADV_PAGEOUT");
    for (int page = 0; page < 8; page++)
        if (pagemap(reclaimed + page * PAGE) >> 63) return "the kernel does not reclaim pages of this file system";
    if (pwrite(shared_file, &word, sizeof word, 3 * PAGE) != sizeof word) return failed("pwrite");
    tell("changed", reclaimed + PAGE, 1);
    tell("changed", reclaimed + 3 * PAGE, 1);
    return NULL;
}

/* 16: pages that are alike become one. */
static char *alike;
static const char *merge_alike_prepare(void) {
    if (number("/sys/kernel/mm/ksm/run") < 0) return "this kernel has no KSM";
    alike = area(8, 45);
    for (int page = 0; page < 8; page++) memset(alike + page * PAGE, 0x3c, PAGE);
    if (madvise(alike, 8 * PAGE, MADV_MERGEABLE)) return failed("MADV_MERGEABLE");
    tell("range", alike, 8);
    tell("control", area(8, 46), 8);
    return NULL;
}
static const char *merge_alike_deed(void) {
    static const char run[] = "/sys/kernel/mm/ksm/run", batch[] = "/sys/kernel/mm/ksm/pages_to_scan";
    long was = number(run), pages = number(batch), merged = 0;
    if (set_number(batch, 1000000) || set_number(run, 1)) return failed(run);
    for (int wait = 0; wait < 5000 && merged < 8; wait++) {
        usleep(10000);
        merged = number("/proc/self/ksm_merging_pages"); /* since 5.19 */
    }
    set_number(run, was), set_number(batch, pages);
    return merged < 8 ? "KSM does not merge them within 50 s" : NULL;
}

/* 17: one write to a huge page. */
static char *transparent;
static const char *huge_prepare(void) {
    transparent = reserve(HUGE);
    if (mprotect(transparent, HUGE, PROT_READ | PROT_WRITE) || madvise(transparent, HUGE, MADV_HUGEPAGE))
        return failed("MADV_HUGEPAGE");
    fill(transparent, HUGE / PAGE, 47);
    if (smaps(transparent, "AnonHugePages:") != HUGE / 1024) return "the kernel gives no transparent huge page";
    tell("range", transparent, HUGE / PAGE);
    tell("control", area(8, 48), 8);
    return NULL;
}
static const char *huge_deed(void) {
    transparent[5 * PAGE] ^= 0x55;
    tell("changed", transparent + 5 * PAGE, 1);
    return NULL;
}

/* 18: pages are swapped out before and after a checkpoint; some come back. */
static char *swapped;
static const char *swap_prepare(void) {
    static char path[4096], line[256];
    FILE *swaps = fopen("/proc/swaps", "re");
    int lines = 0;
    while (swaps && fgets(line, sizeof line, swaps)) lines++;
    if (swaps) fclose(swaps);
    if (lines == 0) return "this kernel has no swap";
    /* Which a test's victim makes where the machine is the test's own. */
    snprintf(path, sizeof path, "%s/swap", scratch);
    if (lines == 1 && access(path, F_OK)) return "there is no swap space";
    if (lines == 1 && swapon(path, 0)) return failed("swapon");
    swapped = plain(49);
    settle();
    if (madvise(swapped, 4 * PAGE, MADV_PAGEOUT)) return failed("MADV_PAGEOUT");
    return pagemap(swapped) >> 62 & 1 ? NULL : "the kernel does not swap out";
}
static const char *swap_deed(void) {
    volatile char *at = swapped;
    (void)at[PAGE];
    at[2 * PAGE] ^= 0x55;
    settle();
    if (madvise(swapped + 4 * PAGE, 4 * PAGE, MADV_PAGEOUT)) return failed("MADV_PAGEOUT");
    at[5 * PAGE] ^= 0x55;
    tell("changed", swapped + 2 * PAGE, 1);
    tell("changed", swapped + 5 * PAGE, 1);
    return NULL;
}

/* 22: a breakpoint by ptrace and one of the kernel's in pages of code. */
static char *code;
static int code_file;
static const char *break_prepare(void) {
    char path[4096];
    snprintf(path, sizeof path, "%s/code", scratch);
    code_file = open(path, O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0700);
    code = area(16, 0);
    memset(code, 0x90, 16 * PAGE);
    if (code_file < 0 || write(code_file, code, 16 * PAGE) != 16 * PAGE) return failed("a file");
    if (mmap(code, 16 * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_FIXED, code_file, 0) == MAP_FAILED) return failed("mmap");
    /* Pages of its own from page 1 on; the first is the file's. */
    for (int page = 1; page < 16; page++) code[page * PAGE + 8] = (char)0xcc;
    if (mprotect(code, 16 * PAGE, PROT_READ | PROT_EXEC)) return failed("mprotect");
    tell("range", code + PAGE, 7);
    tell("control", code + 8 * PAGE, 8);
    return NULL;
}
static const char *break_deed(void) {
    if (let_other(POKE, code + 2 * PAGE, 0, 0)) return failed("PTRACE_POKEDATA");
    tell("changed", code + 2 * PAGE, 1);
    if (let_other(PROBE, NULL, code_file, 0)) return failed("a uprobe");
    if ((unsigned char)code[0] != 0xcc) return "the kernel does not set the uprobe";
    tell("changed", code, 1);
    return NULL;
}

/* 23: the kernel's own pages. */
static const char *vdso_prepare(void) {
    size_t pages;
    char *at = find_mapping("[vdso]", &pages);
    if (!at) return "there is no vDSO";
    tell("range", at, pages);
    tell("control", area(8, 50), 8);
    return NULL;
}
static const char *vdso_deed(void) {
    size_t pages;
    char *at = find_mapping("[vvar]", &pages);
    if (at) tell("changed", at, pages);
    return NULL;
}

/* 33: dropped by an io_uring, without a call of ours that says so. */
static char *advised;
static int ring;
static char *rings, *entries;
static struct io_uring_params params;
static const char *uring_prepare(void) {
    ring = (int)syscall(SYS_io_uring_setup, 4, &params);
    if (ring < 0) return failed("io_uring_setup");
    advised = plain(51);
    return NULL;
}
static const char *uring_deed(void) {
    rings = mmap(NULL, 2 * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, ring, IORING_OFF_SQ_RING);
    entries = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, ring, (off_t)IORING_OFF_SQES);
    if (rings == MAP_FAILED || entries == MAP_FAILED) return failed("map the ring");
    struct io_uring_sqe *entry = (struct io_uring_sqe *)entries;
    memset(entry, 0, sizeof *entry);
    entry->opcode = IORING_OP_MADVISE;
    entry->addr = (uintptr_t)advised;
    entry->len = 4 * PAGE;
    entry->fadvise_advice = MADV_DONTNEED;
    *(unsigned *)(rings + params.sq_off.array) = 0;
    atomic_store((atomic_uint *)(rings + params.sq_off.tail), 1);
    if (syscall(SYS_io_uring_enter, ring, 1, 1, IORING_ENTER_GETEVENTS, NULL, 0) != 1) return failed("io_uring_enter");
    struct io_uring_cqe *done = (struct io_uring_cqe *)(rings + params.cq_off.cqes);
    if (done->res) return errno = -done->res, failed("IORING_OP_MADVISE");
    munmap(rings, 2 * PAGE), munmap(entries, PAGE);
    tell("changed", advised, 4);
    return NULL;
}

/* 35: small pages, of which one was written to, become a huge one. */
static char *collapsed;
static const char *collapse_prepare(void) {
    collapsed = area(HUGE / PAGE, 52);
    tell("range", collapsed, HUGE / PAGE);
    tell("control", area(8, 53), 8);
    return NULL;
}
static const char *collapse_deed(void) {
    /* One page must be writable (SCAN_PAGE_RO in mm/khugepaged.c), and none is after the bits were cleared. */
    collapsed[3 * PAGE] ^= 0x55;
    tell("changed", collapsed + 3 * PAGE, 1);
    /* Not before: khugepaged would do it when it likes. */
    if (madvise(collapsed, HUGE, MADV_HUGEPAGE)) return failed("MADV_HUGEPAGE");
    if (madvise(collapsed, HUGE, MADV_COLLAPSE)) return failed("MADV_COLLAPSE");
    return smaps(collapsed, "AnonHugePages:") == HUGE / 1024 ? NULL : "MADV_COLLAPSE collapses nothing";
}

/* 36: a huge page is split, and what is all zeroes in it becomes the zero page. */
static char *divided;
static const char *split_prepare(void) {
    divided = reserve(HUGE);
    if (mprotect(divided, HUGE, PROT_READ | PROT_WRITE) || madvise(divided, HUGE, MADV_HUGEPAGE))
        return failed("MADV_HUGEPAGE");
    fill(divided, 8, 54);
    if (smaps(divided, "AnonHugePages:") != HUGE / 1024) return "the kernel gives no transparent huge page";
    tell("range", divided, 8);
    tell("control", area(8, 55), 8);
    return NULL;
}
static const char *split_deed(void) {
    if (madvise(divided, PAGE, MADV_COLD)) return failed("MADV_COLD");
    if (smaps(divided, "AnonHugePages:") != 0) return "MADV_COLD of a part splits nothing";
    /* Zero pages do not count. */
    return smaps(divided, "Rss:") == 8 * PAGE / 1024 ? NULL : "this kernel keeps the pages of zeroes";
}

const struct row kernels[] = {
    {5, aio_prepare, aio_deed, NULL},
    {6, hugetlb_prepare, hugetlb_deed, NULL},
    {8, reclaim_prepare, reclaim_deed, NULL},
    {16, merge_alike_prepare, merge_alike_deed, NULL},
    {17, huge_prepare, huge_deed, NULL},
    {18, swap_prepare, swap_deed, NULL},
    {22, break_prepare, break_deed, NULL},
    {23, vdso_prepare, vdso_deed, NULL},
    {33, uring_prepare, uring_deed, NULL},
    {35, collapse_prepare, collapse_deed, NULL},
    {36, split_prepare, split_deed, NULL},
    {0},
};
