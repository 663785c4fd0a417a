/* A call that waits, named by the argument; "ready" is written before. A helper process,
 * told by a byte on the standard input, makes happen what is waited for, where something
 * has to. Exits 0 if the call returned what it should, and not before its time. */
#define _GNU_SOURCE
#include <errno.h>
#include <linux/aio_abi.h>
#include <linux/futex.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/ipc.h>
#include <sys/mman.h>
#include <sys/msg.h>
#include <sys/select.h>
#include <sys/sem.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define TIMEOUT_MS 600
static volatile sig_atomic_t handled;
static int *word, from[2], sockets[2];
static pid_t helper;

static void handler(int signal) { (void)signal; handled++; }
static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1e3 + t.tv_nsec / 1e6;
}
static void ready(void) { if (write(1, "ready\n", 6) != 6) _exit(90); }

/* The helper: `act` once it is told to. */
static void help(void (*act)(void)) {
    helper = fork();
    if (helper != 0) return;
    char byte;
    if (read(0, &byte, 1) == 1) act();
    _exit(0);
}
static void act_nothing(void) {}
static void act_write(void) { if (write(from[1], "x", 1) != 1) _exit(1); }
static void act_send(void) { if (write(sockets[1], "x", 1) != 1) _exit(1); }
static void act_wake(void) { *word = 1; syscall(SYS_futex, word, FUTEX_WAKE, 1, NULL, NULL, 0); }
static void act_kill(void) { kill(getppid(), SIGUSR1); }
static int semaphore, queue;
static void act_up(void) { struct sembuf up = {0, 1, 0}; semop(semaphore, &up, 1); }
static void act_message(void) { struct { long type; char text; } m = {1, 'x'}; msgsnd(queue, &m, 1, 0); }
static struct sockaddr address;
static socklen_t address_len = sizeof address;
static void act_connect(void) {
    int fd = socket(AF_UNIX, SOCK_STREAM, 0);
    if (connect(fd, &address, address_len)) _exit(1);
    pause();
}
static int listener(void) {
    int fd = socket(AF_UNIX, SOCK_STREAM, 0);
    sa_family_t unnamed = AF_UNIX;
    bind(fd, (struct sockaddr *)&unnamed, sizeof unnamed);
    listen(fd, 4);
    getsockname(fd, &address, &address_len);
    return fd;
}
static void time_out(int fd, int ms) {
    struct timeval t = {ms / 1000, ms % 1000 * 1000};
    setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &t, sizeof t);
}
/* Whether a call that should end by its time-out did. */
static int timed_out(double begun, int as_expected) {
    double took = now() - begun;
    if (took < TIMEOUT_MS || took > 4 * TIMEOUT_MS) { fprintf(stderr, "took %.0f ms\n", took); return 0; }
    return as_expected;
}

static int run(const char *kind) {
    struct timespec timeout = {0, TIMEOUT_MS * 1000000L};
    struct sigaction action = {.sa_handler = handler};
    sigset_t usr1, none;
    sigemptyset(&usr1); sigaddset(&usr1, SIGUSR1); sigemptyset(&none);
    sigaction(SIGUSR1, &action, NULL);
    char byte;
    double begun = now();
    int epoll = epoll_create1(0);
    struct epoll_event event = {.events = EPOLLIN};
    epoll_ctl(epoll, EPOLL_CTL_ADD, from[0], &event);
    struct pollfd pollfd = {from[0], POLLIN, 0};
#define IS(name) !strcmp(kind, name)
    if (IS("read")) { help(act_write); ready(); return read(from[0], &byte, 1) == 1; }
    if (IS("poll")) { help(act_write); ready(); return poll(&pollfd, 1, -1) == 1; }
    if (IS("poll-timeout")) { ready(); return timed_out(begun, poll(&pollfd, 1, TIMEOUT_MS) == 0); }
    if (IS("ppoll")) { sigprocmask(SIG_BLOCK, &usr1, NULL); help(act_kill); ready();
        return ppoll(&pollfd, 1, NULL, &none) == -1 && errno == EINTR && handled == 1; }
    if (IS("select")) { fd_set set; FD_ZERO(&set); FD_SET(from[0], &set); help(act_write); ready();
        return select(from[0] + 1, &set, NULL, NULL, NULL) == 1; }
    if (IS("futex")) { help(act_wake); ready(); return syscall(SYS_futex, word, FUTEX_WAIT, 0, NULL, NULL, 0) == 0; }
    if (IS("futex-timeout")) { ready();
        return timed_out(begun, syscall(SYS_futex, word, FUTEX_WAIT, 0, &timeout, NULL, 0) == -1 && errno == ETIMEDOUT); }
    if (IS("nanosleep")) { ready(); return timed_out(begun, nanosleep(&timeout, NULL) == 0); }
    if (IS("clock_nanosleep")) {
        struct timespec at; clock_gettime(CLOCK_MONOTONIC, &at); at.tv_sec += 1; ready();
        return timed_out(begun, clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &at, NULL) == 0); }
    if (IS("epoll_wait")) { help(act_write); ready(); return epoll_wait(epoll, &event, 1, -1) == 1; }
    if (IS("epoll-timeout")) { ready(); return timed_out(begun, epoll_wait(epoll, &event, 1, TIMEOUT_MS) == 0); }
    if (IS("epoll_pwait")) { sigprocmask(SIG_BLOCK, &usr1, NULL); help(act_kill); ready();
        return epoll_pwait(epoll, &event, 1, -1, &none) == -1 && errno == EINTR && handled == 1; }
    if (IS("epoll_pwait2")) { help(act_write); ready(); return syscall(SYS_epoll_pwait2, epoll, &event, 1, NULL, NULL, 0) == 1; }
    if (IS("pause")) { help(act_kill); ready(); return pause() == -1 && errno == EINTR && handled == 1; }
    if (IS("sigsuspend")) { sigprocmask(SIG_BLOCK, &usr1, NULL); help(act_kill); ready();
        int result = sigsuspend(&none); sigset_t after; int error = errno; sigprocmask(SIG_BLOCK, NULL, &after);
        return result == -1 && error == EINTR && handled == 1 && sigismember(&after, SIGUSR1); }
    if (IS("sigtimedwait")) { sigprocmask(SIG_BLOCK, &usr1, NULL); help(act_kill); ready();
        return sigwaitinfo(&usr1, NULL) == SIGUSR1 && handled == 0; }
    if (IS("accept")) { int fd = listener(); help(act_connect); ready(); return accept(fd, NULL, NULL) >= 0; }
    if (IS("accept-timeout")) { int fd = listener(); time_out(fd, 10000); help(act_connect); ready(); return accept(fd, NULL, NULL) >= 0; }
    if (IS("recv")) { help(act_send); ready(); return recv(sockets[0], &byte, 1, 0) == 1; }
    if (IS("recv-timeout")) { time_out(sockets[0], 10000); help(act_send); ready(); return recv(sockets[0], &byte, 1, 0) == 1; }
    if (IS("wait4")) { help(act_nothing); ready(); int status = 1; return wait4(helper, &status, 0, NULL) == helper && status == 0; }
    if (IS("semop")) { semaphore = semget(IPC_PRIVATE, 1, 0600); help(act_up); ready(); struct sembuf down = {0, -1, 0};
        int result = semop(semaphore, &down, 1); semctl(semaphore, 0, IPC_RMID); return result == 0; }
    if (IS("msgrcv")) { queue = msgget(IPC_PRIVATE, 0600); help(act_message); ready(); struct { long type; char text; } m;
        int result = msgrcv(queue, &m, 1, 0, 0); msgctl(queue, IPC_RMID, NULL); return result == 1; }
    if (IS("io_getevents")) { aio_context_t context = 0; syscall(SYS_io_setup, 4, &context); struct io_event done; ready();
        return timed_out(begun, syscall(SYS_io_getevents, context, 1, 1, &done, &timeout) == 0); }
    return 0;
}

int main(int argc, char **argv) {
    word = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (argc < 2 || pipe(from) || socketpair(AF_UNIX, SOCK_STREAM, 0, sockets)) return 91;
    alarm(60);
    int right = run(argv[1]);
    if (!right) perror(argv[1]);
    if (helper > 0) kill(helper, SIGKILL);
    return right ? 0 : 1;
}
