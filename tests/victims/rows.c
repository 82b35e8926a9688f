/* The rows of docs/soundness.md, each a way in which pages change: `rows SCRATCH_DIRECTORY N...` prepares rows N..., prints
 * `ready`, and does their deeds on the command `deed`, answering `done` when all are done. In between, and before `ready`, it tells
 *
 *   row N range START END     the pages that the row is about (hexadecimal)
 *   row N changed START END   those of them that the deed changes: these must not be inherited
 *   row N control START END   pages beside them that nobody touches
 *   row N cannot REASON       this kernel cannot do it
 *
 * Rows that need another process have one that is no descendant: a checkpoint takes those too. Command `check` answers `right`
 * when what the rows know of their memory is still so. */
#include "rows/rows.h"

const char *scratch;
static const struct row *current;

void die(const char *what) {
    printf("error %s: %s\n", what, strerror(errno));
    exit(1);
}

const char *failed(const char *what) {
    static char reason[256];
    snprintf(reason, sizeof reason, "%s: %s", what, strerror(errno));
    return reason;
}

void tell(const char *what, const void *at, size_t pages) {
    uintptr_t start = (uintptr_t)at & ~(uintptr_t)(PAGE - 1);
    printf("row %d %s %lx %lx\n", current->number, what, (unsigned long)start, (unsigned long)(start + pages * PAGE));
}

char *reserve(size_t size) {
    char *p = mmap(NULL, size + 3 * HUGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) die("mmap");
    return (char *)(((uintptr_t)p + 2 * HUGE - 1) & ~(uintptr_t)(HUGE - 1));
}

void fill(char *at, size_t pages, unsigned value) {
    for (size_t page = 0; page < pages; page++) memset(at + page * PAGE, (int)(value + page * 7), PAGE);
}

char *area(size_t pages, unsigned value) {
    char *at = reserve(pages * PAGE);
    if (mprotect(at, pages * PAGE, PROT_READ | PROT_WRITE) || madvise(at, pages * PAGE, MADV_NOHUGEPAGE)) die("mprotect");
    fill(at, pages, value);
    return at;
}

char *plain(unsigned value) {
    char *at = area(16, value);
    tell("range", at, 8);
    tell("control", at + 8 * PAGE, 8);
    return at;
}

void settle(void) {
    /* move_pages of no pages drains them all first (do_pages_move, mm/migrate.c). */
    int node = 0, status;
    if (syscall(SYS_move_pages, 0, 0UL, NULL, &node, &status, 1 << 1 /* MPOL_MF_MOVE */)) die("move_pages");
}

uint64_t pagemap(const void *at) {
    uint64_t entry = 0;
    int fd = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
    if (fd < 0 || pread(fd, &entry, 8, (off_t)((uintptr_t)at / PAGE * 8)) != 8) die("pagemap");
    close(fd);
    return entry;
}

static const struct row *find(int number) {
    const struct row *tables[] = {writes, layouts, kernels, refusals};
    for (size_t i = 0; i < sizeof tables / sizeof *tables; i++)
        for (const struct row *row = tables[i]; row->number; row++)
            if (row->number == number) return row;
    return NULL;
}

int main(int argc, char **argv) {
    static char in[4096], out[4096];
    setvbuf(stdin, in, _IOFBF, sizeof in);
    setvbuf(stdout, out, _IOLBF, sizeof out);
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    if (argc < 3) return 2;
    scratch = argv[1];
    if (!strcmp(argv[2], "again")) {
        printf("done\n");
        for (;;) pause();
    }
    start_other();
    const struct row *chosen[40];
    int count = 0;
    for (int arg = 2; arg < argc && count < 40; arg++) {
        const struct row *row = find(atoi(argv[arg]));
        if (!row) return 2;
        current = row;
        const char *reason = row->prepare();
        if (reason) printf("row %d cannot %s\n", row->number, reason);
        else chosen[count++] = row;
    }
    printf("ready\n");
    char line[64];
    while (fgets(line, sizeof line, stdin)) {
        if (!strncmp(line, "deed", 4)) {
            for (int i = 0; i < count; i++) {
                current = chosen[i];
                const char *reason = current->deed ? current->deed() : NULL;
                if (reason) printf("row %d cannot %s\n", current->number, reason);
            }
            printf("done\n");
        } else if (!strncmp(line, "check", 5)) {
            const char *wrong = NULL;
            for (int i = 0; i < count && !wrong; i++) wrong = chosen[i]->check ? chosen[i]->check() : NULL;
            printf("%s\n", wrong ? wrong : "right");
        } else {
            printf("error unknown command\n");
        }
    }
    return 0;
}
