/* A process that changes its own layout in one named way a command.
 *
 *   layout SCRATCH_DIRECTORY
 *
 * Commands on stdin, each answered by a line on stdout: see main(). No malloc after the start: brk belongs to us. */
#define _GNU_SOURCE
#include <alloca.h>
#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/shm.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#ifndef MREMAP_DONTUNMAP
#define MREMAP_DONTUNMAP 4
#endif
#ifndef PR_SET_VMA
#define PR_SET_VMA 0x53564d41
#define PR_SET_VMA_ANON_NAME 0
#endif

enum { PAGE = 4096, AREA = 64, HUGE = 2 << 20 };

static char *area, *moved, *kept, *file_map, *linear, *shm, *table, *holes;
static size_t area_pages = AREA;
static char *brk_base;
static int file, shared_file;

static void die(const char *what) {
    printf("error %s: %s\n", what, strerror(errno));
    fflush(stdout);
}

static char *map(size_t bytes, int prot, int flags, int fd) {
    char *at = mmap(NULL, bytes, prot, flags, fd, 0);
    if (at == MAP_FAILED) die("mmap");
    return at;
}

static char *anonymous(size_t pages) {
    return map(pages * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1);
}

/* A page table's worth of small pages full of `value` at `at`, with or without MAP_FIXED. */
static char *filled(char *at, int fixed, int value) {
    char *p = mmap(at, HUGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | fixed, -1, 0);
    if (p == MAP_FAILED) return p;
    madvise(p, HUGE, MADV_NOHUGEPAGE);
    memset(p, value, HUGE);
    return p;
}

/* For 2 seconds: maps pages, unmaps them, maps more of them at the same address, and moves them all. */
static int remap(void) {
    enum { FEW = 10 * PAGE, MORE = 20 * PAGE };
    const int prot = PROT_READ | PROT_WRITE, flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED;
    char *at = anonymous(64);
    munmap(at, 64 * PAGE);
    at += 16 * PAGE;
    struct timespec start, now;
    clock_gettime(CLOCK_MONOTONIC, &start);
    do {
        if (mmap(at, FEW, prot, flags, -1, 0) != at) return 0;
        *at = 1;
        munmap(at, FEW);
        if (mmap(at, MORE, prot, flags, -1, 0) != at) return 0;
        at[MORE - 1] = 1;
        char *to = mremap(at, MORE, MORE, MREMAP_MAYMOVE | MREMAP_DONTUNMAP, 0);
        if (to == MAP_FAILED) return 0;
        munmap(to, MORE);
        munmap(at, MORE);
        clock_gettime(CLOCK_MONOTONIC, &now);
    } while ((now.tv_sec - start.tv_sec) * 1000 + (now.tv_nsec - start.tv_nsec) / 1000000 < 2000);
    return 1;
}

/* Not inlined, and deeper than the stack has ever been. */
static __attribute__((noinline)) int deep(size_t bytes) {
    volatile char *stack = alloca(bytes);
    for (size_t i = 0; i < bytes; i += PAGE) stack[bytes - 1 - i] = 1;
    return stack[PAGE - 1];
}

static int run(const char *command) {
    if (!strcmp(command, "mmap")) {
        return (area = anonymous(AREA)) != MAP_FAILED;
    } else if (!strcmp(command, "touch")) {
        memset(area, 7, area_pages * PAGE);
    } else if (!strcmp(command, "mmap-fixed-over")) {
        return mmap(area + 4 * PAGE, 2 * PAGE, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) != MAP_FAILED;
    } else if (!strcmp(command, "mmap-file")) {
        return (file_map = map(8 * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE, file)) != MAP_FAILED;
    } else if (!strcmp(command, "mmap-shared")) {
        return (linear = map(8 * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, shared_file)) != MAP_FAILED;
    } else if (!strcmp(command, "munmap-middle")) {
        return munmap(area + 8 * PAGE, 4 * PAGE) == 0;
    } else if (!strcmp(command, "munmap-fill")) {
        return mmap(area + 8 * PAGE, 4 * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0)
            != MAP_FAILED;
    } else if (!strcmp(command, "mprotect-split")) {
        return mprotect(area + 16 * PAGE, 4 * PAGE, PROT_READ) == 0;
    } else if (!strcmp(command, "mprotect-join")) {
        return mprotect(area + 16 * PAGE, 4 * PAGE, PROT_READ | PROT_WRITE) == 0;
    } else if (!strcmp(command, "mprotect-none")) {
        return mprotect(area + 20 * PAGE, PAGE, PROT_NONE) == 0;
    } else if (!strcmp(command, "mremap-shrink")) {
        moved = anonymous(32);
        return mremap(moved, 32 * PAGE, 16 * PAGE, 0) == moved;
    } else if (!strcmp(command, "mremap-grow")) {
        return (moved = mremap(moved, 16 * PAGE, 24 * PAGE, MREMAP_MAYMOVE)) != MAP_FAILED;
    } else if (!strcmp(command, "mremap-move")) {
        char *to = anonymous(24);
        return (moved = mremap(moved, 24 * PAGE, 24 * PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, to)) == to;
    } else if (!strcmp(command, "mremap-dontunmap")) {
        char *to = mremap(moved, 24 * PAGE, 24 * PAGE, MREMAP_MAYMOVE | MREMAP_DONTUNMAP, NULL);
        kept = moved;
        moved = to;
        return to != MAP_FAILED;
    } else if (!strcmp(command, "mremap-table")) {
        /* Whole page tables: 2 MiB-aligned source and destination. */
        char *wide = map(8L * HUGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1);
        uintptr_t aligned = ((uintptr_t)wide + HUGE - 1) & ~(uintptr_t)(HUGE - 1);
        char *from = mmap((void *)aligned, HUGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
        if (from == MAP_FAILED) return 0;
        madvise(from, HUGE, MADV_NOHUGEPAGE);
        memset(from, 3, HUGE);
        table = mremap(from, HUGE, HUGE, MREMAP_MAYMOVE | MREMAP_FIXED, from + 4L * HUGE);
        return table != MAP_FAILED;
    } else if (!strcmp(command, "holes")) {
        /* Four islands of one page table each, 2 MiB-aligned. */
        char *wide = map(13L * HUGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1);
        holes = (char *)(((uintptr_t)wide + HUGE - 1) & ~(uintptr_t)(HUGE - 1));
        for (int i = 0; i < 4; i++)
            if (filled(holes + 2L * i * HUGE, MAP_FIXED, i + 1) == MAP_FAILED) return 0;
    } else if (!strcmp(command, "holes-reuse")) {
        char *a = holes, *b = holes + 2L * HUGE, *c = holes + 4L * HUGE, *d = holes + 6L * HUGE;
        /* The first moves away, and another takes its place; a whole page table moves into the hole of the second; the
         * fourth finds itself another place. Nothing of this makes a moved page soft-dirty. */
        if (mremap(a, HUGE, HUGE, MREMAP_MAYMOVE | MREMAP_FIXED, holes + 8L * HUGE) == MAP_FAILED) return 0;
        if (filled(a, 0, 9) != a || munmap(b, HUGE)) return 0;
        if (mremap(c, HUGE, HUGE, MREMAP_MAYMOVE | MREMAP_DONTUNMAP, b) != b) return 0;
        char *moved_d = mremap(d, HUGE, 2 * HUGE, MREMAP_MAYMOVE);
        return moved_d != MAP_FAILED && moved_d != d && filled(d, 0, 10) == d;
    } else if (!strcmp(command, "brk-grow")) {
        return brk(brk_base + 37 * PAGE + 100) == 0;
    } else if (!strcmp(command, "brk-more")) {
        return brk(brk_base + 50 * PAGE) == 0;
    } else if (!strcmp(command, "brk-shrink")) {
        return brk(brk_base + 5 * PAGE) == 0;
    } else if (!strcmp(command, "madvise-dontneed")) {
        return madvise(area, 2 * PAGE, MADV_DONTNEED) == 0;
    } else if (!strcmp(command, "madvise-free")) {
        return madvise(area + 24 * PAGE, 4 * PAGE, MADV_FREE) == 0;
    } else if (!strcmp(command, "madvise-dontfork")) {
        return madvise(area + 32 * PAGE, 4 * PAGE, MADV_DONTFORK) == 0;
    } else if (!strcmp(command, "madvise-dofork")) {
        return madvise(area + 32 * PAGE, 4 * PAGE, MADV_DOFORK) == 0;
    } else if (!strcmp(command, "mlock")) {
        return mlock(area + 40 * PAGE, 2 * PAGE) == 0;
    } else if (!strcmp(command, "munlock")) {
        return munlock(area + 40 * PAGE, 2 * PAGE) == 0;
    } else if (!strcmp(command, "name")) {
        /* EINVAL without CONFIG_ANON_VMA_NAME: nothing happens then. */
        prctl(PR_SET_VMA, PR_SET_VMA_ANON_NAME, area + 44 * PAGE, 2 * PAGE, "a name");
    } else if (!strcmp(command, "stack")) {
        return deep(600 * 1024) == 1;
    } else if (!strcmp(command, "shmat")) {
        /* Its id, and so its inode number, is 0, if that is free: as that of the first segment of every boot. */
        int next = open("/proc/sys/kernel/shm_next_id", O_WRONLY);
        if (next >= 0 && write(next, "0", 1) == 1) close(next);
        int id = shmget(IPC_PRIVATE, 6 * PAGE, 0600);
        shm = shmat(id, NULL, 0);
        shmctl(id, IPC_RMID, NULL);
        return shm != (char *)-1;
    } else if (!strcmp(command, "shm-part")) {
        return munmap(shm + 5 * PAGE, PAGE) == 0;
    } else if (!strcmp(command, "shmdt")) {
        return shmdt(shm) == 0;
    } else if (!strcmp(command, "remap-file-pages")) {
        return syscall(SYS_remap_file_pages, linear, 2 * PAGE, 0, 4, 0) == 0;
    } else if (!strcmp(command, "fork")) {
        pid_t child = fork();
        if (child == 0) _exit(0);
        return child > 0;
    } else if (!strcmp(command, "many")) {
        /* More VMAs than one page of maps holds; every other page another protection. */
        char *wide = anonymous(2000);
        for (int i = 0; i < 2000; i += 2) mprotect(wide + (size_t)i * PAGE, PAGE, PROT_READ);
    } else if (!strcmp(command, "remap")) {
        return remap();
    } else if (!strcmp(command, "aio")) {
        unsigned long context = 0;
        return syscall(SYS_io_setup, 8, &context) == 0;
    } else {
        errno = EINVAL;
        return 0;
    }
    return 1;
}

int main(int argc, char **argv) {
    static char path[4096], line[256], self[64];
    if (argc < 2) return 2;
    setvbuf(stdin, NULL, _IONBF, 0);
    setvbuf(stdout, NULL, _IONBF, 0);
    snprintf(path, sizeof path, "%s/private-%d", argv[1], getpid());
    file = open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0600);
    snprintf(path, sizeof path, "%s/shared-%d", argv[1], getpid());
    shared_file = open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0600);
    if (file < 0 || shared_file < 0 || ftruncate(file, 8 * PAGE) || ftruncate(shared_file, 8 * PAGE)) return 3;
    brk_base = sbrk(0);
    snprintf(self, sizeof self, "/proc/self/exe");
    puts(getenv("LAYOUT_AGAIN") ? "again" : "ready");
    while (fgets(line, sizeof line, stdin)) {
        line[strcspn(line, "\n")] = 0;
        if (!strcmp(line, "quit")) return 0;
        if (!strcmp(line, "exec")) {
            setenv("LAYOUT_AGAIN", "1", 1);
            execl(self, argv[0], argv[1], (char *)NULL);
            die("exec");
        } else if (run(line)) {
            puts("ok");
        } else {
            die(line);
        }
    }
    return 0;
}
