/* Calls of many shapes: rbp used for data, large frames, alloca, tail calls, recursion. */
#include <alloca.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define KEEP __attribute__((noinline, noclone))

static void *volatile sink;

KEEP static void leaf(size_t size) {
    void *block = malloc(size);
    sink = block;
    free(block);
}

KEEP static long busy(long a, long b, long c, long d, long e, long f, int depth) {
    long g = a * b, h = c * d, i = e * f, j = a ^ d;
    leaf(32 + depth);
    if (depth > 0)
        g += busy(b, c, d, e, f, g, depth - 1);
    return a + b + c + d + e + f + g + h + i + j;
}

/* Twice this fits what is copied of a stack, if it was touched. */
KEEP static int large(int depth) {
    volatile char room[25 * 1024];
    for (size_t at = 0; at < sizeof room; at += 1024)
        room[at] = (char)depth;
    leaf(64);
    return room[0] + (depth > 0 ? large(depth - 1) : 0);
}

KEEP static int variable(int bytes) {
    char *room = alloca(bytes);
    memset(room, bytes, bytes);
    leaf(room[bytes / 2] & 0x7f);
    return bytes > 16 ? variable(bytes - 16) + room[0] : 0;
}

KEEP static void tail(int depth) {
    if (depth == 0) {
        leaf(16);
        return;
    }
    tail(depth - 1);
}

KEEP __attribute__((force_align_arg_pointer)) static int realigned(int depth) {
    _Alignas(64) volatile char room[256];
    room[depth & 255] = 1;
    leaf(48);
    return room[1] + (depth > 0 ? realigned(depth - 1) : 0);
}

static int compare(const void *a, const void *b) {
    leaf(8);
    return *(const int *)a - *(const int *)b;
}

int main(void) {
    int numbers[64];
    for (int round = 0; round < 60; round++) {
        busy(1, 2, 3, 4, 5, round, 30);
        large(1);
        variable(400);
        tail(5);
        realigned(8);
        for (int i = 0; i < 64; i++)
            numbers[i] = (i * 37 + round) % 64;
        qsort(numbers, 64, sizeof *numbers, compare);
    }
    return 0;
}
