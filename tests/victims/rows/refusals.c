/* Rows that are refused, or end the epoch: 4 20 21 25 26 29 31. */
#include "rows.h"

#include <linux/io_uring.h>
#include <linux/userfaultfd.h>
#include <sched.h>
#include <sys/ioctl.h>

/* 4: registered buffers are pinned, and the kernel writes to them without a fault. */
static const char *pin_prepare(void) {
    struct io_uring_params params = {0};
    int fd = (int)syscall(SYS_io_uring_setup, 8, &params);
    if (fd < 0) return failed("io_uring_setup");
    struct iovec vec = {plain(60), 8 * PAGE};
    return syscall(SYS_io_uring_register, fd, 0 /* IORING_REGISTER_BUFFERS */, &vec, 1) ? failed("register buffers") : NULL;
}

/* 20: another program, the same process. */
static const char *exec_prepare(void) { plain(61); return NULL; }
static const char *exec_deed(void) {
    execl("/proc/self/exe", "rows", scratch, "again", (char *)NULL);
    return failed("exec");
}

/* 21: a page that comes by UFFDIO_COPY. */
static const char *copy_prepare(void) {
    char *at = reserve(16 * PAGE), page[PAGE];
    int fd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | 1 /* UFFD_USER_MODE_ONLY */);
    if (fd < 0) return failed("userfaultfd");
    struct uffdio_api api = {.api = UFFD_API};
    if (ioctl(fd, UFFDIO_API, &api)) return failed("UFFDIO_API");
    if (mprotect(at, 16 * PAGE, PROT_READ | PROT_WRITE)) return failed("mprotect");
    struct uffdio_register reg = {.range = {(uintptr_t)at, 16 * PAGE}, .mode = UFFDIO_REGISTER_MODE_MISSING};
    if (ioctl(fd, UFFDIO_REGISTER, &reg)) return failed("UFFDIO_REGISTER");
    memset(page, 62, PAGE);
    struct uffdio_copy copy = {.dst = (uintptr_t)at, .src = (uintptr_t)page & ~(uintptr_t)(PAGE - 1), .len = PAGE};
    return ioctl(fd, UFFDIO_COPY, &copy) ? failed("UFFDIO_COPY") : NULL;
}

/* 25: the BIOS area: physical memory that is no RAM, open to root even with STRICT_DEVMEM. */
static const char *device_prepare(void) {
    int fd = open("/dev/mem", O_RDONLY | O_CLOEXEC);
    if (fd < 0) return failed("open /dev/mem");
    return mmap(NULL, PAGE, PROT_READ, MAP_SHARED, fd, 0xf0000) == MAP_FAILED ? failed("map /dev/mem") : NULL;
}

/* 26: a mapping in another order than its file. */
static char *nonlinear;
static const char *nonlinear_prepare(void) {
    int fd = memfd_create("nonlinear", MFD_CLOEXEC);
    if (fd < 0 || ftruncate(fd, 16 * PAGE)) return failed("memfd_create");
    nonlinear = reserve(16 * PAGE);
    if (mmap(nonlinear, 16 * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, fd, 0) == MAP_FAILED) return failed("mmap");
    fill(nonlinear, 16, 63);
    return NULL;
}
static const char *nonlinear_deed(void) {
    return syscall(SYS_remap_file_pages, nonlinear, PAGE, 0, 8, 0) ? failed("remap_file_pages") : NULL;
}

/* 29: another process that has the same memory. */
static char *twin_memory;
static int be_twin(void *unused) {
    (void)unused;
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    for (; twin_memory; usleep(1000)) twin_memory[PAGE]++;
    return 0;
}
static const char *twin_prepare(void) { twin_memory = plain(64); return NULL; }
static const char *twin_deed(void) {
    static char stack[16384] __attribute__((aligned(16)));
    return clone(be_twin, stack + sizeof stack, CLONE_VM | SIGCHLD, NULL) < 0 ? failed("clone") : NULL;
}

/* 31: somebody else clears the soft-dirty bits after a write. */
static char *cleared;
static const char *clear_prepare(void) { cleared = plain(65); return NULL; }
static const char *clear_deed(void) {
    cleared[PAGE] ^= 0x55;
    tell("changed", cleared + PAGE, 1);
    return let_other(CLEAR_REFS, NULL, 0, 0) ? failed("clear_refs") : NULL;
}

const struct row refusals[] = {
    {4, pin_prepare, NULL, NULL},
    {20, exec_prepare, exec_deed, NULL},
    {21, copy_prepare, NULL, NULL},
    {25, device_prepare, NULL, NULL},
    {26, nonlinear_prepare, nonlinear_deed, NULL},
    {29, twin_prepare, twin_deed, NULL},
    {31, clear_prepare, clear_deed, NULL},
    {0},
};
