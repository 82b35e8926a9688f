/* Threads that check themselves: crowd STATE WORKERS [IDLE]
 *
 * STATE is a file that is mapped shared (struct state below; tests/tests/target/victim.rs has the same). WORKERS names
 * one thread per letter, the last one on the main thread:
 *   f  general registers, x87 and AVX in a busy loop
 *   m  memory, under a timer's signals handled on a small alternate stack
 *   s  nanosleep, poll, futex, select with timeouts
 *   z  nanosleep for two seconds
 *   w  read, epoll_wait, futex without
 *   r  increments of per-CPU counters in restartable sequences
 *   t  system calls on a stack of 2 KiB between guarded bytes
 * IDLE more threads sit in pause. "!" before WORKERS installs a seccomp filter that allows everything, "-" one that
 * fails shmat.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/filter.h>
#include <linux/futex.h>
#include <linux/seccomp.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/auxv.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/rseq.h>
#include <sys/select.h>
#include <sys/syscall.h>
#include <time.h>
#include <ucontext.h>
#include <unistd.h>

#define WORKERS 8
#define KINDS 16
#define MEMORY (1 << 20)
#define CPUS 256

struct state {
	volatile int64_t progress[WORKERS];
	volatile int64_t errors[WORKERS][KINDS];
	volatile int64_t interrupted; /* EINTR that nobody asked for */
	volatile int64_t signals, aborts, commits;
	volatile int32_t tid[WORKERS];
	volatile uint64_t memory, length; /* bytes i * 31 + page */
	volatile int32_t ready, stop, workers, pad;
	struct { volatile int64_t n; char pad[56]; } counter[CPUS];
};

static struct state *state;
static int wake_pipe[2], wake_epoll, wake_event;
static volatile uint32_t wake_futex;
static volatile int waiting; /* somebody must go on waking them */

static void wrong(int self, int kind) { state->errors[self][kind]++; }

static void check_mask(int self, int blocked)
{
	sigset_t set;
	pthread_sigmask(SIG_BLOCK, NULL, &set);
	for (int s = 1; s <= 64; s++)
		if (s != 32 && s != 33 && sigismember(&set, s) != (s == blocked)) {
			wrong(self, 15);
			break;
		}
}

static void busy(int self)
{
	uint64_t in[4], out[4], general[6], i = 0;
	double pi;
	int avx = __builtin_cpu_supports("avx2");
	while (!state->stop || waiting) {
		uint64_t k = ++i * 0x9e3779b97f4a7c15ull;
		for (int j = 0; j < 4; j++) in[j] = k * (2 * j + 1);
		memcpy(out, in, sizeof out);
		if (avx)
			__asm__ volatile("vmovdqu %1, %%ymm5; vpxor %%ymm9, %%ymm9, %%ymm9; vpxor %%ymm5, %%ymm9, %%ymm9"
					 : : "m"(out), "m"(in) : "xmm5", "xmm9");
		__asm__ volatile(
			"mov %2, %%rbx; lea 1(%2), %%r8; lea 2(%2), %%r9; lea 3(%2), %%r12; lea 4(%2), %%r13; lea 5(%2), %%r15\n"
			"fninit; fldpi\n"
			"mov $20000, %%ecx\n"
			"1: dec %%ecx; jnz 1b\n"
			"mov %%rbx, 0(%1); mov %%r8, 8(%1); mov %%r9, 16(%1); mov %%r12, 24(%1); mov %%r13, 32(%1); mov %%r15, 40(%1)\n"
			"fstpl %0\n"
			: "=m"(pi) : "r"(general), "r"(k)
			: "rbx", "r8", "r9", "r12", "r13", "r15", "rcx", "memory", "cc");
		if (avx) __asm__ volatile("vmovdqu %%ymm9, %0; vzeroupper" : "=m"(out));
		if (memcmp(in, out, sizeof in)) wrong(self, 0);
		for (int j = 0; j < 6; j++) if (general[j] != k + j) wrong(self, 1);
		if (pi != 3.14159265358979311600) wrong(self, 2);
		state->progress[self]++;
		if (!(i & 63)) check_mask(self, 0);
		if (!(i & 3)) {
			uint64_t one = 1;
			if (write(wake_event, &one, 8) < 0 || write(wake_pipe[1], &i, 8) < 0) { /* full: nobody reads */ }
			wake_futex++;
			syscall(SYS_futex, &wake_futex, FUTEX_WAKE, 9, NULL, NULL, 0);
		}
	}
}

static void on_signal(int signal)
{
	volatile char used[256];
	memset((void *)used, signal, sizeof used);
	state->signals++;
}

static void memory(int self)
{
	size_t need = getauxval(51 /* AT_MINSIGSTKSZ */) + 1024, size = need > 2048 ? need : 2048, n = 8192;
	stack_t stack = { .ss_sp = malloc(size), .ss_size = size }, now;
	timer_t timer;
	struct sigevent event = { .sigev_notify = SIGEV_THREAD_ID, .sigev_signo = SIGRTMIN + 2 };
	struct itimerspec period = { { 0, 700000 }, { 0, 700000 } };
	struct sigaction action = { .sa_handler = on_signal, .sa_flags = SA_RESTART | SA_ONSTACK };
	uint64_t *words = malloc(n * 8), g = 1;
	if (sigaltstack(&stack, NULL)) wrong(self, 2);
	sigaction(SIGRTMIN + 2, &action, NULL);
	event._sigev_un._tid = gettid();
	timer_create(CLOCK_MONOTONIC, &event, &timer);
	timer_settime(timer, 0, &period, NULL);
	while (!state->stop) {
		uint64_t sum = 0, want = 0;
		g++;
		for (size_t i = 0; i < n; i++) words[i] = g * i ^ (g >> 3);
		for (size_t i = 0; i < n; i++) { sum += words[i]; want += g * i ^ (g >> 3); }
		if (sum != want) wrong(self, 0);
		state->progress[self]++;
		if (!(g & 15)) check_mask(self, 0);
		if (!(g & 31)) {
			sigaltstack(NULL, &now);
			if (now.ss_sp != stack.ss_sp || now.ss_size != size || now.ss_flags) wrong(self, 1);
		}
	}
	timer_delete(timer);
}

static double microseconds(void)
{
	struct timespec t;
	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec * 1e6 + t.tv_nsec / 1e3;
}

static void sleeper(int self)
{
	static uint32_t never;
	for (long i = 0; !state->stop; i++) {
		double start = microseconds(), want = 1500;
		struct timespec ts = { 0, 1500000 };
		struct timeval tv = { 0, 1500 };
		long rc = 0;
		errno = 0;
		switch (i % 4) {
		case 0: rc = nanosleep(&ts, NULL); break;
		case 1: rc = poll(NULL, 0, 2); want = 2000; break;
		case 2: rc = syscall(SYS_futex, &never, FUTEX_WAIT, 0, &ts, NULL, 0); break;
		case 3: rc = select(0, NULL, NULL, NULL, &tv); break;
		}
		int error = rc < 0 ? errno : 0;
		double took = microseconds() - start;
		if (error == EINTR) state->interrupted++;
		else if (error && error != ETIMEDOUT) wrong(self, 0);
		else if (took < want - 1) wrong(self, 1);
		state->progress[self]++;
		check_mask(self, 0);
	}
}

static void long_sleeper(int self)
{
	state->progress[self]++; /* there, if not on time */
	while (!state->stop) {
		double start = microseconds();
		struct timespec ts = { 2, 0 };
		if (nanosleep(&ts, NULL)) state->interrupted++;
		else if (microseconds() - start < 2e6 || microseconds() - start > 4e6) wrong(self, 0);
		state->progress[self]++;
		check_mask(self, 0);
	}
}

static void waiter(int self)
{
	uint64_t last = 0, value;
	waiting = 1;
	for (long i = 0; !state->stop; i++) {
		int eintr = 0;
		switch (i % 3) {
		case 0:
			if (read(wake_pipe[0], &value, 8) != 8) { if (errno == EINTR) eintr = 1; else wrong(self, 0); break; }
			if (value <= last) wrong(self, 1);
			last = value;
			break;
		case 1: {
			struct epoll_event e;
			int n = epoll_wait(wake_epoll, &e, 1, -1);
			if (n < 0) { if (errno == EINTR) eintr = 1; else wrong(self, 2); break; }
			if (n != 1 || e.data.u64 != 77) { wrong(self, 3); break; }
			if (read(wake_event, &value, 8) != 8) wrong(self, 4);
			break;
		}
		case 2: {
			uint32_t seen = wake_futex;
			if (syscall(SYS_futex, &wake_futex, FUTEX_WAIT, seen, NULL, NULL, 0) < 0 && errno != EAGAIN) {
				if (errno == EINTR) eintr = 1; else wrong(self, 5);
			}
		}
		}
		state->interrupted += eintr;
		state->progress[self]++;
		if (!(i & 7)) check_mask(self, 0);
	}
	waiting = 0;
}

static void restartable(int self)
{
	struct rseq *rseq = (void *)((char *)__builtin_thread_pointer() + __rseq_offset);
	if (!__rseq_size) { state->progress[self] = -1; return; }
	while (!state->stop) {
		/* counter[cpu]++, with a pause between load and store that only a restart can make right */
		__asm__ volatile goto(
			".pushsection __rseq_cs, \"aw\"\n .balign 32\n 3: .long 0, 0\n .quad 1f, 2f - 1f, 4f\n .popsection\n"
			"lea 3b(%%rip), %%rax\n mov %%rax, 8(%0)\n"
			"1: mov 4(%0), %%ecx\n shl $6, %%rcx\n add %1, %%rcx\n mov (%%rcx), %%rdx\n"
			"mov $300, %%eax\n 5: dec %%eax\n jnz 5b\n"
			"inc %%rdx\n mov %%rdx, (%%rcx)\n"
			"2:\n"
			".pushsection __rseq_abort, \"ax\"\n .byte 0x0f, 0xb9, 0x3d\n .long 0x53053053\n 4: jmp %l[aborted]\n .popsection\n"
			: : "r"(rseq), "r"(&state->counter[0].n) : "rax", "rcx", "rdx", "memory", "cc" : aborted);
		__atomic_add_fetch(&state->commits, 1, __ATOMIC_RELAXED);
		state->progress[self]++;
		continue;
aborted:
		__atomic_add_fetch(&state->aborts, 1, __ATOMIC_RELAXED);
	}
}

static __thread ucontext_t outside, inside;
static __thread int tiny_self;
static __thread unsigned char *tiny;
#define GUARD 8192
#define TINY 2048

static long raw(long number, long a, long b, long c, long d)
{
	register long r10 __asm__("r10") = d;
	long rc;
	__asm__ volatile("syscall" : "=a"(rc) : "a"(number), "D"(a), "S"(b), "d"(c), "r"(r10) : "rcx", "r11", "memory");
	return rc;
}

static void on_tiny_stack(void)
{
	struct timespec ts = { 0, 300000 };
	for (long i = 0; !state->stop; i++) {
		long rc = i & 1 ? raw(SYS_nanosleep, (long)&ts, 0, 0, 0) : raw(SYS_poll, 0, 0, 1, 0);
		if (rc == -EINTR) state->interrupted++;
		else if (rc) wrong(tiny_self, 0);
		for (volatile int spin = 0; spin < 2000; spin++) ;
		for (int k = 0; k < GUARD; k++)
			if (tiny[k] != 0xa5 || tiny[GUARD + TINY + k] != 0x5a) { wrong(tiny_self, 1); break; }
		state->progress[tiny_self]++;
	}
}

static void tiny_stack(int self)
{
	tiny_self = self;
	tiny = malloc(2 * GUARD + TINY);
	memset(tiny, 0xa5, GUARD);
	memset(tiny + GUARD + TINY, 0x5a, GUARD);
	getcontext(&inside);
	inside.uc_stack.ss_sp = tiny + GUARD;
	inside.uc_stack.ss_size = TINY;
	inside.uc_link = &outside;
	makecontext(&inside, on_tiny_stack, 0);
	swapcontext(&outside, &inside);
}

static void *work(void *argument)
{
	int self = (intptr_t)argument >> 8;
	state->tid[self] = gettid();
	switch ((intptr_t)argument & 0xff) {
	case 'f': busy(self); break;
	case 'm': memory(self); break;
	case 's': sleeper(self); break;
	case 'z': long_sleeper(self); break;
	case 'w': waiter(self); break;
	case 'r': restartable(self); break;
	case 't': tiny_stack(self); break;
	}
	return NULL;
}

static void *idle(void *argument) { for (;;) pause(); return argument; }

static void filter(int action)
{
	struct sock_filter program[] = {
		BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
		BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_shmat, 0, 1),
		BPF_STMT(BPF_RET | BPF_K, action),
		BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
	};
	struct sock_fprog prog = { 4, program };
	prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0);
	if (prctl(PR_SET_SECCOMP, 2, &prog)) _exit(3);
}

int main(int argc, char **argv)
{
	if (argc < 3) return 2;
	int fd = open(argv[1], O_RDWR);
	const char *workers = argv[2];
	state = mmap(NULL, sizeof *state, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	if (state == MAP_FAILED) return 2;
	close(fd);
	prctl(PR_SET_PDEATHSIG, SIGKILL);
	unsigned char *bytes = mmap(NULL, MEMORY, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	for (size_t i = 0; i < MEMORY; i++) bytes[i] = i * 31 + (i >> 12);
	state->memory = (uint64_t)bytes;
	state->length = MEMORY;
	if (pipe2(wake_pipe, O_NONBLOCK)) return 2;
	fcntl(wake_pipe[0], F_SETFL, 0);
	wake_event = eventfd(0, EFD_NONBLOCK);
	wake_epoll = epoll_create1(0);
	struct epoll_event event = { EPOLLIN, { .u64 = 77 } };
	epoll_ctl(wake_epoll, EPOLL_CTL_ADD, wake_event, &event);
	if (*workers == '!') { filter(SECCOMP_RET_ALLOW); workers++; }
	else if (*workers == '-') { filter(SECCOMP_RET_ERRNO | 1); workers++; }
	pthread_t thread;
	pthread_attr_t small;
	pthread_attr_init(&small);
	pthread_attr_setstacksize(&small, 65536);
	for (int i = 0; i < (argc > 3 ? atoi(argv[3]) : 0); i++) pthread_create(&thread, &small, idle, NULL);
	int count = strlen(workers);
	pthread_t threads[WORKERS];
	state->workers = count;
	for (intptr_t i = 0; i + 1 < count; i++) pthread_create(&threads[i], NULL, work, (void *)(i << 8 | workers[i]));
	state->ready = 1;
	if (count) work((void *)((intptr_t)(count - 1) << 8 | workers[count - 1]));
	else idle(NULL);
	for (intptr_t i = 0; i + 1 < count; i++) pthread_join(threads[i], NULL);
	int64_t sum = 0;
	for (int i = 0; i < CPUS; i++) sum += state->counter[i].n;
	for (size_t i = 0; i < MEMORY; i++) if (bytes[i] != (unsigned char)(i * 31 + (i >> 12))) return 5;
	return sum == state->commits ? 0 : 4;
}
