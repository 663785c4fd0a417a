/* Threads that replace blocks as fast as they can, and know what is live.
 *
 * A line `run MILLISECONDS` on stdin makes every thread free and allocate the
 * blocks of its slots in turn for so long. Answers
 * `ns=N allocs=N frees=N live=N live_bytes=N`: calls of this run, and what it
 * holds now. All slots are empty at first. Usage: churn THREADS SLOTS. */
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>
#include <unistd.h>

struct worker {
    void **slots;
    size_t *sizes;
    uint64_t next, state, allocs, frees, live, live_bytes;
    char apart[128];
};

static struct worker *workers;
static pthread_barrier_t begin, finish;
static uint64_t until;
static long slots;

static uint64_t now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000 + (uint64_t)t.tv_nsec;
}

static void work(struct worker *me) {
    me->allocs = me->frees = 0;
    while (now() < until) {
        for (int i = 0; i < 16; i++) {
            long slot = (long)(me->next++ % (uint64_t)slots);
            if (me->slots[slot]) {
                free(me->slots[slot]);
                me->frees++;
                me->live--;
                me->live_bytes -= me->sizes[slot];
            }
            me->state = me->state * 6364136223846793005u + 1442695040888963407u;
            size_t size = 16 + (me->state >> 56);
            me->slots[slot] = malloc(size);
            me->sizes[slot] = size;
            me->allocs++;
            me->live++;
            me->live_bytes += size;
        }
    }
}

static void *serve(void *argument) {
    for (;;) {
        pthread_barrier_wait(&begin);
        work(argument);
        pthread_barrier_wait(&finish);
    }
    return NULL;
}

int main(int argc, char **argv) {
    if (argc != 3) return 2;
    long threads = atol(argv[1]), milliseconds;
    slots = atol(argv[2]);
    static char in[256], out[4096];
    setvbuf(stdin, NULL, _IONBF, 0);
    setvbuf(stdout, out, _IOLBF, sizeof out);
    workers = calloc((size_t)threads, sizeof *workers);
    pthread_barrier_init(&begin, NULL, (unsigned)threads + 1);
    pthread_barrier_init(&finish, NULL, (unsigned)threads + 1);
    for (long i = 0; i < threads; i++) {
        workers[i].state = (uint64_t)i + 1;
        workers[i].slots = calloc((size_t)slots, sizeof(void *));
        workers[i].sizes = calloc((size_t)slots, sizeof(size_t));
        pthread_t thread;
        if (pthread_create(&thread, NULL, serve, &workers[i])) return 1;
    }
    printf("ready\n");
    while (fgets(in, sizeof in, stdin)) {
        if (sscanf(in, "run %ld", &milliseconds) != 1) return 2;
        uint64_t start = now(), allocs = 0, frees = 0, live = 0, live_bytes = 0;
        until = start + (uint64_t)milliseconds * 1000000;
        pthread_barrier_wait(&begin);
        pthread_barrier_wait(&finish);
        uint64_t ns = now() - start;
        for (long i = 0; i < threads; i++) {
            allocs += workers[i].allocs;
            frees += workers[i].frees;
            live += workers[i].live;
            live_bytes += workers[i].live_bytes;
        }
        printf("ns=%llu allocs=%llu frees=%llu live=%llu live_bytes=%llu\n",
               (unsigned long long)ns, (unsigned long long)allocs, (unsigned long long)frees,
               (unsigned long long)live, (unsigned long long)live_bytes);
    }
    _exit(0);
}
