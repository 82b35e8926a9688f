/* Changes that each show in one way only. `deeds SCRATCH_DIRECTORY` prints `ready`; each command is answered by `done`.
 *
 *   touch     one page is written to
 *   truncate  another process cuts the file under a private mapping: copied pages vanish
 *   collapse  another process makes a huge page of small ones that nobody has written to (or `cannot`)
 *   drop      it drops pages itself, by madvise
 *   write     another process writes into the memory by process_vm_writev
 *   move      4 MiB move over others, both 2 MiB-aligned
 *   replace   another mapping, all zeroes, takes the place of one
 *   stack     its stack grows, in a fault
 *   ring      it makes an io_uring and closes it (or `cannot`)
 *   island    answers with the address of pages that it does not touch
 *   exec      itself, anew
 *   storm N   N layout calls, and at last one page is written to */
#define _GNU_SOURCE
#include <alloca.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/io_uring.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

#ifndef MADV_COLLAPSE
#define MADV_COLLAPSE 25
#endif

enum { PAGE = 4096, HUGE = 2 << 20 };

static char *touched, *collapsed, *written, *dropped, *to, *from, *replaced, *file_map;
static int file, ask[2], answer[2];

static void die(const char *what) {
    printf("error %s: %s\n", what, strerror(errno));
    exit(1);
}

/* Small pages full of `value`, aligned, apart from all others. */
static char *area(size_t size, int value) {
    char *p = mmap(NULL, size + 3 * HUGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) die("mmap");
    char *at = (char *)(((uintptr_t)p + 2 * HUGE - 1) & ~(uintptr_t)(HUGE - 1));
    if (mprotect(at, size, PROT_READ | PROT_WRITE) || madvise(at, size, MADV_NOHUGEPAGE)) die("mprotect");
    memset(at, value, size);
    return at;
}

static long advise(int target, char *at, size_t size, int advice) {
    int fd = (int)syscall(SYS_pidfd_open, target, 0);
    struct iovec vec = {at, size};
    return fd < 0 ? -1 : syscall(SYS_process_madvise, fd, &vec, 1, advice, 0);
}

/* Does to its parent what it is asked for. */
static void other(int target) {
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    char deed, byte = 77;
    while (read(ask[0], &deed, 1) == 1) {
        int good = 0;
        struct iovec local = {&byte, 1}, remote = {written + 5 * PAGE, 1};
        switch (deed) {
        case 't': good = ftruncate(file, 0) == 0; break;
        case 'c': good = advise(target, collapsed, HUGE, MADV_COLLAPSE) == HUGE; break;
        case 'w': good = process_vm_writev(target, &local, 1, &remote, 1, 0) == 1; break;
        }
        int result = good ? 0 : errno;
        if (write(answer[1], &result, sizeof result) != sizeof result) break;
    }
    _exit(0);
}

static int let_other(char deed) {
    int result;
    if (write(ask[1], &deed, 1) != 1 || read(answer[0], &result, sizeof result) != sizeof result) die("other");
    return result;
}

/* Not inlined, and deeper than the stack has ever been. */
static __attribute__((noinline)) int deep(size_t bytes) {
    volatile char *stack = alloca(bytes);
    for (size_t i = 0; i < bytes; i += PAGE) stack[bytes - 1 - i] = 1;
    return stack[PAGE - 1];
}

int main(int argc, char **argv) {
    static char in[4096];
    setvbuf(stdin, in, _IOFBF, sizeof in);
    setvbuf(stdout, NULL, _IOLBF, 0);
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    if (argc != 2) return 2;
    char path[4096], self[4096];
    ssize_t length = readlink("/proc/self/exe", self, sizeof self - 1);
    if (length < 0) die("readlink");
    self[length] = 0;
    snprintf(path, sizeof path, "%s/deeds", argv[1]);
    file = open(path, O_RDWR | O_CREAT, 0600);
    if (file < 0 || ftruncate(file, 16 * PAGE)) die("file");
    touched = area(HUGE, 1), collapsed = area(HUGE, 2), written = area(HUGE, 3), dropped = area(HUGE, 4);
    replaced = area(HUGE, 5), to = area(2 * HUGE, 6), from = area(2 * HUGE, 7);
    file_map = area(HUGE, 8);
    if (mmap(file_map, 16 * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_FIXED, file, 0) == MAP_FAILED) die("map file");
    memset(file_map, 9, 16 * PAGE);
    if (pipe(ask) || pipe(answer)) die("pipe");
    int me = getpid();
    int child = fork();
    if (!child) other(me);
    /* Unshares every page from the child: no write is the first after the fork. */
    char *all[] = {touched, collapsed, written, dropped, replaced, file_map, to, to + HUGE, from, from + HUGE};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++)
        for (size_t page = 0; page < (all[i] == file_map ? 16 : HUGE / PAGE); page++)
            ((volatile char *)all[i])[page * PAGE] ^= 0x40;
    printf("ready\n");

    char line[64];
    while (fgets(line, sizeof line, stdin)) {
        unsigned long count;
        int failed = 0;
        line[strcspn(line, "\n")] = 0;
        if (!strcmp(line, "touch")) touched[5 * PAGE] = 99;
        else if (!strcmp(line, "truncate")) failed = let_other('t');
        else if (!strcmp(line, "collapse")) {
            /* Not before: khugepaged would be first. Without huge pages in the kernel it fails, and so does the rest. */
            if (madvise(collapsed, HUGE, MADV_HUGEPAGE)) errno = 0;
            failed = let_other('c');
        } else if (!strcmp(line, "drop")) failed = madvise(dropped, 16 * PAGE, MADV_DONTNEED) ? errno : 0;
        else if (!strcmp(line, "write")) failed = let_other('w');
        else if (!strcmp(line, "move")) {
            if (mremap(from, 2 * HUGE, 2 * HUGE, MREMAP_MAYMOVE | MREMAP_FIXED, to) != to) failed = errno;
        } else if (!strcmp(line, "replace")) {
            char *p = mmap(replaced, HUGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
            if (p != replaced) failed = errno;
        } else if (!strcmp(line, "stack")) {
            if (deep(600 * 1024) != 1) failed = ENOMEM;
        } else if (!strcmp(line, "ring")) {
            struct io_uring_params params = {0};
            int ring = (int)syscall(SYS_io_uring_setup, 8, &params);
            if (ring < 0) failed = errno;
            else close(ring);
        } else if (!strcmp(line, "island")) {
            printf("%lu\n", (unsigned long)(written + 8 * PAGE));
            continue;
        } else if (!strcmp(line, "exec")) {
            kill(child, SIGKILL);
            execl(self, argv[0], argv[1], (char *)NULL);
            failed = errno;
        } else if (sscanf(line, "storm %lu", &count) == 1) {
            for (; count; count--) {
                char *p = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
                if (p == MAP_FAILED || munmap(p, PAGE)) die("storm");
            }
            touched[5 * PAGE] = 99;
        } else die("unknown command");
        if (failed) printf("cannot %s: %s\n", line, strerror(failed));
        else printf("done\n");
    }
    return 0;
}
