/* A tree of processes: `tree WIDTH DEPTH`. Every process has memory of its own, some that it shares by copy-on-write with its
 * parent, and some that it shares with all; half of them have a second thread; the root has a child that has ended and that
 * it does not wait for. Prints `ready`. Commands on stdin of the root:
 *   dirty SEED   every process changes some of its memory: `ok`
 *   pids         `pids ROOT CHILD ...`, the root first, without the one that has ended
 *   zombie       `PID STATUS`
 *   born         the root forks another child: its PID
 *   storm        the root forks a child whose children end or call exec at once, from now on: its PID
 * Each process ends with its parent. */
#define _GNU_SOURCE
#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

enum { PAGE = 4096, OWN = 200, MOST = 64 };

struct shared {
    atomic_int processes, round, done, storm;
    unsigned seed;
    pid_t pids[MOST];
    char memory[64 * PAGE];
};
static struct shared *shared;
static char *inherited;

static void *sleeper(void *unused) {
    (void)unused;
    for (;;) pause();
    return NULL;
}

static char *map(size_t pages) {
    char *p = mmap(NULL, pages * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (p == MAP_FAILED) _exit(3);
    return p;
}

static void change(int number, char *own, unsigned seed) {
    uint64_t z = (uint64_t)seed * 1000003 + (unsigned)number;
    for (int i = 0; i < 20; i++) {
        z = z * 6364136223846793005ULL + 1442695040888963407ULL;
        memcpy(own + (z >> 33) % OWN * PAGE + 8, &z, 8);
        if (i % 4 == 0) memcpy(inherited + (z >> 40) % OWN * PAGE + 16, &z, 8);
        if (i % 5 == 0) memcpy(shared->memory + (z >> 45) % 64 * PAGE + (size_t)number * 8, &z, 8);
    }
}

static void live(int number) {
    char *own = map(OWN);
    memset(own, number + 1, OWN / 2 * PAGE);
    pthread_t thread;
    if (number % 2 && pthread_create(&thread, NULL, sleeper, NULL)) _exit(3);
    int round = atomic_load(&shared->round);
    atomic_fetch_add(&shared->done, 1);
    for (;;) {
        while (atomic_load(&shared->round) == round) usleep(500);
        round = atomic_load(&shared->round);
        change(number, own, shared->seed);
        atomic_fetch_add(&shared->done, 1);
    }
}

static pid_t grow(int width, int depth) {
    int number = atomic_fetch_add(&shared->processes, 1);
    pid_t pid = fork();
    if (pid) return shared->pids[number] = pid;
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    if (depth > 1)
        for (int i = 0; i < width; i++) grow(width, depth - 1);
    live(number);
    return 0;
}

int main(int argc, char **argv) {
    char line[64];
    setvbuf(stdout, NULL, _IOLBF, 0);
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    if (argc != 3) return 2;
    int width = atoi(argv[1]), depth = atoi(argv[2]);
    shared = mmap(NULL, sizeof *shared, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (shared == MAP_FAILED) return 3;
    inherited = map(OWN);
    memset(inherited, 0x5a, OWN * PAGE);
    char *own = map(OWN);
    atomic_store(&shared->processes, 1);
    shared->pids[0] = getpid();
    for (int i = 0; i < width; i++) grow(width, depth);
    pid_t zombie = fork();
    if (!zombie) _exit(7);
    siginfo_t info;
    while (waitid(P_PID, (id_t)zombie, &info, WEXITED | WNOWAIT) && errno == EINTR) ;
    while (atomic_load(&shared->done) != atomic_load(&shared->processes) - 1) usleep(500);
    printf("ready\n");
    while (fgets(line, sizeof line, stdin)) {
        if (!strncmp(line, "dirty ", 6)) {
            shared->seed = (unsigned)atoi(line + 6);
            atomic_store(&shared->done, 0);
            atomic_fetch_add(&shared->round, 1);
            change(0, own, shared->seed);
            while (atomic_load(&shared->done) != atomic_load(&shared->processes) - 1) usleep(500);
            printf("ok\n");
        } else if (!strncmp(line, "pids", 4)) {
            printf("pids");
            for (int i = 0; i < atomic_load(&shared->processes); i++) printf(" %d", shared->pids[i]);
            printf("\n");
        } else if (!strncmp(line, "zombie", 6)) {
            printf("%d %d\n", zombie, 7 << 8);
        } else if (!strncmp(line, "born", 4)) {
            atomic_store(&shared->done, 0);
            pid_t pid = grow(0, 1);
            while (!atomic_load(&shared->done)) usleep(500);
            printf("%d\n", pid);
        } else if (!strncmp(line, "storm", 5)) {
            pid_t storm = fork();
            if (!storm) {
                prctl(PR_SET_PDEATHSIG, SIGKILL);
                /* No more at once than a slow machine can run. */
                for (int live = 0;;) {
                    if (!fork()) {
                        if (getpid() % 2) execl("/bin/true", "true", (char *)NULL);
                        _exit(0);
                    }
                    for (live++; live > 0 && waitpid(-1, NULL, live < 10 ? WNOHANG : 0) > 0; live--) ;
                }
            }
            printf("%d\n", storm);
        } else {
            printf("error unknown command\n");
        }
    }
    return 0;
}
