/* Threads of which some allocate and free without a pause, and the others sleep. Arguments:
   how many threads, how many of them busy. Prints "ready", and ends with its input. */
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

static void *allocate(void *argument) {
    size_t size = 32 + ((size_t)argument & 63);
    for (;;) {
        void *block = malloc(size);
        __asm__ volatile("" : : "r"(block) : "memory");
        free(block);
    }
    return NULL;
}

static void *rest(void *argument) {
    for (;;)
        pause();
    return argument;
}

int main(int count, char **arguments) {
    long threads = count > 2 ? atol(arguments[1]) : 0;
    long busy = count > 2 ? atol(arguments[2]) : 0;
    for (long i = 1; i < threads; i++) {
        pthread_t thread;
        if (pthread_create(&thread, NULL, i <= busy ? allocate : rest, (void *)i) != 0) {
            fputs("no thread\n", stderr);
            return 1;
        }
    }
    puts("ready");
    fflush(stdout);
    char line[8];
    return fgets(line, sizeof line, stdin) == NULL ? 0 : 1;
}
