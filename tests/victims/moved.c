/* What soft-dirty does not see: `moved` fills two areas of 4 MiB, both 2 MiB-aligned, with different bytes and prints
 * `ready`. At `move` the second is moved over the first by mremap: whole page tables move, and the kernel marks nothing. */
#define _GNU_SOURCE
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <unistd.h>

enum { SIZE = 4 << 20, HUGE_SIZE = 2 << 20 };

int main(void) {
    setvbuf(stdout, NULL, _IOLBF, 0);
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    /* A session of its own, as criu wants it. */
    setsid();
    char *p = mmap(NULL, 2 * SIZE + HUGE_SIZE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (p == MAP_FAILED) return 1;
    madvise(p, 2 * SIZE + HUGE_SIZE, MADV_NOHUGEPAGE);
    char *to = (char *)(((uintptr_t)p + HUGE_SIZE - 1) & ~(uintptr_t)(HUGE_SIZE - 1)), *from = to + SIZE;
    memset(to, 1, SIZE);
    memset(from, 2, SIZE);
    printf("ready\n");
    char line[64];
    while (fgets(line, sizeof line, stdin)) {
        if (strncmp(line, "move", 4) == 0) {
            if (mremap(from, SIZE, SIZE, MREMAP_MAYMOVE | MREMAP_FIXED, to) != to) return 1;
            printf("moved\n");
        }
    }
    return 0;
}
