/* Another process that changes this one's memory. It is no descendant: those would be part of the checkpoint. */
#include "rows.h"

#include <linux/perf_event.h>

static struct { atomic_int asked, answered, error; void *at; int fd; size_t size; } *line;

static int poke(pid_t target, void *at) {
    int status;
    if (ptrace(PTRACE_ATTACH, target, 0, 0) || waitpid(target, &status, __WALL) != target) return errno;
    int error = ptrace(PTRACE_POKEDATA, target, at, 0x7070707070707070) ? errno : 0;
    if (ptrace(PTRACE_DETACH, target, 0, 0)) return errno;
    return error;
}

/* A breakpoint of the kernel's at the start of file `fd`, for as long as the other process lives. */
static int probe(pid_t target, int fd) {
    char path[64], file[4096];
    FILE *f = fopen("/sys/bus/event_source/devices/uprobe/type", "r");
    unsigned type;
    if (!f || fscanf(f, "%u", &type) != 1) return errno;
    fclose(f);
    snprintf(path, sizeof path, "/proc/%d/fd/%d", target, fd);
    ssize_t length = readlink(path, file, sizeof file - 1);
    if (length < 0) return errno;
    file[length] = 0;
    struct perf_event_attr event = {.type = type, .size = sizeof event, .uprobe_path = (uintptr_t)file};
    return syscall(SYS_perf_event_open, &event, target, -1, -1, PERF_FLAG_FD_CLOEXEC) < 0 ? errno : 0;
}

static int do_deed(pid_t target, enum deed deed) {
    char path[64];
    uint64_t word = 0x7171717171717171;
    struct iovec ours = {&word, sizeof word}, theirs = {line->at, sizeof word};
    switch (deed) {
    case POKE: return poke(target, line->at);
    case PROBE: return probe(target, line->fd);
    case WRITEV: return process_vm_writev(target, &ours, 1, &theirs, 1, 0) == sizeof word ? 0 : errno;
    case MEM: snprintf(path, sizeof path, "/proc/%d/mem", target); break;
    case CLEAR_REFS: snprintf(path, sizeof path, "/proc/%d/clear_refs", target); break;
    default: snprintf(path, sizeof path, "/proc/%d/fd/%d", target, line->fd);
    }
    int fd = open(path, (deed == CLEAR_REFS ? O_WRONLY : O_RDWR) | O_CLOEXEC), good = 0;
    if (fd < 0) return errno;
    if (deed == MEM) good = pwrite(fd, &word, sizeof word, (off_t)(uintptr_t)line->at) == sizeof word;
    if (deed == CLEAR_REFS) good = write(fd, "4", 1) == 1;
    if (deed == TRUNCATE) good = ftruncate(fd, (off_t)line->size) == 0;
    if (deed == WRITE_FILE) good = pwrite(fd, &word, sizeof word, (off_t)line->size) == sizeof word;
    int error = good ? 0 : errno;
    close(fd);
    return error;
}

int let_other(enum deed deed, void *at, int fd, size_t size) {
    line->at = at, line->fd = fd, line->size = size;
    atomic_store(&line->answered, 0);
    atomic_store(&line->asked, deed);
    while (!atomic_load(&line->answered)) usleep(500);
    return errno = atomic_load(&line->error);
}

void start_other(void) {
    line = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (line == MAP_FAILED) die("mmap");
    pid_t target = getpid(), parent = fork();
    if (parent < 0) die("fork");
    if (parent) {
        waitpid(parent, NULL, 0);
        return;
    }
    if (fork()) _exit(0);
    while (!kill(target, 0)) {
        int deed = atomic_exchange(&line->asked, 0);
        if (deed) {
            atomic_store(&line->error, do_deed(target, deed));
            atomic_store(&line->answered, 1);
        } else {
            usleep(1000);
        }
    }
    _exit(0);
}
