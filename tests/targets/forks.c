/* Forks when told to. The child allocates, prints its pid by way of the parent, waits for
   a line on its pipe, and checks what it holds. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#define KEEP __attribute__((noinline, noclone))

static char *volatile kept;

KEEP static void in_parent(void) {
    kept = malloc(333);
    __asm__ volatile("");
}

KEEP static void in_child(void) {
    for (int i = 0; i < 10000; i++)
        free(malloc(100 + i % 50));
    kept = malloc(444);
    memset(kept, 7, 444);
    __asm__ volatile("");
}

int main(void) {
    char line[16];
    setvbuf(stdout, NULL, _IONBF, 0);
    setvbuf(stdin, NULL, _IONBF, 0);
    puts("ready");
    if (fgets(line, sizeof line, stdin) == NULL)
        return 1;
    in_parent();
    int go[2], ready[2];
    if (pipe(go) != 0 || pipe(ready) != 0)
        return 1;
    pid_t child = fork();
    if (child == 0) {
        in_child();
        if (write(ready[1], "x", 1) != 1 || read(go[0], line, 1) != 1)
            _exit(2);
        for (int i = 0; i < 444; i++)
            if (kept[i] != 7)
                _exit(3);
        free(kept);
        in_child();
        _exit(0);
    }
    if (child < 0 || read(ready[0], line, 1) != 1)
        return 1;
    printf("child %d\n", child);
    if (fgets(line, sizeof line, stdin) == NULL || write(go[1], "x", 1) != 1)
        return 1;
    int status;
    waitpid(child, &status, 0);
    printf("child ended %d\n", status);
    while (fgets(line, sizeof line, stdin) != NULL)
        ;
    return 0;
}
