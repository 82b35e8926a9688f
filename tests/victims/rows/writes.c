/* Rows in which bytes are written, by whomever: 1 2 3 7 19 27 28 30 34. */
#include "rows.h"

#include <linux/futex.h>
#include <pthread.h>

/* 1: an ordinary write; whether it can be seen is the kernel's question. */
static char *one;
static const char *write_prepare(void) { one = plain(1); return NULL; }
static const char *write_deed(void) {
    one[2 * PAGE] ^= 0x55;
    tell("changed", one + 2 * PAGE, 1);
    return NULL;
}

/* 2: read(2) into a buffer. */
static char *two;
static const char *read_prepare(void) { two = plain(2); return NULL; }
static const char *read_deed(void) {
    int fd = open("/dev/zero", O_RDONLY | O_CLOEXEC);
    if (fd < 0 || read(fd, two + 2 * PAGE + 100, 2 * PAGE) != 2 * PAGE) return failed("read");
    close(fd);
    tell("changed", two + 2 * PAGE, 3);
    return NULL;
}

/* 3: three ways to write into another process. */
static char *three;
static const char *others_prepare(void) { three = plain(3); return NULL; }
static const char *others_deed(void) {
    if (let_other(POKE, three + 1 * PAGE + 8, 0, 0)) return failed("PTRACE_POKEDATA");
    if (let_other(MEM, three + 3 * PAGE + 8, 0, 0)) return failed("/proc/PID/mem");
    if (let_other(WRITEV, three + 5 * PAGE + 8, 0, 0)) return failed("process_vm_writev");
    for (int page = 1; page < 7; page += 2) tell("changed", three + page * PAGE, 1);
    return NULL;
}

/* 7: shared memory, changed by another process, by write(2), and through another mapping. */
static char *shared, *twin;
static int object;
static const char *share_prepare(void) {
    object = memfd_create("shared", MFD_CLOEXEC);
    if (object < 0 || ftruncate(object, 8 * PAGE)) return failed("memfd_create");
    shared = reserve(8 * PAGE);
    twin = reserve(8 * PAGE);
    for (int i = 0; i < 2; i++)
        if (mmap(i ? twin : shared, 8 * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, object, 0) == MAP_FAILED)
            return failed("mmap");
    fill(shared, 8, 30);
    tell("range", shared, 8);
    tell("control", area(8, 31), 8);
    return NULL;
}
static const char *share_deed(void) {
    uint64_t word = 0x7272727272727272;
    if (let_other(WRITE_FILE, NULL, object, 1 * PAGE)) return failed("write by another process");
    if (pwrite(object, &word, sizeof word, 3 * PAGE) != sizeof word) return failed("pwrite");
    twin[5 * PAGE] ^= 0x55;
    for (int page = 1; page < 7; page += 2) tell("changed", shared + page * PAGE, 1);
    return NULL;
}

/* 19: pages that a child shares until either writes. */
static char *forked;
static const char *fork_prepare(void) { forked = plain(32); return NULL; }
static const char *fork_deed(void) {
    int ready[2];
    char byte;
    if (pipe(ready)) return failed("pipe");
    pid_t child = fork();
    if (child < 0) return failed("fork");
    if (child == 0) {
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        forked[PAGE] ^= 0x11;
        if (write(ready[1], "r", 1) != 1) _exit(1);
        for (;;) pause();
    }
    if (read(ready[0], &byte, 1) != 1) return failed("read");
    close(ready[0]), close(ready[1]);
    forked[3 * PAGE] ^= 0x22;
    tell("changed", forked + 3 * PAGE, 1);
    return NULL;
}

/* 27, 28: a thread writes on and on, one round after the other, to page after page: while the process stands still, no page is
 * ahead of the one before it, and none is more than a round behind. */
static char *rounds;
static atomic_ulong round_number;
static void *go_round(void *unused) {
    (void)unused;
    for (uint64_t round = 1; round; round++) {
        for (int page = 0; page < 8; page++)
            atomic_store_explicit((atomic_ulong *)(rounds + page * PAGE), round, memory_order_seq_cst);
        atomic_store(&round_number, round);
    }
    return NULL;
}
static const char *round_prepare(void) {
    pthread_t thread;
    if (rounds) return NULL;
    rounds = area(16, 33);
    if (pthread_create(&thread, NULL, go_round, NULL)) die("pthread_create");
    while (!atomic_load(&round_number)) usleep(100);
    return NULL;
}
static const char *round_of(void) {
    const char *reason = round_prepare();
    tell("range", rounds, 8);
    tell("changed", rounds, 8);
    tell("control", rounds + 8 * PAGE, 8);
    return reason;
}
static const char *round_deed(void) {
    unsigned long before = atomic_load(&round_number);
    while (atomic_load(&round_number) < before + 2) usleep(100);
    return NULL;
}

/* 30: below the stack of a thread that waits in a system call lies something that nobody else may change. */
enum { BELOW = 4 * PAGE, RED_ZONE = 128 };
static char *stack_pointer;
static atomic_int never;
static void *wait_above(void *unused) {
    (void)unused;
    long result = SYS_futex;
    __asm__ volatile(
        "lea -128(%%rsp), %%rdi\n\t"
        "sub %[below], %%rdi\n\t"
        "mov %[below], %%rcx\n\t"
        "mov %%rax, %%r8\n\t"
        "mov $0x5a, %%al\n\t"
        "rep stosb\n\t"
        "mov %%rsp, %[pointer]\n\t"
        "mov %[never], %%rdi\n\t"
        "xor %%r10d, %%r10d\n\t"
        "1: mov $%c[futex], %%eax\n\t"
        "mov $128, %%esi\n\t" /* FUTEX_WAIT_PRIVATE */
        "xor %%edx, %%edx\n\t"
        "syscall\n\t"
        "jmp 1b\n\t"
        : "+a"(result), [pointer] "=m"(stack_pointer)
        : [below] "i"(BELOW), [futex] "i"(SYS_futex), [never] "r"(&never)
        : "rdi", "rsi", "rcx", "rdx", "r8", "r10", "r11", "memory");
    return NULL;
}
static const char *below_prepare(void) {
    pthread_t thread;
    if (pthread_create(&thread, NULL, wait_above, NULL)) die("pthread_create");
    while (!*(char *volatile *)&stack_pointer) usleep(100);
    tell("range", stack_pointer - RED_ZONE - BELOW, BELOW / PAGE);
    tell("control", area(8, 34), 8);
    return NULL;
}
static const char *below_check(void) {
    for (char *at = stack_pointer - RED_ZONE - BELOW; at < stack_pointer - RED_ZONE; at++)
        if (*at != 0x5a) return "what was below a stack has changed";
    return NULL;
}

/* 34: a write by another process that the test begins, and lets land when it likes. */
static const char *flight_prepare(void) {
    tell("changed", plain(35) + 2 * PAGE, 1);
    return NULL;
}

const struct row writes[] = {
    {1, write_prepare, write_deed, NULL},
    {2, read_prepare, read_deed, NULL},
    {3, others_prepare, others_deed, NULL},
    {7, share_prepare, share_deed, NULL},
    {19, fork_prepare, fork_deed, NULL},
    {27, round_of, round_deed, NULL},
    {28, round_of, round_deed, NULL},
    {30, below_prepare, NULL, below_check},
    {34, flight_prepare, NULL, NULL},
    {0},
};
