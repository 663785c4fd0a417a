/* crowd COUNT: COUNT children. With each "go" those that are left allocate 10 blocks of 1,000
 * bytes each, one child after the other with some time between, and keep them; "end N" ends
 * the last N. Tells the pid of each child first. */
#include <signal.h>
#include <sys/wait.h>
#include "target.h"

static int done[2];

KEEP static void hold_here(void)
{
        void *block = malloc(1000);
        ESCAPE(block);
        check(block != NULL, "malloc");
}

static void child(void)
{
        sigset_t set;
        sigemptyset(&set);
        sigaddset(&set, SIGUSR1);
        for (;;) {
                int number;
                if (sigwait(&set, &number) != 0)
                        _exit(91);
                for (int i = 0; i < 10; i++)
                        hold_here();
                if (write(done[1], "x", 1) != 1)
                        _exit(92);
        }
}

int main(int argc, char **argv)
{
        static pid_t children[4096];
        unsigned long count = number(argc, argv, 1, 10);
        check(count <= 4096, "at most 4096");
        sigset_t set;
        sigemptyset(&set);
        sigaddset(&set, SIGUSR1);
        check(sigprocmask(SIG_BLOCK, &set, NULL) == 0, "sigprocmask");
        check(pipe(done) == 0, "pipe");
        for (unsigned long i = 0; i < count; i++) {
                children[i] = fork();
                check(children[i] >= 0, "fork");
                if (children[i] == 0)
                        child();
                say_value("child", (unsigned long)children[i]);
        }
        say("ready\n");
        char line[64];
        size_t length = 0;
        while (read(0, line + length, 1) == 1) {
                if (line[length] != '\n') {
                        check(++length < sizeof line, "a short line");
                        continue;
                }
                line[length] = 0;
                length = 0;
                if (strncmp(line, "end ", 4) == 0) {
                        for (long left = atol(line + 4); left > 0; left--) {
                                pid_t pid = children[--count];
                                check(kill(pid, SIGKILL) == 0, "kill");
                                check(waitpid(pid, NULL, 0) == pid, "waitpid");
                        }
                } else {
                        for (unsigned long i = 0; i < count; i++) {
                                char byte;
                                check(kill(children[i], SIGUSR1) == 0, "kill");
                                check(read(done[0], &byte, 1) == 1, "read");
                                usleep(1000);
                        }
                }
                say("done\n");
        }
        while (count > 0) {
                pid_t pid = children[--count];
                kill(pid, SIGKILL);
                waitpid(pid, NULL, 0);
        }
        return 0;
}
