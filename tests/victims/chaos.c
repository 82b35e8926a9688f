/* Everything at once, from a seed: `chaos SEED SCRATCH_DIRECTORY` runs threads that change their memory in every way
 * they know, and a sibling process that writes into it. Prints `ready`; then answers a line to each command on stdin:
 *   pause   the sibling stops writing (the threads go on: a stop of the process stops them)
 *   go      it goes on
 *   count   how many steps were made
 * No thread touches another's memory; what each page must hold is what it holds when the process stands still. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
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

enum { PAGE = 4096, HUGE_SIZE = 2 << 20, REGIONS = 48, SIBLING_PAGES = 2048 };

struct control { atomic_int pause, paused; atomic_ulong steps; };
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

/* Another process writes into this one. */
static void sibling(pid_t target, uint64_t seed) {
    char path[64];
    random_state = seed;
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    snprintf(path, sizeof path, "/proc/%d/mem", (int)target);
    int mem = open(path, O_WRONLY);
    for (;;) {
        atomic_store(&control->paused, atomic_load(&control->pause));
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

int main(int argc, char **argv) {
    static char in[4096], out[4096];
    /* No malloc: the heap belongs to one thread. */
    setvbuf(stdin, in, _IOFBF, sizeof in);
    setvbuf(stdout, out, _IOLBF, sizeof out);
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    if (argc != 3) return 2;
    uint64_t seed = strtoull(argv[1], NULL, 0);
    scratch = argv[2];
    control = map(PAGE, MAP_SHARED | MAP_ANONYMOUS, -1);
    sibling_memory = map(SIBLING_PAGES * PAGE, ANON, -1);
    memset(sibling_memory, 1, SIBLING_PAGES * PAGE / 2);
    pid_t self = getpid();
    if (!fork()) sibling(self, seed);
    void *(*threads[])(void *) = {layout_thread, layout_thread, kernel_thread, file_thread, fork_thread, stack_thread};
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
            while (atomic_load(&control->paused) != pause) usleep(200);
            printf("ok\n");
        } else if (!strncmp(line, "count", 5)) {
            printf("%lu\n", atomic_load(&control->steps));
        } else {
            printf("error unknown command\n");
        }
    }
    return 0;
}
