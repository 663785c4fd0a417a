/* children HOW: on each line of input makes a child, in one of several ways:
 *   vfork   which allocates 5 blocks of 100 bytes in its parent's memory;
 *   spawn   by posix_spawn(3), another program;
 *   words   a fork which sleeps with addresses of the prefilter on its stack, until the
 *           next line; then it sleeps without them, until the one after.
 * Then the parent allocates 5 blocks of 100 bytes itself. Ends with the input. */
#include <fcntl.h>
#include <spawn.h>
#include <sys/wait.h>

#include "target.h"

extern char **environ;

KEEP void in_child_here(void)
{
        for (int i = 0; i < 5; i++) {
                void *block = malloc(100);
                ESCAPE(block);
        }
}

KEEP void in_parent_here(void)
{
        for (int i = 0; i < 5; i++) {
                void *block = malloc(100);
                ESCAPE(block);
        }
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
        for (char *line = maps; *line; ) {
                char *end = strchr(line, '\n');
                check(end != NULL, "a line of maps");
                *end = 0;
                if (strstr(line, "memprof-prefilter") && strstr(line, "r-xp"))
                        return strtoul(line, NULL, 16) + 512;
                line = end + 1;
        }
        return 0;
}

KEEP void sleeps_with_words(int input)
{
        char byte;
        volatile unsigned long words[8];
        for (int i = 0; i < 8; i++)
                words[i] = address_in_stubs();
        check(read(input, &byte, 1) == 1, "a byte");
        for (int i = 0; i < 8; i++)
                words[i] = 0;
}

/* Over what has been left behind. */
KEEP void wipe(void)
{
        volatile char room[65536];
        memset((char *)room, 0, sizeof room);
}

int main(int argc, char **argv)
{
        const char *how = argc > 1 ? argv[1] : "";
        char byte = 0;
        int go[2];
        pid_t child = 0;
        check(pipe(go) == 0, "pipe");
        say("ready\n");
        while (read(0, &byte, 1) == 1) {
                if (byte != '\n')
                        continue;
                if (child > 0) {
                        check(write(go[1], "x", 1) == 1, "write");
                        continue;
                }
                int status = 0;
                if (!strcmp(how, "vfork")) {
                        pid_t pid = vfork();
                        if (pid == 0) {
                                in_child_here();
                                _exit(0);
                        }
                        check(pid > 0 && waitpid(pid, &status, 0) == pid && status == 0, "vfork");
                } else if (!strcmp(how, "spawn")) {
                        pid_t pid;
                        char *arguments[] = {"true", NULL};
                        check(posix_spawnp(&pid, "true", NULL, NULL, arguments, environ) == 0, "spawn");
                        check(waitpid(pid, &status, 0) == pid && status == 0, "true");
                } else if (!strcmp(how, "words")) {
                        child = fork();
                        if (child == 0) {
                                close(0);
                                sleeps_with_words(go[0]);
                                wipe();
                                check(read(go[0], &byte, 1) == 1, "a byte");
                                in_child_here();
                                _exit(0);
                        }
                        char line[32];
                        snprintf(line, sizeof line, "child %d\n", child);
                        say(line);
                }
                in_parent_here();
                say("done\n");
        }
        int status = 0;
        if (child > 0)
                check(waitpid(child, &status, 0) == child && status == 0, "the child");
        return 0;
}
