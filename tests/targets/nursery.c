/* nursery: a process that does what signals tell it to, and so do its children:
 *   USR1     allocates 10 blocks of 100 bytes, which it keeps; "done PID";
 *   USR2     forks; "child PID";
 *   HUP      becomes this program anew; "ready PID", as at the start;
 *   RTMIN    forks a child that becomes this program at once; "child PID";
 *   RTMIN+1  the same by posix_spawn(3);
 *   RTMIN+2  forks a child that forks another and ends at once; "child PID" of that one;
 *   RTMIN+3  forks 100 children, one after the other, that allocate 5 blocks and end;
 *            "short 100";
 *   RTMIN+4  has a child with its own memory, by vfork(2), for a while: "child PID";
 *   RTMIN+5  forks with addresses of the prefilter on its stack, which the child keeps there;
 *            "child PID";
 *   TERM     ends.
 * Children end with their parent; all end when nothing has come for two minutes. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <spawn.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <time.h>

#include "target.h"

extern char **environ;

static char *arguments[] = {NULL, NULL};

KEEP void work_here(void)
{
        void *block = malloc(100);
        ESCAPE(block);
        check(block != NULL, "malloc");
}

KEEP void short_work(void)
{
        for (int i = 0; i < 5; i++) {
                void *block = malloc(50);
                ESCAPE(block);
        }
}

static void tell(const char *what, int number)
{
        char line[64];
        snprintf(line, sizeof line, "%s %d\n", what, number);
        say(line);
}

static pid_t made(pid_t pid)
{
        check(pid >= 0, "a child");
        if (pid == 0)
                prctl(PR_SET_PDEATHSIG, SIGKILL);
        return pid;
}

static void become_anew(void)
{
        execv("/proc/self/exe", arguments);
        _exit(92);
}

static void forked(void)
{
        pid_t pid = made(fork());
        if (pid > 0)
                tell("child", pid);
}

static void forked_to_exec(void)
{
        pid_t pid = made(fork());
        if (pid == 0)
                become_anew();
        tell("child", pid);
}

static void spawned(void)
{
        pid_t pid;
        check(posix_spawn(&pid, arguments[0], NULL, NULL, arguments, environ) == 0, "spawn");
        tell("child", pid);
}

/* As a daemon does it. */
static void forked_twice(void)
{
        pid_t pid = fork();
        check(pid >= 0, "a child");
        if (pid > 0) {
                check(waitpid(pid, NULL, 0) == pid, "the child");
                return;
        }
        pid = fork();
        check(pid >= 0, "a grandchild");
        if (pid > 0)
                _exit(0);
        tell("child", getpid());
}

static void short_ones(void)
{
        for (int i = 0; i < 100; i++) {
                pid_t pid = made(fork());
                if (pid == 0) {
                        short_work();
                        _exit(0);
                }
                check(waitpid(pid, NULL, 0) == pid, "a short one");
        }
        tell("short", 100);
}

static void with_our_memory(void)
{
        struct timespec while_ = {.tv_nsec = 300000000};
        pid_t pid = vfork();
        check(pid >= 0, "vfork");
        if (pid == 0) {
                tell("child", getpid());
                nanosleep(&while_, NULL);
                _exit(0);
        }
        check(waitpid(pid, NULL, 0) == pid, "the one with our memory");
}

/* An address in the midst of code of that name; 0 if there is none. Allocates nothing. */
static unsigned long address_in_stubs(void)
{
        static char maps[65536];
        int file = open("/proc/self/maps", O_RDONLY);
        size_t length = 0;
        ssize_t got;
        while ((got = read(file, maps + length, sizeof maps - 1 - length)) > 0)
                length += (size_t)got;
        close(file);
        maps[length] = 0;
        for (char *line = maps; *line;) {
                char *end = strchr(line, '\n');
                check(end != NULL, "a line of maps");
                *end = 0;
                if (strstr(line, "memprof-prefilter") && strstr(line, "r-xp"))
                        return strtoul(line, NULL, 16) + 512;
                line = end + 1;
        }
        return 0;
}

static int obey(void);

KEEP void forked_with_words(void)
{
        volatile unsigned long words[8];
        for (int i = 0; i < 8; i++)
                words[i] = address_in_stubs();
        pid_t pid = made(fork());
        if (pid == 0)
                _exit(obey() + (words[0] == 1));
        tell("child", pid);
}

/* Over what calls have left below the stack pointer. */
KEEP void wipe(void)
{
        char room[65536];
        memset(room, 0, sizeof room);
        ESCAPE(room);
}

static sigset_t signals;

static int obey(void)
{
        for (;;) {
                const struct timespec limit = {.tv_sec = 120};
                wipe();
                int got = sigtimedwait(&signals, NULL, &limit);
                if (got < 0 && errno == EINTR)
                        continue;
                if (got < 0 || got == SIGTERM)
                        return 0;
                if (got == SIGUSR1) {
                        for (int i = 0; i < 10; i++)
                                work_here();
                        tell("done", getpid());
                } else if (got == SIGUSR2) {
                        forked();
                } else if (got == SIGHUP) {
                        become_anew();
                } else if (got == SIGRTMIN) {
                        forked_to_exec();
                } else if (got == SIGRTMIN + 1) {
                        spawned();
                } else if (got == SIGRTMIN + 2) {
                        forked_twice();
                } else if (got == SIGRTMIN + 3) {
                        short_ones();
                } else if (got == SIGRTMIN + 4) {
                        with_our_memory();
                } else if (got == SIGRTMIN + 5) {
                        forked_with_words();
                } else {
                        while (waitpid(-1, NULL, WNOHANG) > 0)
                                ;
                }
        }
}

int main(void)
{
        static char path[4096];
        check(readlink("/proc/self/exe", path, sizeof path - 1) > 0, "a name");
        arguments[0] = path;
        sigemptyset(&signals);
        const int known[] = {SIGUSR1, SIGUSR2, SIGHUP, SIGCHLD, SIGTERM};
        for (unsigned i = 0; i < sizeof known / sizeof *known; i++)
                sigaddset(&signals, known[i]);
        for (int i = 0; i < 6; i++)
                sigaddset(&signals, SIGRTMIN + i);
        check(sigprocmask(SIG_BLOCK, &signals, NULL) == 0, "sigprocmask");
        tell("ready", getpid());
        return obey();
}
