/* Calls of malloc at a chosen depth of the stack.
 *
 * A line `run DEPTH COUNT` on stdin makes COUNT calls of malloc, 65536 at most, DEPTH
 * functions below main. Answers `ns=N`: the time of these calls. `free` gives back
 * what they got, and answers `freed=N`. Must be compiled with frame pointers and
 * without sibling calls. */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

enum { MOST = 65536 };

static void *blocks[MOST];
static long held;

static uint64_t now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000 + (uint64_t)t.tv_nsec;
}

__attribute__((noinline)) static uint64_t leaf(long count) {
    uint64_t start = now();
    for (long i = 0; i < count; i++) blocks[i] = malloc(64);
    return now() - start;
}

__attribute__((noinline)) static uint64_t down(long depth, long count) {
    uint64_t ns = depth <= 1 ? leaf(count) : down(depth - 1, count);
    __asm__ volatile("");
    return ns;
}

int main(void) {
    static char in[256], out[4096];
    long depth, count;
    setvbuf(stdin, NULL, _IONBF, 0);
    setvbuf(stdout, out, _IOLBF, sizeof out);
    printf("ready\n");
    while (fgets(in, sizeof in, stdin)) {
        if (!strcmp(in, "free\n")) {
            for (long i = 0; i < held; i++) free(blocks[i]);
            printf("freed=%ld\n", held);
            held = 0;
            continue;
        }
        if (sscanf(in, "run %ld %ld", &depth, &count) != 2) return 2;
        if (held || count < 1 || count > MOST) return 2;
        held = count;
        printf("ns=%llu\n", (unsigned long long)down(depth, count));
    }
    _exit(0);
}
