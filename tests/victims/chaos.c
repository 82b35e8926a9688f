/* Everything at once, from a seed: `chaos SEED SCRATCH_DIRECTORY [SHADOWED_PAGES]` runs threads that change their memory in every way
 * they know, and a sibling process that writes into it. Prints `ready`; then answers a line to each command on stdin:
 *   pause   the sibling stops writing and asynchronous I/O ends (the threads go on: a stop of the process stops them)
 *   go      both go on
 *   poke    the sibling attaches by ptrace, writes a few words, and detaches
 *   aio, ring (unused and not mapped), uring, registered (buffers), userfaultfd: begin to use it; `cannot REASON`
 *           where the kernel will not
 *   calm    use none of these any more
 *   count   how many steps were made
 * No thread touches another's memory; what each page must hold is what it holds when the process stands still. One
 * thread keeps a shadow copy: how often it wrote each of its pages, from which it knows every word, and checks them all. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/aio_abi.h>
#include <linux/io_uring.h>
#include <linux/userfaultfd.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/ptrace.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <unistd.h>

#ifndef MREMAP_DONTUNMAP
#define MREMAP_DONTUNMAP 4
#endif
#ifndef MADV_COLD
#define MADV_COLD 20
#endif
#ifndef MADV_PAGEOUT
#define MADV_PAGEOUT 21
#endif

enum { PAGE = 4096, HUGE_SIZE = 2 << 20, REGIONS = 48, SIBLING_PAGES = 2048, ALIKE = 512 };

enum { CALM, AIO, RING, URING, REGISTERED, USERFAULTFD };
struct control { atomic_int pause, paused, poke, poked, want, using, failed, quiet; atomic_ulong steps; };
static struct control *control;
static const char *scratch;
static char *sibling_memory;

static __thread uint64_t random_state;
static uint64_t rnd(void) { /* splitmix64 */
    uint64_t z = (random_state += 0x9e3779b97f4a7c15ULL);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ULL;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebULL;
    return z ^ (z >> 31);
}

static void die(const char *what) {
    printf("error %s: %s\n", what, strerror(errno));
    _exit(1);
}

static void step(void) {
    atomic_fetch_add(&control->steps, 1);
    if (rnd() % 64 == 0) usleep(100);
}

static void write_pages(char *at, size_t pages, unsigned count) {
    while (pages && count--) {
        uint64_t value = rnd();
        memcpy(at + rnd() % pages * PAGE + rnd() % (PAGE / 8) * 8, &value, 8);
    }
}

static void *map(size_t size, int flags, int fd) {
    void *p = mmap(NULL, size, PROT_READ | PROT_WRITE, flags, fd, 0);
    if (p == MAP_FAILED) die("mmap");
    return p;
}

/* mremap takes one VMA at a time, or, since 6.17, moves several unless one has a userfaultfd: then it fails half way.
 * Advice and fixed mappings make several of one. */
static void several(void) {
    if (errno != EFAULT && errno != EINVAL) die("mremap");
}

#define ANON (MAP_PRIVATE | MAP_ANONYMOUS)

/* An mremap that fails may have unmapped its destination: nobody else may map something there until that is settled. */
static pthread_mutex_t layout = PTHREAD_MUTEX_INITIALIZER;

/* mmap, munmap, mremap of every kind, mprotect, madvise of every kind; some regions are of whole page tables. */
static void *layout_thread(void *seed) {
    struct { char *at; size_t pages; int writable; } r[REGIONS];
    int n = 0;
    random_state = (uintptr_t)seed;
    for (;; pthread_mutex_unlock(&layout), step()) {
        pthread_mutex_lock(&layout);
        int i = n ? (int)(rnd() % (unsigned)n) : 0;
        size_t size = n ? r[i].pages * PAGE : 0, half = n ? r[i].pages / 2 : 0;
        char *p;
        switch (n < 4 ? 0 : rnd() % 22) {
        case 0: case 1:
            if (n == REGIONS) break;
            r[n].pages = rnd() % 4 ? 1 + rnd() % 128 : (1 + rnd() % 2) * (HUGE_SIZE / PAGE);
            r[n].at = map(r[n].pages * PAGE, ANON, -1);
            r[n].writable = 1;
            write_pages(r[n].at, r[n].pages, (unsigned)(rnd() % r[n].pages));
            n++;
            break;
        case 2: case 3:
            if (munmap(r[i].at, size)) die("munmap");
            r[i] = r[--n];
            break;
        case 4:
            if (!half) break;
            if (munmap(r[i].at + half * PAGE, size - half * PAGE)) die("munmap half");
            r[i].pages = half;
            break;
        case 5: case 6: { /* grow, in place or moving */
            size_t more = rnd() % 64 + 1;
            p = mremap(r[i].at, size, size + more * PAGE, MREMAP_MAYMOVE);
            if (p == MAP_FAILED) { several(); break; }
            r[i].at = p;
            r[i].pages += more;
            break;
        }
        case 7:
            if (!half) break;
            if (mremap(r[i].at, size, half * PAGE, 0) == MAP_FAILED) { several(); break; }
            r[i].pages = half;
            break;
        case 8: case 9: { /* to a place of whole page tables */
            p = map(size + HUGE_SIZE, ANON, -1);
            char *to = (char *)(((uintptr_t)p + HUGE_SIZE - 1) & ~(uintptr_t)(HUGE_SIZE - 1));
            if (to > p) munmap(p, (size_t)(to - p));
            munmap(to + size, (size_t)(p + HUGE_SIZE - to));
            p = mremap(r[i].at, size, size, MREMAP_MAYMOVE | MREMAP_FIXED, to);
            if (p == MAP_FAILED) { /* perhaps after a part of it */
                several();
                munmap(to, size);
                munmap(r[i].at, size);
                r[i] = r[--n];
                break;
            }
            r[i].at = to;
            break;
        }
        case 10: { /* over another region's content: of whole page tables where both happen to be */
            int k = (int)(rnd() % (unsigned)n);
            if (k == i || r[k].pages < r[i].pages) break;
            p = mremap(r[i].at, size, size, MREMAP_MAYMOVE | MREMAP_FIXED, r[k].at);
            if (p == MAP_FAILED) { /* what was there may be gone, and some of it have come */
                several();
                munmap(r[i].at, size);
                p = mmap(r[k].at, r[k].pages * PAGE, PROT_READ | PROT_WRITE, ANON | MAP_FIXED, -1, 0);
                if (p == MAP_FAILED) die("mmap again");
                r[k].writable = 1;
                r[i] = r[--n];
                break;
            }
            if (r[k].pages > r[i].pages) munmap(r[k].at + size, (r[k].pages - r[i].pages) * PAGE);
            r[k].pages = r[i].pages;
            r[k].writable = r[i].writable;
            r[i] = r[--n];
            break;
        }
        case 11:
            if (n == REGIONS || !r[i].writable) break;
            p = mremap(r[i].at, size, size, MREMAP_MAYMOVE | MREMAP_DONTUNMAP, NULL);
            if (p == MAP_FAILED) { several(); break; }
            r[n] = r[i];
            r[n++].at = p;
            break;
        case 12: /* munmap, then the hole again: perhaps the same addresses */
            if (munmap(r[i].at, size)) die("munmap");
            r[i].at = map(size, ANON, -1);
            r[i].writable = 1;
            write_pages(r[i].at, r[i].pages, (unsigned)(rnd() % 8));
            break;
        case 13:
            r[i].writable = !r[i].writable;
            if (mprotect(r[i].at, size, PROT_READ | (r[i].writable ? PROT_WRITE : 0))) die("mprotect");
            break;
        case 14:
            if (madvise(r[i].at, half * PAGE, MADV_DONTNEED)) die("dontneed");
            break;
        case 15:
            madvise(r[i].at, size, MADV_FREE);
            break;
        case 16: {
            static const int advices[] = {MADV_COLD, MADV_PAGEOUT, MADV_WILLNEED, MADV_HUGEPAGE, MADV_NOHUGEPAGE,
                                          MADV_MERGEABLE, MADV_UNMERGEABLE, MADV_DONTDUMP, MADV_DODUMP, MADV_RANDOM,
                                          MADV_NORMAL, 22 /* POPULATE_READ */, 25 /* COLLAPSE */};
            madvise(r[i].at, size, advices[rnd() % (sizeof advices / sizeof *advices)]);
            break;
        }
        case 17: /* fixed, over what is there */
            if (mmap(r[i].at, half * PAGE + PAGE, PROT_READ | PROT_WRITE, ANON | MAP_FIXED, -1, 0) == MAP_FAILED)
                die("mmap fixed");
            if (!r[i].writable && half + 1 < r[i].pages) mprotect(r[i].at, half * PAGE + PAGE, PROT_READ);
            else r[i].writable = 1;
            break;
        default:
            if (r[i].writable) write_pages(r[i].at, r[i].pages, 1 + (unsigned)(rnd() % 16));
        }
    }
}

/* The kernel writes: read(2), O_DIRECT, pipes; and a heap that moves. */
static void *kernel_thread(void *seed) {
    size_t pages = 1024;
    char *buffer = map(pages * PAGE, ANON, -1), path[512];
    int random_fd = open("/dev/urandom", O_RDONLY), pair[2];
    random_state = (uintptr_t)seed;
    snprintf(path, sizeof path, "%s/direct", scratch);
    int fd = open(path, O_RDWR | O_CREAT | O_TRUNC, 0600);
    for (int i = 0; i < 64; i++)
        if (fd < 0 || write(fd, buffer, PAGE) != PAGE) die("write direct");
    fsync(fd);
    int direct = open(path, O_RDONLY | O_DIRECT); /* -1 where the file system has none */
    if (pipe(pair)) die("pipe");
    char *heap = sbrk(0);
    for (;; step()) {
        char *at = buffer + rnd() % (pages - 16) * PAGE;
        switch (rnd() % 6) {
        case 0: if (read(random_fd, at + rnd() % PAGE, 1 + rnd() % (4 * PAGE)) < 0) die("read"); break;
        case 1: {
            uint64_t fresh = rnd();
            if (pwrite(fd, &fresh, 8, (off_t)(rnd() % 64 * PAGE)) != 8) die("pwrite");
            if (direct >= 0) fdatasync(fd);
            if (direct >= 0 && pread(direct, at, 4 * PAGE, (off_t)(rnd() % 60 * PAGE)) < 0) die("direct");
            break;
        }
        case 2:
            if (write(pair[1], at, 5000) != 5000 || read(pair[0], at + PAGE, 5000) != 5000) die("pipe");
            break;
        case 3: {
            size_t grow = rnd() % 512;
            if (brk(heap + grow * PAGE)) die("brk");
            write_pages(heap, grow, (unsigned)(rnd() % 32));
            break;
        }
        default: write_pages(buffer, pages, 8);
        }
    }
}

/* Private pages of a file that is truncated and grown under them. */
static void *file_thread(void *seed) {
    size_t pages = 512;
    char path[512], block[PAGE];
    random_state = (uintptr_t)seed;
    snprintf(path, sizeof path, "%s/truncated", scratch);
    int fd = open(path, O_RDWR | O_CREAT | O_TRUNC, 0600);
    memset(block, 7, sizeof block);
    for (size_t i = 0; i < pages; i++)
        if (fd < 0 || write(fd, block, PAGE) != PAGE) die("write file");
    char *p = map(pages * PAGE, MAP_PRIVATE, fd);
    for (;; step()) {
        if (rnd() % 256 == 0) {
            size_t keep = pages / 2 + rnd() % (pages / 2);
            if (ftruncate(fd, (off_t)(keep * PAGE)) || ftruncate(fd, (off_t)(pages * PAGE))) die("ftruncate");
        }
        write_pages(p, pages, 4);
    }
}

/* Children share pages by COW, and change or exec. */
static void *fork_thread(void *seed) {
    size_t pages = 512;
    char *p = map(pages * PAGE, ANON, -1);
    random_state = (uintptr_t)seed;
    write_pages(p, pages, 400);
    for (;; step()) {
        if (rnd() % 8 == 0) {
            pid_t child = fork();
            if (child < 0) die("fork");
            if (child == 0) {
                write_pages(p, pages, 16);
                if (rnd() % 2) execl("/bin/true", "true", (char *)NULL);
                _exit(0);
            }
            write_pages(p, pages, 8);
            waitpid(child, NULL, 0);
        }
        write_pages(p, pages, 4);
        usleep(2000);
    }
}

/* Deep and shallow stacks. */
static int deep(int depth) {
    volatile char frame[2048];
    memset((void *)frame, (int)rnd(), sizeof frame);
    return depth ? deep(depth - 1) + frame[depth % 2048] : frame[0];
}
static void *stack_thread(void *seed) {
    random_state = (uintptr_t)seed;
    for (;; step()) {
        deep((int)(rnd() % 400));
        usleep(500);
    }
}

/* What word `word` of page `page` is after `version` writes to it: 0 before the first. */
static uint64_t shadowed(size_t page, uint32_t version, size_t word) {
    return version ? (page << 40 ^ (uint64_t)version << 16 ^ word) * 0x9e3779b97f4a7c15ULL : 0;
}

/* A shadow copy: every word of every page is known, and checked. */
static size_t shadow_pages = 16384;
static void *shadow_thread(void *seed) {
    enum { WORDS = 4, STRIDE = PAGE / 8 / WORDS };
    uint32_t *versions = map(shadow_pages * sizeof *versions, ANON, -1);
    uint64_t *p = map(shadow_pages * PAGE, ANON, -1);
    random_state = (uintptr_t)seed;
    for (size_t page = 0; page < shadow_pages; page += 2) {
        versions[page] = 1;
        for (size_t w = 0; w < WORDS; w++) p[page * 512 + w * STRIDE] = shadowed(page, 1, w);
    }
    for (;; step()) {
        size_t base = rnd() % shadow_pages;
        for (size_t i = 0; i < shadow_pages / 256; i++) {
            /* Neighbours and strangers. */
            size_t page = rnd() % 4 ? (base + i) % shadow_pages : rnd() % shadow_pages;
            uint32_t version = ++versions[page];
            for (size_t w = 0; w < WORDS; w++) p[page * 512 + w * STRIDE] = shadowed(page, version, w);
        }
        usleep(1000);
        if (rnd() % 256) continue;
        for (size_t page = 0; page < shadow_pages; page++)
            for (size_t w = 0; w < WORDS; w++)
                if (versions[page] && p[page * 512 + w * STRIDE] != shadowed(page, versions[page], w)) {
                    printf("error page %zu at %p is not what was written\n", page, (void *)(p + page * 512));
                    _exit(1);
                }
    }
}

/* Pages that are alike, for KSM to merge, and no longer are. */
static void *alike_thread(void *seed) {
    char *p = map((size_t)ALIKE * PAGE, ANON, -1);
    random_state = (uintptr_t)seed;
    madvise(p, (size_t)ALIKE * PAGE, MADV_MERGEABLE); /* EINVAL without KSM */
    for (;; step()) {
        memset(p + rnd() % ALIKE * PAGE, (int)(rnd() % 3), PAGE);
        usleep(2000);
    }
}

/* I/O that lands when it likes, in the one way that is asked for; 0 when that cannot be had. */
enum { IN_FLIGHT = 8, BLOCK = 16, RINGS = 2 * PAGE };
struct async {
    char *buffer;
    int file;
    aio_context_t aio;
    int ring;
    char *rings; /* submissions and completions in one mapping, as since Linux 5.4 */
    struct io_uring_sqe *entries;
    struct io_uring_params params;
    int uffd;
    int pending;
};

static int begin(struct async *a, int how) {
    if (how == AIO) return syscall(SYS_io_setup, IN_FLIGHT, &a->aio) == 0;
    if (how == USERFAULTFD) {
        struct uffdio_api api = {.api = UFFD_API};
        a->uffd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | 1 /* UFFD_USER_MODE_ONLY */);
        return a->uffd >= 0 && ioctl(a->uffd, UFFDIO_API, &api) == 0;
    }
    memset(&a->params, 0, sizeof a->params);
    a->ring = (int)syscall(SYS_io_uring_setup, IN_FLIGHT, &a->params);
    if (a->ring < 0) return 0;
    a->rings = NULL;
    if (how == RING) return 1;
    a->rings = mmap(NULL, RINGS, PROT_READ | PROT_WRITE, MAP_SHARED, a->ring, IORING_OFF_SQ_RING);
    a->entries = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, a->ring, (off_t)IORING_OFF_SQES);
    if (a->rings == MAP_FAILED || a->entries == MAP_FAILED) return 0;
    if (how == REGISTERED) {
        struct iovec vec = {a->buffer, (size_t)IN_FLIGHT * BLOCK * PAGE};
        if (syscall(SYS_io_uring_register, a->ring, 0 /* IORING_REGISTER_BUFFERS */, &vec, 1)) return 0;
    }
    return 1;
}

static void end(struct async *a, int how) {
    if (how == AIO) syscall(SYS_io_destroy, a->aio);
    if (how == USERFAULTFD) close(a->uffd);
    if (how == RING || how == URING || how == REGISTERED) close(a->ring);
    if (how == URING || how == REGISTERED) {
        munmap(a->rings, RINGS);
        munmap(a->entries, PAGE);
    }
    a->aio = 0;
}

static atomic_uint *word(struct async *a, unsigned offset) {
    return (atomic_uint *)(a->rings + offset);
}

/* Reads by io_uring, into registered buffers or others. */
static void submit_to_ring(struct async *a, int how) {
    unsigned tail = atomic_load(word(a, a->params.sq_off.tail)), mask = *word(a, a->params.sq_off.ring_mask);
    for (unsigned i = 0; i < IN_FLIGHT; i++) {
        struct io_uring_sqe *entry = &a->entries[(tail + i) & mask];
        memset(entry, 0, sizeof *entry);
        entry->opcode = how == REGISTERED ? IORING_OP_READ_FIXED : IORING_OP_READ;
        entry->fd = a->file;
        entry->addr = (uintptr_t)(a->buffer + (size_t)i * BLOCK * PAGE);
        entry->len = BLOCK * PAGE;
        entry->off = rnd() % 48 * PAGE;
        *word(a, a->params.sq_off.array + 4 * ((tail + i) & mask)) = (tail + i) & mask;
    }
    atomic_store(word(a, a->params.sq_off.tail), tail + IN_FLIGHT);
    int submitted = (int)syscall(SYS_io_uring_enter, a->ring, IN_FLIGHT, 0, 0, NULL, 0);
    if (submitted > 0) a->pending = submitted;
}

static void collect_from_ring(struct async *a) {
    while (a->pending > 0) {
        syscall(SYS_io_uring_enter, a->ring, 0, 1, IORING_ENTER_GETEVENTS, NULL, 0);
        unsigned head = *word(a, a->params.cq_off.head), tail = atomic_load(word(a, a->params.cq_off.tail));
        a->pending -= (int)(tail - head);
        atomic_store(word(a, a->params.cq_off.head), tail);
    }
}

/* Reads by AIO, some of which are under way at any time. */
static void submit(struct async *a) {
    struct iocb control[IN_FLIGHT], *list[IN_FLIGHT];
    memset(control, 0, sizeof control);
    for (int i = 0; i < IN_FLIGHT; i++) {
        control[i].aio_fildes = (uint32_t)a->file;
        control[i].aio_lio_opcode = IOCB_CMD_PREAD;
        control[i].aio_buf = (uintptr_t)(a->buffer + (size_t)i * BLOCK * PAGE);
        control[i].aio_nbytes = BLOCK * PAGE;
        control[i].aio_offset = (int64_t)(rnd() % 48) * PAGE;
        list[i] = &control[i];
    }
    int submitted = (int)syscall(SYS_io_submit, a->aio, IN_FLIGHT, list);
    if (submitted > 0) a->pending = submitted;
}

static void collect(struct async *a) {
    struct io_event events[IN_FLIGHT];
    while (a->pending > 0) {
        int n = (int)syscall(SYS_io_getevents, a->aio, 1, IN_FLIGHT, events, NULL);
        if (n < 0 && errno != EINTR) die("io_getevents");
        if (n > 0) a->pending -= n;
    }
}

static void *async_thread(void *seed) {
    struct async a = {0};
    int how = CALM;
    char path[512];
    random_state = (uintptr_t)seed;
    a.buffer = map((size_t)IN_FLIGHT * BLOCK * PAGE, ANON, -1);
    snprintf(path, sizeof path, "%s/async", scratch);
    int fd = open(path, O_RDWR | O_CREAT | O_TRUNC, 0600);
    for (int i = 0; i < 64; i++) {
        for (int w = 0; w < PAGE; w++) a.buffer[w] = (char)rnd();
        if (fd < 0 || write(fd, a.buffer, PAGE) != PAGE) die("write async");
    }
    a.file = open(path, O_RDONLY | O_DIRECT);
    if (a.file < 0) a.file = fd;
    for (;; step()) {
        int want = atomic_load(&control->want);
        if (want != how) {
            end(&a, how);
            how = want;
            if (how != CALM && !begin(&a, how)) {
                atomic_store(&control->failed, errno);
                how = CALM;
                atomic_store(&control->want, CALM);
            }
            atomic_store(&control->using, how);
        }
        int pause = atomic_load(&control->pause);
        int rings = how == URING || how == REGISTERED;
        if (how == AIO && !pause) submit(&a);
        if (rings && !pause) submit_to_ring(&a, how);
        usleep(how == AIO || rings ? 50 : 1000);
        if (how == AIO) collect(&a);
        if (rings) collect_from_ring(&a);
        atomic_store(&control->quiet, pause);
    }
}

/* Another process, outside of the tree that is checkpointed, writes into this one. */
static void sibling(pid_t target, uint64_t seed) {
    char path[64];
    random_state = seed;
    snprintf(path, sizeof path, "/proc/%d/mem", (int)target);
    int mem = open(path, O_WRONLY);
    for (;;) {
        if (atomic_load(&control->poke) != atomic_load(&control->poked)) {
            int status;
            if (ptrace(PTRACE_ATTACH, target, 0, 0) || waitpid(target, &status, __WALL) != target) die("attach");
            for (int i = 0; i < 16; i++) {
                char *word = sibling_memory + rnd() % SIBLING_PAGES * PAGE + rnd() % 512 * 8;
                if (ptrace(PTRACE_POKEDATA, target, word, rnd())) die("poke");
            }
            if (ptrace(PTRACE_DETACH, target, 0, 0)) die("detach");
            atomic_store(&control->poked, atomic_load(&control->poke));
        }
        atomic_store(&control->paused, atomic_load(&control->pause));
        if (kill(target, 0)) _exit(0);
        if (atomic_load(&control->paused)) {
            usleep(1000);
            continue;
        }
        uint64_t words[512];
        for (int i = 0; i < 512; i++) words[i] = rnd();
        char *at = sibling_memory + rnd() % (SIBLING_PAGES - 2) * PAGE + rnd() % 512 * 8;
        struct iovec ours = {words, 8 + rnd() % 4088}, theirs = {at, ours.iov_len};
        if (rnd() % 2) {
            if (process_vm_writev(target, &ours, 1, &theirs, 1, 0) < 0 && errno == ESRCH) _exit(0);
        } else if (mem >= 0 && pwrite(mem, words, ours.iov_len, (off_t)(uintptr_t)at) < 0 && errno == ESRCH) {
            _exit(0);
        }
        usleep((unsigned)(rnd() % 2000));
    }
}

static int use(const char *line) {
    static const char *ways[] = {"calm", "aio", "ring", "uring", "registered", "userfaultfd"};
    for (int how = CALM; how <= USERFAULTFD; how++)
        if (!strncmp(line, ways[how], strlen(ways[how])) && line[strlen(ways[how])] == '\n') return how;
    return -1;
}

int main(int argc, char **argv) {
    static char in[4096], out[4096];
    /* No malloc: the heap belongs to one thread. */
    setvbuf(stdin, in, _IOFBF, sizeof in);
    setvbuf(stdout, out, _IOLBF, sizeof out);
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    if (argc < 3) return 2;
    if (argc > 3) shadow_pages = strtoul(argv[3], NULL, 0);
    uint64_t seed = strtoull(argv[1], NULL, 0);
    scratch = argv[2];
    control = map(PAGE, MAP_SHARED | MAP_ANONYMOUS, -1);
    sibling_memory = map(SIBLING_PAGES * PAGE, ANON, -1);
    memset(sibling_memory, 1, SIBLING_PAGES * PAGE / 2);
    pid_t self = getpid();
    pid_t parent = fork(); /* of the sibling, which becomes init's child */
    if (parent == 0) {
        if (!fork()) sibling(self, seed);
        _exit(0);
    }
    waitpid(parent, NULL, 0);
    void *(*threads[])(void *) = {layout_thread, layout_thread, kernel_thread, file_thread, fork_thread, stack_thread,
                                  shadow_thread, alike_thread, async_thread};
    for (size_t i = 0; i < sizeof threads / sizeof *threads; i++) {
        pthread_t thread;
        if (pthread_create(&thread, NULL, threads[i], (void *)(uintptr_t)(seed * 31 + i))) die("pthread_create");
    }
    printf("ready\n");
    char line[64];
    while (fgets(line, sizeof line, stdin)) {
        if (!strncmp(line, "pause", 5) || !strncmp(line, "go", 2)) {
            int pause = line[0] == 'p';
            atomic_store(&control->pause, pause);
            while (atomic_load(&control->paused) != pause || atomic_load(&control->quiet) != pause) usleep(200);
            printf("ok\n");
        } else if (!strncmp(line, "poke", 4)) {
            atomic_fetch_add(&control->poke, 1);
            while (atomic_load(&control->poked) != atomic_load(&control->poke)) usleep(200);
            printf("ok\n");
        } else if (use(line) >= 0) {
            int how = use(line);
            atomic_store(&control->failed, 0);
            atomic_store(&control->want, how);
            while (atomic_load(&control->using) != how && !atomic_load(&control->failed)) usleep(200);
            int failed = atomic_load(&control->failed);
            printf("%s%s\n", failed ? "cannot " : "ok", failed ? strerror(failed) : "");
        } else if (!strncmp(line, "count", 5)) {
            printf("%lu\n", atomic_load(&control->steps));
        } else {
            printf("error unknown command\n");
        }
    }
    return 0;
}
