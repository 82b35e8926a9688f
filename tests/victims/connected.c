/* A tree with connections: `connected OUTPUT [nobody]`. The root has two children, to each of which a unix socket leads; they
 * listen together, on the port that OUTPUT.port says once all is ready, and send back whatever their connections bring. The root
 * asks each child in turns whether it is well, and writes `N ok` to OUTPUT each time both are, or what is wrong. With `nobody`
 * they are without privileges. The first child sets SO_REUSEADDR on its connections, the second does not. */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum { CHILDREN = 2, MOST = 64, ROOM = 1 << 16 };

struct connection {
    int fd;
    size_t length;
    char bytes[ROOM];
};
static struct connection connections[MOST];
static int count;

static int listener(void) {
    int fd = socket(AF_INET6, SOCK_STREAM | SOCK_NONBLOCK, 0), off = 0;
    struct sockaddr_in6 any = {.sin6_family = AF_INET6};
    if (setsockopt(fd, IPPROTO_IPV6, IPV6_V6ONLY, &off, sizeof off)) _exit(3);
    if (bind(fd, (struct sockaddr *)&any, sizeof any) || listen(fd, 16)) _exit(4);
    return fd;
}

static int number(int fd, int level, int name) {
    int value = -1;
    socklen_t length = sizeof value;
    getsockopt(fd, level, name, &value, &length);
    return value;
}

/* What is wrong with a connection; 0 for nothing. */
static int wrong(int fd, int reuse) {
    if (number(fd, IPPROTO_TCP, TCP_REPAIR) != 0) return 1;
    if (number(fd, SOL_SOCKET, SO_REUSEADDR) != reuse) return 2;
    return 0;
}

static int serve(struct connection *c, short events) {
    if (events & (POLLIN | POLLHUP | POLLERR) && c->length < ROOM) {
        ssize_t got = read(c->fd, c->bytes + c->length, ROOM - c->length);
        if (got == 0 || (got < 0 && errno != EAGAIN)) return 0;
        if (got > 0) c->length += (size_t)got;
    }
    if (c->length > 0) {
        ssize_t put = write(c->fd, c->bytes, c->length);
        if (put < 0 && errno != EAGAIN) return 0;
        if (put > 0) memmove(c->bytes, c->bytes + put, c->length -= (size_t)put);
    }
    return 1;
}

static void child(int listening, int root, int reuse) {
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    for (;;) {
        struct pollfd polled[MOST + 2] = {{root, POLLIN, 0}, {listening, count < MOST ? POLLIN : 0, 0}};
        for (int i = 0; i < count; i++) {
            struct connection *c = &connections[i];
            short events = (short)((c->length < ROOM ? POLLIN : 0) | (c->length ? POLLOUT : 0));
            polled[i + 2] = (struct pollfd){c->fd, events, 0};
        }
        int before = count;
        if (poll(polled, (nfds_t)before + 2, -1) < 0) continue;
        for (int i = before - 1; i >= 0; i--) {
            if (!polled[i + 2].revents || serve(&connections[i], polled[i + 2].revents)) continue;
            close(connections[i].fd);
            connections[i] = connections[--count];
        }
        if (polled[1].revents) {
            int fd = accept4(listening, NULL, NULL, SOCK_NONBLOCK);
            if (fd >= 0) {
                setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &reuse, sizeof reuse);
                connections[count++] = (struct connection){.fd = fd};
            }
        }
        if (polled[0].revents) {
            int answer[2] = {0};
            if (read(root, answer, sizeof *answer) != sizeof *answer) _exit(0);
            for (int i = 0; i < count && !answer[1]; i++) answer[1] = wrong(connections[i].fd, reuse);
            if (write(root, answer, sizeof answer) != sizeof answer) _exit(5);
        }
    }
}

int main(int argc, char **argv) {
    if (argc < 2) return 2;
    FILE *output = fopen(argv[1], "w");
    if (!output) return 2;
    char path[4096];
    snprintf(path, sizeof path, "%s.port", argv[1]);
    FILE *file = fopen(path, "w");
    signal(SIGPIPE, SIG_IGN);
    if (argc > 2 && (setgid(65534) || setuid(65534) || prctl(PR_SET_DUMPABLE, 1))) return 2;
    int listening = listener(), ends[CHILDREN];
    for (int i = 0; i < CHILDREN; i++) {
        int pair[2];
        if (socketpair(AF_UNIX, SOCK_SEQPACKET, 0, pair)) return 2;
        if (fork() == 0) {
            for (int j = 0; j < i; j++) close(ends[j]);
            close(pair[0]);
            child(listening, pair[1], i == 0);
        }
        close(pair[1]);
        ends[i] = pair[0];
    }
    struct sockaddr_in6 address;
    socklen_t length = sizeof address;
    if (getsockname(listening, (struct sockaddr *)&address, &length)) return 2;
    close(listening);
    fprintf(file, "%d\n", ntohs(address.sin6_port));
    fclose(file);
    for (int n = 1;; n++) {
        for (int i = 0; i < CHILDREN; i++) {
            int answer[2] = {0};
            if (write(ends[i], &n, sizeof n) != sizeof n || read(ends[i], answer, sizeof answer) != sizeof answer) {
                fprintf(output, "%d child %d does not answer: %s\n", n, i, strerror(errno));
                return 1;
            }
            if (answer[0] != n || answer[1]) {
                fprintf(output, "%d child %d: answer %d, wrong %d\n", n, i, answer[0], answer[1]);
                return 1;
            }
        }
        fprintf(output, "%d ok\n", n);
        fflush(output);
        nanosleep(&(struct timespec){0, 5000000}, NULL);
    }
}
