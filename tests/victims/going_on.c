/* A program that can be dumped, ended and restored at any moment, and shows in a file that it goes on rightly: `going_on
 * KIND OUTPUT`. It appends a line to OUTPUT for each round, `NUMBER ok` or `NUMBER error WHAT`. No terminal, no pipe to anybody
 * outside is needed: it makes a session of its own and closes its standard descriptors. Prints nothing.
 *
 *   ring      20 processes in a ring of pipes, with memory that all share: a token goes round, and each adds to it; and two that
 *             have ended
 *   threads   50 threads, blocked in futex, poll, nanosleep and epoll_wait, are all woken each round, and none with an error
 *   patient   the same, but a wait that a signal seems to have interrupted is begun again: CRIU's dump interrupts it
 *   sequence  a thread that is always in a restartable sequence is thrown out of it each round
 *   memory    64 MiB; each round some of it is written, and all of it is checked, and its advice */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/futex.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/rseq.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { PROCESSES = 20, THREADS = 50, PAGE = 4096, PAGES = 16384 };

static const char *output;

static void tell(long number, const char *error) {
    char line[128];
    int fd = open(output, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600);
    int len = snprintf(line, sizeof line, error ? "%ld error %s\n" : "%ld ok\n", number, error);
    if (fd < 0 || write(fd, line, (size_t)len) != len) _exit(3);
    close(fd);
    if (error) _exit(4);
}

static void nap(long microseconds) {
    struct timespec left = {0, microseconds * 1000};
    while (nanosleep(&left, &left) && errno == EINTR) ;
}

static int all(int fd, void *at, size_t len, int writes) {
    for (size_t done = 0; done < len;) {
        ssize_t n = writes ? write(fd, (char *)at + done, len - done) : read(fd, (char *)at + done, len - done);
        if (n <= 0 && errno != EINTR) return 0;
        if (n > 0) done += (size_t)n;
    }
    return 1;
}

static void ring(void) {
    int pipes[PROCESSES][2];
    atomic_long *seen = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    for (int i = 0; i < PROCESSES; i++)
        if (pipe(pipes[i])) _exit(3);
    /* The root has children 1, 6, 11 and 16; each of these has the four that follow it. */
    int me = 0;
    for (int i = 1; i < PROCESSES && (me == 0 || (me % 5 == 1 && i < me + 5)); i += me ? 1 : 5) {
        pid_t pid = fork();
        if (pid < 0) _exit(3);
        if (pid) continue;
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        me = i;
    }
    /* The root's, and nobody waits for them. */
    pid_t ended[2] = {0, 0};
    for (int i = 0; i < 2 && !me; i++) {
        ended[i] = fork();
        if (ended[i] == 0 && i) raise(SIGKILL);
        if (ended[i] == 0) _exit(42);
    }
    for (long round = 1;; round++) {
        for (int i = 0; i < 2 && !me; i++) {
            siginfo_t info = {0};
            if (waitid(P_PID, (id_t)ended[i], &info, WEXITED | WNOWAIT)) tell(round, "a dead child is gone");
            if (info.si_code != (i ? CLD_KILLED : CLD_EXITED) || info.si_status != (i ? SIGKILL : 42))
                tell(round, "a dead child ended otherwise");
        }
        long token = (round - 1) * PROCESSES;
        if (!me && !all(pipes[0][1], &token, sizeof token, 1)) _exit(3);
        if (!all(pipes[me][0], &token, sizeof token, 0)) _exit(3);
        if (token != (round - 1) * PROCESSES + me) tell(round, "a wrong token");
        token++;
        if (me + 1 < PROCESSES) {
            atomic_fetch_add(&seen[me], 1);
            if (!all(pipes[me + 1][1], &token, sizeof token, 1)) _exit(3);
            if (me) continue;
        }
        if (me + 1 == PROCESSES) { /* the last tells; as soon as it counts, the next round may begin */
            for (int i = 0; i < PROCESSES; i++)
                if (atomic_load(&seen[i]) != round - (i == me)) tell(round, "a wrong count in shared memory");
            tell(round, NULL);
            atomic_fetch_add(&seen[me], 1);
            nap(20000);
        } else { /* the root waits until the last is done */
            while (atomic_load(&seen[PROCESSES - 1]) != round) nap(1000);
        }
    }
}

static int patient;
static atomic_int rounds, woken;
static int wake[THREADS][2];

static void *blocked(void *argument) {
    int me = (int)(intptr_t)argument, round = 0;
    int set = epoll_create1(EPOLL_CLOEXEC);
    struct epoll_event event = {.events = EPOLLIN};
    if (set < 0 || epoll_ctl(set, EPOLL_CTL_ADD, wake[me][0], &event)) tell(0, "epoll");
    for (;; round++) {
        char byte;
        switch (me % 4) {
        case 0:
            while (atomic_load(&rounds) == round)
                if (syscall(SYS_futex, &rounds, FUTEX_WAIT, round, NULL, NULL, 0) && errno != EAGAIN && !(patient && errno == EINTR))
                    tell(round, "futex");
            break;
        case 1: {
            struct pollfd fd = {wake[me][0], POLLIN, 0};
            while (poll(&fd, 1, -1) != 1)
                if (!(patient && errno == EINTR)) tell(round, "poll");
            if (read(wake[me][0], &byte, 1) != 1) tell(round, "poll without a byte");
            break;
        }
        case 2:
            while (atomic_load(&rounds) == round) nap(30000);
            break;
        default:
            while (epoll_wait(set, &event, 1, -1) != 1)
                if (!(patient && errno == EINTR)) tell(round, "epoll_wait");
            if (read(wake[me][0], &byte, 1) != 1) tell(round, "epoll without a byte");
        }
        atomic_fetch_add(&woken, 1);
    }
    return NULL;
}

static void threads(void) {
    for (int i = 0; i < THREADS; i++) {
        pthread_t thread;
        if (pipe(wake[i]) || pthread_create(&thread, NULL, blocked, (void *)(intptr_t)i)) _exit(3);
    }
    for (int round = 1;; round++) {
        nap(100000);
        atomic_store(&woken, 0);
        atomic_store(&rounds, round);
        syscall(SYS_futex, &rounds, FUTEX_WAKE, THREADS, NULL, NULL, 0);
        for (int i = 0; i < THREADS; i++)
            if (i % 2 && write(wake[i][1], "x", 1) != 1) tell(round, "write");
        for (int patience = 0; atomic_load(&woken) != THREADS; patience++) {
            if (patience > 10000) tell(round, "not all threads were woken");
            nap(1000);
        }
        tell(round, NULL);
    }
}

static atomic_long aborts;

/* Is in a restartable sequence all the time, until it is thrown out: by a signal, another thread on its processor, a move to
 * another one. Who comes back into its middle stays there, since the kernel has forgotten it. */
static void *in_sequence(void *unused) {
    struct rseq *rseq = (struct rseq *)((char *)__builtin_thread_pointer() + __rseq_offset);
    (void)unused;
    for (;;) {
        __asm__ goto(".pushsection __rseq_cs, \"aw\"\n"
                     ".balign 32\n"
                     "3: .long 0, 0\n"
                     ".quad 1f, 2f - 1f, 4f\n"
                     ".popsection\n"
                     "leaq 3b(%%rip), %%rax\n"
                     "movq %%rax, %[section]\n"
                     "1: pause\n"
                     "jmp 1b\n"
                     "2:\n"
                     ".pushsection __rseq_failure, \"ax\"\n"
                     ".byte 0x0f, 0xb9, 0x3d\n"
                     ".long 0x53053053\n" /* RSEQ_SIG */
                     "4: jmp %l[aborted]\n"
                     ".popsection\n"
                     :
                     : [section] "m"(rseq->rseq_cs)
                     : "rax", "memory"
                     : aborted);
    aborted:
        atomic_fetch_add(&aborts, 1);
    }
    return NULL;
}

static void nothing(int signal) {
    (void)signal;
}

static void sequence(void) {
    pthread_t thread;
    signal(SIGUSR1, nothing);
    if (__rseq_size == 0 || pthread_create(&thread, NULL, in_sequence, NULL)) _exit(3);
    for (int round = 1;; round++) {
        long before = atomic_load(&aborts);
        pthread_kill(thread, SIGUSR1);
        for (int patience = 0; atomic_load(&aborts) == before; patience++) {
            if (patience > 10000) tell(round, "the sequence is not aborted any more");
            nap(1000);
        }
        tell(round, NULL);
        nap(20000);
    }
}

/* Whether the VmFlags of the mapping at `p` have these two letters, as one reading of smaps says. */
static int shows_flag(const void *p, const char *letters) {
    char line[512];
    unsigned long start, end;
    int here = 0, found = 0;
    FILE *smaps = fopen("/proc/self/smaps", "re");
    while (smaps && !found && fgets(line, sizeof line, smaps)) {
        if (sscanf(line, "%lx-%lx ", &start, &end) == 2) here = start <= (uintptr_t)p && (uintptr_t)p < end;
        else if (here && !strncmp(line, "VmFlags:", 8)) found = strstr(line, letters) != NULL;
    }
    if (smaps) fclose(smaps);
    return found;
}

/* A checkpoint may fall between two reads of smaps: what is behind the offset is another text after the restore. A flag that is
 * lost is not in the next reading either. */
static int has_flag(const void *p, const char *letters) { return shows_flag(p, letters) || shows_flag(p, letters); }

static void memory(void) {
    static uint32_t versions[PAGES];
    uint64_t *p = mmap(NULL, (size_t)PAGES * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    uint64_t random = 1;
    if (madvise(p, (size_t)PAGES * PAGE, MADV_DONTDUMP) || madvise(p, (size_t)PAGES * PAGE, MADV_RANDOM)) _exit(3);
    for (size_t page = 0; page < PAGES; page++) p[page * 512] = page << 32;
    for (long round = 1;; round++) {
        for (int i = 0; i < 200; i++) {
            random = random * 6364136223846793005ULL + 1442695040888963407ULL;
            size_t page = (random >> 33) % PAGES;
            p[page * 512] = (uint64_t)page << 32 | ++versions[page];
        }
        for (size_t page = 0; page < PAGES; page++)
            if (p[page * 512] != ((uint64_t)page << 32 | versions[page])) tell(round, "a page is not what was written");
        if (!has_flag(p, " dd") || !has_flag(p, " rr")) tell(round, "madvise is forgotten");
        tell(round, NULL);
        nap(20000);
    }
}

int main(int argc, char **argv) {
    if (argc != 3) return 2;
    output = argv[2];
    setsid();
    int null = open("/dev/null", O_RDWR);
    for (int fd = 0; fd < 3; fd++) dup2(null, fd);
    close(null);
    if (!strcmp(argv[1], "ring")) ring();
    else if (!strcmp(argv[1], "threads")) threads();
    else if (!strcmp(argv[1], "patient")) patient = 1, threads();
    else if (!strcmp(argv[1], "sequence")) sequence();
    else if (!strcmp(argv[1], "memory")) memory();
    return 2;
}
