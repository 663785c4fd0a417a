/* Live blocks from many distinct call stacks.
 *
 * A line `fill STACKS BLOCKS` on stdin allocates BLOCKS blocks at each of STACKS
 * call stacks, 65536 at most: 16 calls deep, each of f0 or f1 by a bit of the
 * stack's number. Answers `ns=N live=N live_bytes=N`, all blocks so far. Must be
 * compiled with frame pointers and without sibling calls. */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>
#include <unistd.h>

static uint64_t live, live_bytes;

static uint64_t now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000 + (uint64_t)t.tv_nsec;
}

static void *volatile keep;

__attribute__((noinline)) static void leaf(long blocks) {
    for (long i = 0; i < blocks; i++) {
        size_t size = 16 + (live % 16) * 8;
        keep = malloc(size);
        live++;
        live_bytes += size;
    }
}

static void f1(unsigned number, int depth, long blocks);

#define NEXT                                        \
    if (depth == 0) leaf(blocks);                   \
    else if (number & 1) f1(number >> 1, depth - 1, blocks); \
    else f0(number >> 1, depth - 1, blocks);        \
    __asm__ volatile("");

__attribute__((noinline)) static void f0(unsigned number, int depth, long blocks) { NEXT }
__attribute__((noinline)) static void f1(unsigned number, int depth, long blocks) { NEXT }

int main(void) {
    static char in[256], out[4096];
    unsigned stacks;
    long blocks;
    setvbuf(stdin, NULL, _IONBF, 0);
    setvbuf(stdout, out, _IOLBF, sizeof out);
    printf("ready\n");
    while (fgets(in, sizeof in, stdin)) {
        if (sscanf(in, "fill %u %ld", &stacks, &blocks) != 2) return 2;
        uint64_t start = now();
        for (unsigned i = 0; i < stacks; i++) f0(i, 16, blocks);
        printf("ns=%llu live=%llu live_bytes=%llu\n", (unsigned long long)(now() - start),
               (unsigned long long)live, (unsigned long long)live_bytes);
    }
    _exit(0);
}
