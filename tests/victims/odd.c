/* A process that has what memckpt refuses. `odd WHAT` prints `ready`, or `cannot REASON` where the kernel will not let it;
 * then waits for a line on stdin (`remap` only: does its deed then, says `done`, waits for another).
 *
 * WHAT: userfaultfd device io-uring-buffers io-uring-ring remap; and what is taken without a parasite: mappings (as many as
 * there may be) no-shmat deadly-munmap (seccomp filters) strict (seccomp)
 * plain aio io-uring */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/filter.h>
#include <linux/io_uring.h>
#include <linux/seccomp.h>
#include <linux/userfaultfd.h>
#include <signal.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

#ifndef UFFD_USER_MODE_ONLY
#define UFFD_USER_MODE_ONLY 1
#endif

static void cannot(const char *what) {
    printf("cannot %s: %s\n", what, strerror(errno));
    fflush(stdout);
    exit(0);
}

static void wait_line(void) {
    char line[64];
    if (!fgets(line, sizeof line, stdin)) exit(0);
}

static void use_userfaultfd(void) {
    int fd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | UFFD_USER_MODE_ONLY);
    if (fd < 0) cannot("userfaultfd");
    struct uffdio_api api = {.api = UFFD_API};
    if (ioctl(fd, UFFDIO_API, &api)) cannot("UFFDIO_API");
    void *p = mmap(NULL, 1 << 20, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    struct uffdio_register reg = {.range = {(uintptr_t)p, 1 << 20}, .mode = UFFDIO_REGISTER_MODE_MISSING};
    if (ioctl(fd, UFFDIO_REGISTER, &reg)) cannot("UFFDIO_REGISTER");
}

/* The BIOS area: physical memory that is no RAM, open to root even with STRICT_DEVMEM. */
static void map_device(void) {
    int fd = open("/dev/mem", O_RDONLY);
    if (fd < 0) cannot("open /dev/mem");
    if (mmap(NULL, 4096, PROT_READ, MAP_SHARED, fd, 0xf0000) == MAP_FAILED) cannot("map /dev/mem");
}

static int ring(struct io_uring_params *params) {
    int fd = (int)syscall(SYS_io_uring_setup, 8, params);
    if (fd < 0) cannot("io_uring_setup");
    return fd;
}

static void register_buffers(void) {
    struct io_uring_params params = {0};
    int fd = ring(&params);
    static char buffer[65536] __attribute__((aligned(4096)));
    struct iovec vec = {buffer, sizeof buffer};
    if (syscall(SYS_io_uring_register, fd, 0 /* IORING_REGISTER_BUFFERS */, &vec, 1)) cannot("register buffers");
}

static void map_ring(void) {
    struct io_uring_params params = {0};
    int fd = ring(&params);
    if (mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0) == MAP_FAILED) cannot("map the ring");
}

static void remap(void) {
    int fd = memfd_create("remapped", 0);
    if (fd < 0 || ftruncate(fd, 16 * 4096)) cannot("memfd");
    char *p = mmap(NULL, 16 * 4096, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (p == MAP_FAILED) cannot("mmap");
    printf("ready\n");
    wait_line();
    if (syscall(SYS_remap_file_pages, p, 4096, 0, 8, 0)) cannot("remap_file_pages");
    printf("done\n");
    wait_line();
    exit(0);
}

/* As many mappings as the kernel allows: every second page of a reservation is readable. */
static void map_to_the_limit(void) {
    long limit = 0;
    FILE *f = fopen("/proc/sys/vm/max_map_count", "r");
    if (!f || fscanf(f, "%ld", &limit) != 1) cannot("read max_map_count");
    fclose(f);
    char *p = mmap(NULL, (limit + 16) * 4096, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) cannot("mmap");
    for (long page = 0; page < limit; page += 2)
        if (mprotect(p + page * 4096, 4096, PROT_READ)) {
            if (errno == ENOMEM) return;
            cannot("mprotect");
        }
    errno = 0;
    cannot("reach the limit");
}

static void set_up_aio(void) {
    unsigned long context = 0;
    if (syscall(SYS_io_setup, 8, &context)) cannot("io_setup");
}

static void filter(int call, int action) {
    struct sock_filter program[] = {
        BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, call, 0, 1),
        BPF_STMT(BPF_RET | BPF_K, action),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
    };
    struct sock_fprog prog = {4, program};
    if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) || prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &prog)) cannot("seccomp");
}

int main(int argc, char **argv) {
    setvbuf(stdout, NULL, _IOLBF, 0);
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    if (argc != 2) return 2;
    if (strcmp(argv[1], "userfaultfd") == 0) use_userfaultfd();
    else if (strcmp(argv[1], "device") == 0) map_device();
    else if (strcmp(argv[1], "io-uring-buffers") == 0) register_buffers();
    else if (strcmp(argv[1], "io-uring-ring") == 0) map_ring();
    else if (strcmp(argv[1], "remap") == 0) remap();
    else if (strcmp(argv[1], "mappings") == 0) map_to_the_limit();
    else if (strcmp(argv[1], "plain") == 0) ;
    else if (strcmp(argv[1], "aio") == 0) set_up_aio();
    else if (strcmp(argv[1], "io-uring") == 0) {
        struct io_uring_params params = {0};
        int fd = ring(&params);
        printf("ready\n");
        wait_line();
        close(fd);
        printf("closed\n");
        wait_line();
        return 0;
    }
    else if (strcmp(argv[1], "no-shmat") == 0) filter(SYS_shmat, SECCOMP_RET_ERRNO | EPERM);
    else if (strcmp(argv[1], "deadly-munmap") == 0) filter(SYS_munmap, SECCOMP_RET_KILL_PROCESS);
    else if (strcmp(argv[1], "strict") == 0) {
        printf("ready\n");
        if (prctl(PR_SET_SECCOMP, SECCOMP_MODE_STRICT, 0, 0, 0)) cannot("seccomp");
        for (char c; read(0, &c, 1) == 1;) ;
        syscall(SYS_exit, 0);
    }
    else return 2;
    printf("ready\n");
    wait_line();
    return 0;
}
