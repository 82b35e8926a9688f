/* A process with memory of every kind, which changes at commands on stdin and answers a line each on stdout.
 *
 *   memory KIND[,KIND...] SCRATCH_DIRECTORY
 *
 * Kinds: anon heap stacks file prot-none sparse vmas shared. Commands:
 *   dirty SEED COUNT   write eight bytes in COUNT random pages
 *   layout SEED        a few random mmap, munmap, mremap, mprotect, brk, madvise
 *   sum                a checksum of everything it has written
 *   quit
 * No malloc after the start: the heap belongs to `heap`. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <malloc.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ipc.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/shm.h>
#include <signal.h>
#include <unistd.h>

#ifndef MREMAP_DONTUNMAP
#define MREMAP_DONTUNMAP 4
#endif

enum { PAGE = 4096, HUGE_SIZE = 2 << 20, MAX_REGIONS = 512, SPARSE_PAGES = 4096, THREADS = 8 };
#define SPARSE_SIZE (64ULL << 30)

struct region {
    char *base;
    size_t pages;
    size_t step; /* pages from one used page to the next: more than 1 in sparse memory */
    int writable;
    int arena; /* layout changes may take it apart */
};

static struct region regions[MAX_REGIONS];
static int region_count;
static char *heap_base;
static size_t heap_pages;
static int self_mem;
static int shared_memfd = -1, to_sharer[2], from_sharer[2];

static void die(const char *what) {
    printf("error %s: %s\n", what, strerror(errno));
    exit(1);
}

static uint64_t random_state;
static uint64_t rnd(void) { /* splitmix64 */
    uint64_t z = (random_state += 0x9e3779b97f4a7c15ULL);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ULL;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebULL;
    return z ^ (z >> 31);
}

static int add(void *base, size_t pages, size_t step, int writable, int arena) {
    if (region_count == MAX_REGIONS) return -1;
    regions[region_count] = (struct region){base, pages, step, writable, arena};
    return region_count++;
}

static void *map(size_t size, int extra) {
    void *p = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | extra, -1, 0);
    if (p == MAP_FAILED) die("mmap");
    /* A huge page dirties as one: what is tested here is pages. */
    madvise(p, size, MADV_NOHUGEPAGE);
    return p;
}

/* Writes where the protection may forbid it: by /proc/self/mem, as a debugger would. */
static void write_word(struct region *r, size_t page) {
    char *at = r->base + page * r->step * PAGE + (rnd() % (PAGE / 8)) * 8;
    uint64_t value = rnd();
    if (r->writable) {
        memcpy(at, &value, 8);
    } else if (pwrite(self_mem, &value, 8, (off_t)(uintptr_t)at) != 8) {
        die("write to /proc/self/mem");
    }
}

static void fill(struct region *r, int percent) {
    for (size_t page = 0; page < r->pages; page++)
        if ((int)(rnd() % 100) < percent) write_word(r, page);
}

static void setup_anon(void) {
    int r = add(map(64 << 20, 0), (64 << 20) / PAGE, 1, 1, 0);
    fill(&regions[r], 60);
    /* And a small arena that layout changes start from. */
    for (int i = 0; i < 8; i++) {
        size_t size = i < 2 ? 2 * HUGE_SIZE : (64 + rnd() % 192) * PAGE;
        r = add(map(size, 0), size / PAGE, 1, 1, 1);
        fill(&regions[r], 50);
    }
}

static void setup_heap(void) {
    heap_pages = (16 << 20) / PAGE;
    heap_base = sbrk(0);
    if (sbrk(PAGE - (uintptr_t)heap_base % PAGE) == (void *)-1) die("sbrk");
    heap_base = sbrk((intptr_t)(heap_pages * PAGE));
    if (heap_base == (char *)-1) die("sbrk");
    int r = add(heap_base, heap_pages, 1, 1, 0);
    fill(&regions[r], 70);
}

static pthread_barrier_t ready;
static char *thread_buffers[THREADS];

static void *stack_thread(void *argument) {
    char buffer[192 * 1024] __attribute__((aligned(4096)));
    /* Volatile through the table: the compiler must keep it. */
    *(char *volatile *)&thread_buffers[(intptr_t)argument] = buffer;
    memset(buffer, (int)(intptr_t)argument + 1, sizeof buffer / 2);
    pthread_barrier_wait(&ready);
    for (;;) pause();
}

static void setup_stacks(void) {
    pthread_attr_t attr;
    pthread_attr_init(&attr);
    pthread_attr_setstacksize(&attr, 256 * 1024);
    pthread_barrier_init(&ready, NULL, THREADS + 1);
    for (intptr_t i = 0; i < THREADS; i++) {
        pthread_t thread;
        if (pthread_create(&thread, &attr, stack_thread, (void *)i)) die("pthread_create");
    }
    pthread_barrier_wait(&ready);
    for (int i = 0; i < THREADS; i++) add(thread_buffers[i], 192 / 4, 1, 1, 0);
}

static void setup_file(const char *scratch) {
    char path[512], block[PAGE];
    size_t pages = (16 << 20) / PAGE;
    snprintf(path, sizeof path, "%s/private-file", scratch);
    int fd = open(path, O_RDWR | O_CREAT | O_TRUNC, 0600);
    if (fd < 0) die("open private-file");
    for (size_t page = 0; page < pages; page++) {
        memset(block, (int)(page % 251) + 1, PAGE);
        if (write(fd, block, PAGE) != PAGE) die("write private-file");
    }
    char *p = mmap(NULL, pages * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE, fd, 0);
    if (p == MAP_FAILED) die("mmap private-file");
    /* A third COWed, a third read, a third never touched: clean file pages belong into no image. */
    int r = add(p, pages / 3, 1, 1, 0);
    fill(&regions[r], 50);
    volatile char sink = 0;
    for (size_t page = pages / 3; page < 2 * (pages / 3); page++) sink += p[page * PAGE];
    /* COWed, then made read-only, as a RELRO segment is. */
    char *q = mmap(NULL, 64 * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE, fd, 0);
    if (q == MAP_FAILED) die("mmap private-file");
    r = add(q, 64, 1, 1, 0);
    fill(&regions[r], 50);
    if (mprotect(q, 64 * PAGE, PROT_READ)) die("mprotect");
    regions[r].writable = 0;
    close(fd);
}

static void setup_prot_none(void) {
    char *p = map(8 << 20, 0);
    int r = add(p, (8 << 20) / PAGE, 1, 1, 0);
    fill(&regions[r], 50);
    if (mprotect(p, 8 << 20, PROT_NONE)) die("mprotect");
    regions[r].writable = 0;
}

static void setup_sparse(void) {
    char *p = map(SPARSE_SIZE, MAP_NORESERVE);
    int r = add(p, SPARSE_PAGES, SPARSE_SIZE / PAGE / SPARSE_PAGES, 1, 0);
    fill(&regions[r], 25);
}

static void setup_vmas(void) {
    size_t pages = 10000;
    char *p = map(pages * PAGE, 0);
    int r = add(p, pages, 1, 1, 0);
    fill(&regions[r], 80);
    for (size_t page = 0; page < pages; page += 2)
        if (mprotect(p + page * PAGE, PAGE, PROT_READ)) die("mprotect");
    regions[r].writable = 0; /* half of it: all writes go the careful way */
}

/* Memory that others may change: seen by two mappings of which one is read-only, by a child, and by write(2). */
/* The id of the next segment is 0, if that is free: so is its inode number, as that of the first segment of every boot. */
static void first_segment(void) {
    int next = open("/proc/sys/kernel/shm_next_id", O_WRONLY);
    if (next >= 0 && write(next, "0", 1) == 1) close(next);
}

static void setup_shared(void) {
    size_t pages = 512, size = pages * PAGE;
    int prot = PROT_READ | PROT_WRITE;
    char *anonymous = mmap(NULL, size, prot, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (anonymous == MAP_FAILED) die("mmap shared");
    int r = add(anonymous, pages, 1, 1, 0);
    fill(&regions[r], 30);
    shared_memfd = memfd_create("shared", MFD_CLOEXEC);
    if (shared_memfd < 0 || ftruncate(shared_memfd, (off_t)(2 * size))) die("memfd");
    char *memfd = mmap(NULL, size, prot, MAP_SHARED, shared_memfd, (off_t)(size / 2));
    if (memfd == MAP_FAILED) die("mmap memfd");
    r = add(memfd, pages, 1, 1, 0);
    fill(&regions[r], 30);
    if (mmap(NULL, size, PROT_READ, MAP_SHARED, shared_memfd, 0) == MAP_FAILED) die("mmap memfd again");
    first_segment();
    int id = shmget(IPC_PRIVATE, size, IPC_CREAT | 0600);
    char *segment = id < 0 ? (char *)-1 : shmat(id, NULL, 0);
    if (segment == (char *)-1) die("shmat");
    if (shmctl(id, IPC_RMID, NULL)) die("shmctl");
    r = add(segment, pages, 1, 1, 0);
    fill(&regions[r], 30);
    /* Shared and sparse: holes must stay holes. */
    if (mmap(NULL, 16UL << 30, prot, MAP_SHARED | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0) == MAP_FAILED) die("mmap sparse");
    if (pipe(to_sharer) || pipe(from_sharer)) die("pipe");
    if (!fork()) {
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        uint64_t seed;
        while (read(to_sharer[0], &seed, sizeof seed) == sizeof seed) {
            random_state = seed;
            for (int i = 0; i < 20; i++) {
                uint64_t value = rnd();
                memcpy(anonymous + rnd() % pages * PAGE, &value, 8);
                memcpy(segment + rnd() % pages * PAGE, &value, 8);
                /* Where no mapping of the parent's shows it, too. */
                if (pwrite(shared_memfd, &value, 8, (off_t)(rnd() % (2 * pages) * PAGE)) != 8) _exit(1);
            }
            if (write(from_sharer[1], "x", 1) != 1) break;
        }
        _exit(0);
    }
}

/* The other process and write(2) change it. */
static void dirty_shared(uint64_t seed) {
    char done;
    if (write(to_sharer[1], &seed, sizeof seed) != sizeof seed || read(from_sharer[0], &done, 1) != 1) die("sharer");
}

static int pick_arena(void) {
    int candidates[MAX_REGIONS], n = 0;
    for (int i = 0; i < region_count; i++)
        if (regions[i].arena && regions[i].pages > 0) candidates[n++] = i;
    return n ? candidates[rnd() % (unsigned)n] : -1;
}

/* A free place of `size` bytes, 2 MiB-aligned. */
static char *aligned_hole(size_t size) {
    char *p = map(size + HUGE_SIZE, 0);
    char *aligned = (char *)(((uintptr_t)p + HUGE_SIZE - 1) & ~(uintptr_t)(HUGE_SIZE - 1));
    if (munmap(p, size + HUGE_SIZE)) die("munmap");
    return aligned;
}

static void layout_step(void) {
    int i = pick_arena();
    struct region *r = i < 0 ? NULL : &regions[i];
    unsigned op = (unsigned)(rnd() % 13);
    size_t half = r ? r->pages / 2 : 0;
    if (!r) op = rnd() % 2;
    switch (op) {
    case 0: case 1: { /* a new mapping, sometimes of whole page tables */
        size_t size = rnd() % 4 ? (1 + rnd() % 256) * PAGE : 2 * HUGE_SIZE;
        int n = add(map(size, 0), size / PAGE, 1, 1, 1);
        if (n >= 0) fill(&regions[n], (int)(rnd() % 100));
        break;
    }
    case 2: /* the second half goes */
        if (half && munmap(r->base + half * PAGE, (r->pages - half) * PAGE)) die("munmap");
        if (half) r->pages = half;
        break;
    case 3: /* all of it goes */
        if (munmap(r->base, r->pages * PAGE)) die("munmap");
        *r = regions[--region_count];
        break;
    case 4: { /* grow, moving if need be */
        size_t more = 1 + rnd() % 128;
        char *p = mremap(r->base, r->pages * PAGE, (r->pages + more) * PAGE, MREMAP_MAYMOVE);
        if (p == MAP_FAILED) die("mremap grow");
        *r = (struct region){p, r->pages + more, 1, r->writable, 1};
        break;
    }
    case 5: /* shrink */
        if (half && mremap(r->base, r->pages * PAGE, half * PAGE, 0) == MAP_FAILED) die("mremap shrink");
        if (half) r->pages = half;
        break;
    case 6: case 7: { /* move: of whole page tables, where source and destination are 2 MiB-aligned */
        char *to = aligned_hole(r->pages * PAGE);
        char *p = mremap(r->base, r->pages * PAGE, r->pages * PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, to);
        if (p == MAP_FAILED) die("mremap move");
        r->base = p;
        break;
    }
    case 8: { /* move, the old mapping stays and is empty */
        char *p = mremap(r->base, r->pages * PAGE, r->pages * PAGE, MREMAP_MAYMOVE | MREMAP_DONTUNMAP, NULL);
        if (p == MAP_FAILED) die("mremap dontunmap");
        char *old = r->base;
        r->base = p;
        if (r->writable) add(old, r->pages, 1, 1, 1);
        break;
    }
    case 9: /* read-only, or back */
        r->writable = !r->writable;
        if (mprotect(r->base, r->pages * PAGE, PROT_READ | (r->writable ? PROT_WRITE : 0))) die("mprotect");
        break;
    case 10: /* dropped pages read as zeroes */
        if (half && madvise(r->base + half / 2 * PAGE, half * PAGE, MADV_DONTNEED)) die("madvise");
        break;
    case 11: { /* another mapping in the same place */
        if (mmap(r->base, r->pages * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) ==
            MAP_FAILED)
            die("mmap fixed");
        madvise(r->base, r->pages * PAGE, MADV_NOHUGEPAGE);
        r->writable = 1;
        fill(r, (int)(rnd() % 30));
        break;
    }
    case 12: /* may be dropped at any later time, unless written to */
        if (half && r->writable) madvise(r->base, half * PAGE, MADV_FREE);
        break;
    }
    if (heap_base && rnd() % 3 == 0) {
        size_t pages = (16 << 20) / PAGE / 2 + rnd() % (16 << 20) / PAGE;
        if (brk(heap_base + pages * PAGE)) die("brk");
        for (int n = 0; n < region_count; n++)
            if (regions[n].base == heap_base) regions[n].pages = pages;
        heap_pages = pages;
    }
}

static uint64_t sum(void) {
    static char page_copy[PAGE];
    uint64_t hash = 0xcbf29ce484222325ULL;
    for (int i = 0; i < region_count; i++) {
        for (size_t page = 0; page < regions[i].pages; page++) {
            off_t at = (off_t)(uintptr_t)(regions[i].base + page * regions[i].step * PAGE);
            if (pread(self_mem, page_copy, PAGE, at) != PAGE) die("read /proc/self/mem");
            for (int word = 0; word < PAGE / 8; word++) {
                uint64_t value;
                memcpy(&value, page_copy + word * 8, 8);
                hash = (hash ^ value) * 0x100000001b3ULL;
            }
        }
    }
    return hash;
}

int main(int argc, char **argv) {
    static char in[4096], out[4096];
    setvbuf(stdin, in, _IOFBF, sizeof in);
    setvbuf(stdout, out, _IOLBF, sizeof out);
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    if (argc != 3) return 2;
    self_mem = open("/proc/self/mem", O_RDWR | O_CLOEXEC);
    if (self_mem < 0) die("open /proc/self/mem");
    random_state = 1;
    /* malloc by mmap only: brk is ours to move. */
    mallopt(M_MMAP_THRESHOLD, 0);
    if (strstr(argv[1], "heap")) setup_heap();
    if (strstr(argv[1], "anon")) setup_anon();
    if (strstr(argv[1], "file")) setup_file(argv[2]);
    if (strstr(argv[1], "prot-none")) setup_prot_none();
    if (strstr(argv[1], "sparse")) setup_sparse();
    if (strstr(argv[1], "vmas")) setup_vmas();
    if (strstr(argv[1], "shared")) setup_shared();
    if (strstr(argv[1], "stacks")) setup_stacks();
    printf("ready\n");

    char line[256];
    while (fgets(line, sizeof line, stdin)) {
        unsigned long long seed = 0, count = 0;
        if (sscanf(line, "dirty %llu %llu", &seed, &count) == 2) {
            random_state = seed;
            for (unsigned long long i = 0; i < count && region_count; i++) {
                struct region *r = &regions[rnd() % (unsigned)region_count];
                if (r->pages) write_word(r, rnd() % r->pages);
            }
            if (shared_memfd >= 0) dirty_shared(seed);
            printf("ok\n");
        } else if (sscanf(line, "layout %llu", &seed) == 1) {
            random_state = seed;
            for (unsigned steps = 4 + rnd() % 12; steps; steps--) layout_step();
            printf("ok\n");
        } else if (strncmp(line, "sum", 3) == 0) {
            printf("sum %016llx\n", (unsigned long long)sum());
        } else if (strncmp(line, "quit", 4) == 0) {
            return 0;
        } else {
            printf("error unknown command\n");
        }
    }
    return 0;
}
