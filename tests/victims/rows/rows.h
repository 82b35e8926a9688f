/* What the rows of `rows.c` share. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/ptrace.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <unistd.h>

enum { PAGE = 4096, HUGE = 2 << 20 };

struct row {
    int number;
    /* NULL, or why this kernel cannot do it. */
    const char *(*prepare)(void);
    const char *(*deed)(void);
    /* NULL, or what is wrong. */
    const char *(*check)(void);
};
extern const char *scratch;
/* Each ends with a row 0. */
extern const struct row writes[], layouts[], kernels[], refusals[];

void die(const char *what);
/* `what` and errno, as a reason. */
const char *failed(const char *what);
/* Tells of the pages of the current row. */
void tell(const char *what, const void *at, size_t pages);
/* Room, 2 MiB-aligned and apart from everything else. */
char *reserve(size_t size);
/* Every page with bytes of its own. */
void fill(char *at, size_t pages, unsigned value);
/* Small filled pages in such room. */
char *area(size_t pages, unsigned value);
/* 16 of them: 8 that the row is about, 8 for control. */
char *plain(unsigned value);
/* Puts on the LRU lists what any CPU still keeps apart for them (mm/swap.c): what is not on one is neither freed by MADV_FREE nor
 * reclaimed, and those calls look after their own CPU's only. */
void settle(void);
/* Its entry in /proc/self/pagemap. */
uint64_t pagemap(const void *at);

/* The other process: does to this one what it is asked for; 0 or an errno. */
enum deed { POKE = 1, MEM, WRITEV, TRUNCATE, WRITE_FILE, CLEAR_REFS, PROBE };
int let_other(enum deed deed, void *at, int fd, size_t size);
void start_other(void);
