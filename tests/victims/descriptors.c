/* A program that holds one of every kind of descriptor and shows in a file that all go on rightly: `descriptors OUTPUT SCRATCH [plain]`.
 * Each round looks at all of them, leaves them as they were, and appends `NUMBER ok` or `NUMBER error WHAT` to OUTPUT. While the
 * file SCRATCH/hold is there it rests between two rounds, and says so by SCRATCH/resting. It closes its standard descriptors and prints nothing.
 * `plain`: without a pipe in packet mode, which CRIU does not dump. */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/file.h>
#include <sys/inotify.h>
#include <sys/mman.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/timerfd.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

static const char *output, *scratch;
static long number;
static int plain;

static void tell(const char *error) {
    char line[160];
    int fd = open(output, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600);
    int len = error ? snprintf(line, sizeof line, "%ld error %s: %s\n", number, error, strerror(errno))
                    : snprintf(line, sizeof line, "%ld ok\n", number);
    if (fd < 0 || write(fd, line, (size_t)len) != len) _exit(3);
    close(fd);
    if (error) _exit(4);
}

#define CHECK(condition, what) \
    do { \
        errno = 0; \
        if (!(condition)) tell(what); \
    } while (0)

static const char *in(const char *name) {
    static char path[4096];
    snprintf(path, sizeof path, "%s/%s", scratch, name);
    return path;
}

static void nap(void) {
    struct timespec left = {0, 20000000};
    while (nanosleep(&left, &left) && errno == EINTR) ;
}

static int file, twin, directory, deleted, read_only, null, zero, full, random_device, urandom;
static int pipes[2], packets[2], fifo, event, signals, timer, set, watch, memory;
static int stream[2], half[2], datagrams[2], sequence[2], carrier[2], outlet, arrow, target, listener, abstract, client, server, udp, udp6, tcp, tcp6, closed;
static struct sockaddr_in udp_address, tcp_address;

/* What `fd` holds is `text`, which is put back into `back`. */
static void turn_over(int fd, int back, const char *text, const char *what) {
    char buffer[64];
    ssize_t len = (ssize_t)strlen(text);
    CHECK(read(fd, buffer, sizeof buffer) == len && !memcmp(buffer, text, (size_t)len), what);
    CHECK(write(back, text, (size_t)len) == len, what);
}

/* Sends `text`, and a copy of `carried` if that is not -1. */
static void send_with(int fd, const char *text, int carried) {
    union { struct cmsghdr header; char bytes[CMSG_SPACE(sizeof(int))]; } control = {.bytes = {0}};
    struct iovec bytes = {(void *)text, strlen(text)};
    struct msghdr message = {.msg_iov = &bytes, .msg_iovlen = 1};
    if (carried >= 0) {
        message.msg_control = &control, message.msg_controllen = sizeof control;
        control.header.cmsg_level = SOL_SOCKET, control.header.cmsg_type = SCM_RIGHTS;
        control.header.cmsg_len = CMSG_LEN(sizeof carried);
        memcpy(CMSG_DATA(&control.header), &carried, sizeof carried);
    }
    CHECK(sendmsg(fd, &message, 0) == (ssize_t)bytes.iov_len, "sendmsg");
}

/* Receives `text`, which must be one message; the descriptor that comes with it, or -1. */
static int receive_with(int fd, const char *text, const char *what) {
    union { struct cmsghdr header; char bytes[CMSG_SPACE(sizeof(int))]; } control;
    char buffer[64];
    int carried = -1;
    struct iovec bytes = {buffer, sizeof buffer};
    struct msghdr message = {.msg_iov = &bytes, .msg_iovlen = 1, .msg_control = &control, .msg_controllen = sizeof control};
    CHECK(recvmsg(fd, &message, MSG_DONTWAIT) == (ssize_t)strlen(text) && !memcmp(buffer, text, strlen(text)), what);
    if (message.msg_controllen) memcpy(&carried, CMSG_DATA(&control.header), sizeof carried);
    return carried;
}

/* Messages that are left waiting, two of them with descriptors: that of a file that is open here too, and an end of a pipe whose
 * other end is open nowhere else. */
static void leave_messages(void) {
    int unseen[2];
    CHECK(!pipe(unseen) && write(unseen[1], "unseen", 6) == 6, "a pipe under way");
    send_with(datagrams[0], "one", -1);
    send_with(datagrams[0], "a second one", file);
    send_with(datagrams[0], "third", unseen[0]);
    send_with(datagrams[0], "end", -1);
    send_with(sequence[1], "two", -1);
    send_with(sequence[1], "messages", -1);
    send_with(carrier[0], "before", -1);
    send_with(carrier[0], "with", file);
    send_with(carrier[0], "after", -1);
    CHECK(!close(unseen[0]), "close");
    outlet = unseen[1];
}

static void look_at_messages(void) {
    char buffer[64];
    int *ends[] = {datagrams, sequence, carrier};
    for (int i = 0; i < 6; i++) {
        int offset = 0;
        socklen_t len = sizeof offset;
        CHECK(!getsockopt(ends[i / 2][i % 2], SOL_SOCKET, SO_PEEK_OFF, &offset, &len) && offset == -1, "SO_PEEK_OFF");
    }
    CHECK(receive_with(datagrams[1], "one", "first message") < 0, "a descriptor with the first message");
    int same = receive_with(datagrams[1], "a second one", "second message");
    CHECK(same >= 0 && !syscall(SYS_kcmp, getpid(), getpid(), 0, same, file) && !close(same), "a file under way");
    int inlet = receive_with(datagrams[1], "third", "third message");
    CHECK(inlet >= 0 && read(inlet, buffer, sizeof buffer) == 6 && !memcmp(buffer, "unseen", 6), "a pipe came");
    CHECK(write(outlet, "x", 1) == 1 && read(inlet, buffer, 1) == 1 && !close(inlet) && !close(outlet), "the pipe works");
    CHECK(receive_with(datagrams[1], "end", "last message") < 0, "a descriptor with the last message");
    CHECK(recv(datagrams[1], buffer, 64, MSG_DONTWAIT) < 0 && errno == EAGAIN, "no more messages");
    CHECK(receive_with(sequence[0], "two", "sequence") < 0 && receive_with(sequence[0], "messages", "sequence") < 0, "sequence");
    /* A stream is read no further than a part with descriptors. */
    int carried = receive_with(carrier[1], "beforewith", "stream with a descriptor");
    CHECK(carried >= 0 && !syscall(SYS_kcmp, getpid(), getpid(), 0, carried, file) && !close(carried), "a file in a stream");
    CHECK(receive_with(carrier[1], "after", "stream after") < 0, "a descriptor after its place");
    leave_messages();
}

static int listen_at(const struct sockaddr *address, socklen_t len) {
    int fd = socket(address->sa_family, SOCK_STREAM | SOCK_CLOEXEC, 0), on = 1;
    CHECK(fd >= 0 && !setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on), "socket");
    CHECK(!bind(fd, address, len) && !listen(fd, 7), "listen");
    return fd;
}

static void open_files(void) {
    file = open(in("file"), O_RDWR | O_CREAT | O_TRUNC, 0640);
    CHECK(file >= 0 && write(file, "0123456789", 10) == 10 && lseek(file, 4, SEEK_SET) == 4, "file");
    twin = dup(file);
    read_only = open(in("file"), O_RDONLY | O_CLOEXEC);
    CHECK(!flock(read_only, LOCK_SH), "flock");
    directory = open(scratch, O_RDONLY | O_DIRECTORY);
    deleted = open(in("deleted"), O_RDWR | O_CREAT | O_TRUNC, 0600);
    CHECK(deleted >= 0 && write(deleted, "gone", 4) == 4 && !unlink(in("deleted")), "deleted");
    null = open("/dev/null", O_RDWR);
    zero = open("/dev/zero", O_RDONLY);
    full = open("/dev/full", O_WRONLY);
    random_device = open("/dev/random", O_RDONLY | O_NONBLOCK);
    urandom = open("/dev/urandom", O_RDONLY);
    CHECK(null >= 0 && zero >= 0 && full >= 0 && random_device >= 0 && urandom >= 0, "devices");
    memory = memfd_create("sealed", MFD_ALLOW_SEALING);
    void *advised = mmap(NULL, 4096, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    CHECK(!madvise(advised, 4096, MADV_DONTDUMP) && !madvise(advised, 4096, MADV_RANDOM), "madvise");
    CHECK(write(memory, "memory", 6) == 6 && !fcntl(memory, F_ADD_SEALS, F_SEAL_GROW | F_SEAL_SHRINK), "memfd");
}

static void open_pipes(void) {
    CHECK(!pipe2(pipes, O_NONBLOCK) && write(pipes[1], "in the pipe", 11) == 11, "pipe");
    CHECK(!pipe2(packets, plain ? 0 : O_DIRECT), "packet pipe");
    CHECK(!mkfifo(in("fifo"), 0600), "mkfifo");
    fifo = open(in("fifo"), O_RDWR);
    CHECK(write(fifo, "in the fifo", 11) == 11, "fifo");
}

static void open_events(void) {
    sigset_t mask;
    sigemptyset(&mask), sigaddset(&mask, SIGUSR1);
    CHECK(!sigprocmask(SIG_BLOCK, &mask, NULL), "sigprocmask");
    event = eventfd(5, EFD_NONBLOCK);
    signals = signalfd(-1, &mask, SFD_NONBLOCK | SFD_CLOEXEC);
    CHECK(!kill(getpid(), SIGUSR1), "kill");
    timer = timerfd_create(CLOCK_MONOTONIC, TFD_CLOEXEC);
    struct itimerspec often = {{0, 5000000}, {0, 5000000}};
    CHECK(!timerfd_settime(timer, 0, &often, NULL), "timerfd");
    set = epoll_create1(EPOLL_CLOEXEC);
    struct epoll_event wanted = {EPOLLIN | EPOLLET, {.u64 = 0x1234567890abcdef}};
    CHECK(!epoll_ctl(set, EPOLL_CTL_ADD, pipes[0], &wanted), "epoll");
    wanted = (struct epoll_event){EPOLLIN, {.u64 = 0x42}};
    CHECK(!epoll_ctl(set, EPOLL_CTL_ADD, event, &wanted), "epoll");
    watch = inotify_init1(IN_NONBLOCK);
    CHECK(!mkdir(in("watched"), 0700) && inotify_add_watch(watch, in("watched"), IN_CREATE) == 1, "inotify");
}

static void open_sockets(void) {
    struct sockaddr_un path = {.sun_family = AF_UNIX}, name = {.sun_family = AF_UNIX};
    struct sockaddr_in any = {.sin_family = AF_INET, .sin_addr = {htonl(INADDR_LOOPBACK)}};
    struct sockaddr_in6 any6 = {.sin6_family = AF_INET6, .sin6_addr = IN6ADDR_LOOPBACK_INIT};
    socklen_t len = sizeof udp_address;
    int large = 65536, on = 1;
    struct timeval patience = {7, 500000};
    CHECK(!socketpair(AF_UNIX, SOCK_STREAM, 0, stream) && write(stream[0], "in the stream", 13) == 13, "stream");
    CHECK(!setsockopt(stream[1], SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof patience), "SO_RCVTIMEO");
    CHECK(!socketpair(AF_UNIX, SOCK_STREAM, 0, half) && write(half[0], "last", 4) == 4 && !shutdown(half[0], SHUT_WR), "half");
    CHECK(!socketpair(AF_UNIX, SOCK_DGRAM, 0, datagrams), "datagrams");
    CHECK(!socketpair(AF_UNIX, SOCK_SEQPACKET, 0, sequence), "sequence");
    CHECK(!socketpair(AF_UNIX, SOCK_STREAM, 0, carrier), "carrier");
    struct sockaddr_un mark = {.sun_family = AF_UNIX};
    snprintf(mark.sun_path + 1, sizeof mark.sun_path - 1, "memckpt-target-%d", getpid());
    arrow = socket(AF_UNIX, SOCK_DGRAM, 0), target = socket(AF_UNIX, SOCK_DGRAM, 0);
    CHECK(!bind(target, (struct sockaddr *)&mark, sizeof mark) && !connect(arrow, (struct sockaddr *)&mark, sizeof mark), "arrow");
    leave_messages();
    snprintf(path.sun_path, sizeof path.sun_path, "%s/socket", scratch);
    snprintf(name.sun_path + 1, sizeof name.sun_path - 1, "memckpt-descriptors-%d", getpid());
    listener = listen_at((struct sockaddr *)&path, sizeof path);
    CHECK(!chmod(path.sun_path, 0620), "chmod");
    abstract = listen_at((struct sockaddr *)&name, sizeof name);
    client = socket(AF_UNIX, SOCK_STREAM, 0);
    CHECK(!connect(client, (struct sockaddr *)&path, sizeof path), "connect");
    server = accept(listener, NULL, NULL);
    CHECK(server >= 0 && !fcntl(server, F_SETOWN, getpid()) && !fcntl(server, F_SETFL, O_NONBLOCK), "accept");
    udp = socket(AF_INET, SOCK_DGRAM, 0);
    CHECK(!bind(udp, (struct sockaddr *)&any, sizeof any), "bind");
    CHECK(!getsockname(udp, (struct sockaddr *)&udp_address, &len), "getsockname");
    CHECK(!setsockopt(udp, SOL_SOCKET, SO_SNDBUF, &large, sizeof large), "SO_SNDBUF");
    udp6 = socket(AF_INET6, SOCK_DGRAM, 0);
    any6.sin6_port = htons(9);
    CHECK(!connect(udp6, (struct sockaddr *)&any6, sizeof any6), "connect a datagram socket");
    tcp = listen_at((struct sockaddr *)&any, sizeof any);
    CHECK(!setsockopt(tcp, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on), "TCP_NODELAY");
    CHECK(!getsockname(tcp, (struct sockaddr *)&tcp_address, &len), "getsockname");
    any6.sin6_port = 0;
    tcp6 = listen_at((struct sockaddr *)&any6, sizeof any6);
    closed = socket(AF_INET, SOCK_STREAM, 0);
}

static void look_at_files(void) {
    char buffer[16];
    CHECK(lseek(file, 0, SEEK_CUR) == 4 && read(file, buffer, 3) == 3 && !memcmp(buffer, "456", 3), "file");
    CHECK(lseek(twin, 0, SEEK_CUR) == 7 && lseek(twin, 4, SEEK_SET) == 4, "dup");
    CHECK(lseek(read_only, 0, SEEK_CUR) == 0 && write(read_only, "x", 1) < 0 && errno == EBADF, "read-only file");
    CHECK(fcntl(read_only, F_GETFD) == FD_CLOEXEC && fcntl(file, F_GETFD) == 0, "close-on-exec");
    int other = open(in("file"), O_RDONLY);
    CHECK(flock(other, LOCK_EX | LOCK_NB) && errno == EWOULDBLOCK, "lock");
    close(other);
    struct stat stat;
    CHECK(!fstatat(directory, "file", &stat, 0) && stat.st_size == 10, "directory");
    CHECK(pread(deleted, buffer, 16, 0) == 4 && !memcmp(buffer, "gone", 4), "deleted file");
    CHECK(!fstat(deleted, &stat) && stat.st_nlink == 0, "deleted file's links");
    CHECK(write(null, "x", 1) == 1 && read(null, buffer, 1) == 0, "null");
    CHECK(read(zero, buffer, 4) == 4 && !memcmp(buffer, "\0\0\0\0", 4), "zero");
    CHECK(write(full, "x", 1) < 0 && errno == ENOSPC, "full");
    CHECK(read(random_device, buffer, 1) == 1 && read(urandom, buffer, 1) == 1, "random");
    CHECK(pread(memory, buffer, 16, 0) == 6 && !memcmp(buffer, "memory", 6), "memfd");
    CHECK(fcntl(memory, F_GET_SEALS) == (F_SEAL_GROW | F_SEAL_SHRINK) && lseek(memory, 0, SEEK_CUR) == 6, "seals");
}

static void look_at_events(void) {
    struct epoll_event events[4];
    char buffer[512];
    uint64_t count;
    /* The pipe is watched for edges: it has one after its content was written anew. */
    turn_over(pipes[0], pipes[1], "in the pipe", "pipe");
    CHECK((fcntl(pipes[0], F_GETFL) & O_NONBLOCK) && (fcntl(packets[1], F_GETFL) & O_DIRECT) == (plain ? 0 : O_DIRECT), "pipe flags");
    turn_over(fifo, fifo, "in the fifo", "fifo");
    CHECK(epoll_wait(set, events, 4, 0) == 2, "epoll");
    CHECK(events[0].data.u64 + events[1].data.u64 == 0x1234567890abcdef + 0x42, "epoll data");
    CHECK(read(event, &count, 8) == 8 && count == 5 && write(event, &count, 8) == 8, "eventfd");
    struct signalfd_siginfo info;
    CHECK(read(signals, &info, sizeof info) == sizeof info && info.ssi_signo == SIGUSR1, "signalfd");
    CHECK(!kill(getpid(), SIGUSR1), "kill");
    CHECK(read(timer, &count, 8) == 8 && count > 0, "timerfd");
    int made = open(in("watched/made"), O_CREAT | O_WRONLY, 0600);
    CHECK(made >= 0 && !close(made) && !unlink(in("watched/made")), "make a file");
    CHECK(read(watch, buffer, sizeof buffer) > 0 && ((struct inotify_event *)buffer)->wd == 1, "inotify");
    CHECK(!strcmp(((struct inotify_event *)buffer)->name, "made"), "inotify name");
}

static void look_at_sockets(void) {
    char buffer[64];
    struct timeval patience;
    socklen_t len = sizeof patience;
    turn_over(stream[1], stream[0], "in the stream", "stream");
    CHECK(!getsockopt(stream[1], SOL_SOCKET, SO_RCVTIMEO, &patience, &len) && patience.tv_sec == 7, "SO_RCVTIMEO");
    CHECK(recv(half[1], buffer, sizeof buffer, MSG_PEEK) == 4 && !memcmp(buffer, "last", 4), "half");
    CHECK(send(half[0], "x", 1, MSG_NOSIGNAL) < 0 && errno == EPIPE, "shut down");
    look_at_messages();
    CHECK(send(arrow, "arrow", 5, 0) == 5 && recv(target, buffer, 64, MSG_DONTWAIT) == 5, "arrow");
    CHECK(send(client, "ping", 4, 0) == 4 && recv(server, buffer, 64, 0) == 4, "unix connection");
    CHECK(fcntl(server, F_GETOWN) == getpid() && (fcntl(server, F_GETFL) & O_NONBLOCK), "owner");
    struct sockaddr_un path = {.sun_family = AF_UNIX};
    snprintf(path.sun_path, sizeof path.sun_path, "%s/socket", scratch);
    int visitor = socket(AF_UNIX, SOCK_STREAM, 0);
    CHECK(!connect(visitor, (struct sockaddr *)&path, sizeof path), "connect to a path");
    int seen = accept(listener, NULL, NULL);
    CHECK(seen >= 0 && !close(seen) && !close(visitor), "accept at a path");
    len = sizeof path;
    CHECK(!getsockname(abstract, (struct sockaddr *)&path, &len) && path.sun_path[0] == 0 && path.sun_path[1] == 'm', "abstract");
    CHECK(sendto(udp, "self", 4, 0, (struct sockaddr *)&udp_address, sizeof udp_address) == 4, "sendto");
    CHECK(recv(udp, buffer, 64, 0) == 4 && !memcmp(buffer, "self", 4), "udp");
    struct sockaddr_in6 peer;
    len = sizeof peer;
    CHECK(!getpeername(udp6, (struct sockaddr *)&peer, &len) && peer.sin6_port == htons(9), "udp6");
    visitor = socket(AF_INET, SOCK_STREAM, 0);
    CHECK(!connect(visitor, (struct sockaddr *)&tcp_address, sizeof tcp_address), "connect");
    seen = accept(tcp, NULL, NULL);
    CHECK(seen >= 0 && send(visitor, "tcp", 3, 0) == 3 && recv(seen, buffer, 64, 0) == 3, "tcp");
    /* No connection is left over, not even in TIME_WAIT. */
    struct linger at_once = {1, 0};
    CHECK(!setsockopt(visitor, SOL_SOCKET, SO_LINGER, &at_once, sizeof at_once), "SO_LINGER");
    CHECK(!close(visitor) && !close(seen), "close");
    int listens = 0, size = 0;
    len = sizeof listens;
    CHECK(!getsockopt(tcp6, SOL_SOCKET, SO_ACCEPTCONN, &listens, &len) && listens, "tcp6");
    CHECK(!getsockopt(udp, SOL_SOCKET, SO_SNDBUF, &size, &len) && size == 131072, "SO_SNDBUF");
    CHECK(send(closed, "x", 1, MSG_NOSIGNAL) < 0 && (errno == EPIPE || errno == ENOTCONN), "unconnected");
}

int main(int argc, char **argv) {
    if (argc < 3) return 2;
    plain = argc > 3;
    output = argv[1], scratch = argv[2];
    int fd = open("/dev/null", O_RDWR);
    for (int standard = 0; standard < 3; standard++) dup2(fd, standard);
    if (fd > 2) close(fd);
    open_files(), open_pipes(), open_events(), open_sockets();
    for (number = 1;; number++) {
        look_at_files(), look_at_events(), look_at_sockets();
        tell(NULL);
        nap();
        if (access(in("hold"), F_OK)) continue;
        close(open(in("resting"), O_CREAT | O_WRONLY, 0600));
        while (!access(in("hold"), F_OK)) nap();
        unlink(in("resting"));
    }
}
