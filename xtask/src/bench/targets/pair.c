/* malloc+free pairs, or malloc alone, as many as a line on stdin asks for:
 *
 *   pair THREADS COUNT      COUNT pairs on each of THREADS threads
 *   malloc THREADS COUNT    COUNT mallocs a thread; their frees are not timed
 *
 * Answers `ns=N allocs=N bytes=N`: the time from the start of the first thread
 * to the end of the last, and all allocations since the program began. Threads
 * are made once, so that every measurement meets the C library in one state.
 * Usage: pair MAX_THREADS MAX_COUNT, the second for `malloc`. */
#include <malloc.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

struct worker {
    uint64_t start, end, allocs, bytes, state;
    void **blocks;
    char apart[128]; /* no cache line shared with the next one */
};

static struct worker *workers;
static pthread_barrier_t begin, finish;
static long threads, count;
static int only_malloc;

static uint64_t now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000 + (uint64_t)t.tv_nsec;
}

/* 16, 32 ... 256, in no order. */
static inline size_t next_size(uint64_t *state) {
    *state = *state * 6364136223846793005u + 1442695040888963407u;
    return 16 + (*state >> 60) * 16;
}

static void work(struct worker *me) {
    uint64_t bytes = 0, state = me->state;
    me->start = now();
    if (only_malloc) {
        for (long i = 0; i < count; i++) {
            size_t size = next_size(&state);
            bytes += size;
            me->blocks[i] = malloc(size);
        }
    } else {
        for (long i = 0; i < count; i++) {
            size_t size = next_size(&state);
            bytes += size;
            void *volatile block = malloc(size);
            free(block);
        }
    }
    me->end = now();
    me->state = state;
    me->bytes += bytes;
    me->allocs += (uint64_t)count;
    if (only_malloc)
        for (long i = 0; i < count; i++) free(me->blocks[i]);
}

static void *serve(void *argument) {
    long index = (long)argument;
    for (;;) {
        pthread_barrier_wait(&begin);
        if (index < threads) work(&workers[index]);
        pthread_barrier_wait(&finish);
    }
    return NULL;
}

int main(int argc, char **argv) {
    if (argc != 3) return 2;
    long most = atol(argv[1]), most_count = atol(argv[2]);
    static char in[256], out[4096];
    /* Freed memory stays: page faults cost as much as the tools we compare. */
    mallopt(M_TRIM_THRESHOLD, 1 << 30);
    mallopt(M_TOP_PAD, 1 << 26);
    setvbuf(stdin, NULL, _IONBF, 0);
    setvbuf(stdout, out, _IOLBF, sizeof out);
    workers = calloc((size_t)most, sizeof *workers);
    pthread_barrier_init(&begin, NULL, (unsigned)most + 1);
    pthread_barrier_init(&finish, NULL, (unsigned)most + 1);
    for (long i = 0; i < most; i++) {
        workers[i].state = (uint64_t)i + 1;
        workers[i].blocks = malloc((size_t)most_count * sizeof(void *));
        memset(workers[i].blocks, 0, (size_t)most_count * sizeof(void *));
        pthread_t thread;
        if (pthread_create(&thread, NULL, serve, (void *)i)) return 1;
    }
    printf("ready\n");
    while (fgets(in, sizeof in, stdin)) {
        char what[16];
        if (sscanf(in, "%15s %ld %ld", what, &threads, &count) != 3) return 2;
        only_malloc = !strcmp(what, "malloc");
        if (threads > most || (only_malloc && count > most_count)) return 2;
        pthread_barrier_wait(&begin);
        pthread_barrier_wait(&finish);
        uint64_t start = UINT64_MAX, end = 0, allocs = 0, bytes = 0;
        for (long i = 0; i < most; i++) {
            if (i < threads && workers[i].start < start) start = workers[i].start;
            if (i < threads && workers[i].end > end) end = workers[i].end;
            allocs += workers[i].allocs;
            bytes += workers[i].bytes;
        }
        printf("ns=%llu allocs=%llu bytes=%llu\n", (unsigned long long)(end - start),
               (unsigned long long)allocs, (unsigned long long)bytes);
    }
    _exit(0);
}
