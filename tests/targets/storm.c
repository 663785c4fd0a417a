/* Threads that allocate, free, resize, fork, make threads and get signals, and check every
   block they hold, until a line comes on standard input. Argument: number of threads.
   Prints how many calls were made; fails at the first block that is not as it was. */
#define _GNU_SOURCE
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

enum { HELD = 64 };

static atomic_int is_over;
static atomic_ulong calls, forks, handled;

static void fail(const char *what) {
    fprintf(stderr, "storm: %s\n", what);
    _exit(9);
}

static uint64_t next(uint64_t *state) {
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    return *state;
}

struct block {
    unsigned char *bytes;
    size_t size;
    unsigned char mark;
};

static void check(const struct block *block, size_t size) {
    for (size_t i = 0; i < size; i++)
        if (block->bytes[i] != block->mark)
            fail("a block has changed");
}

static void step(struct block *held, uint64_t *state) {
    struct block *block = &held[next(state) % HELD];
    size_t size = 1 + next(state) % (next(state) % 50 == 0 ? 200000 : 600);
    if (block->bytes != NULL && next(state) % 4 == 0) {
        size_t kept = size < block->size ? size : block->size;
        block->bytes = realloc(block->bytes, size);
        if (block->bytes == NULL)
            fail("no memory");
        check(block, kept);
        memset(block->bytes, block->mark, size);
        block->size = size;
    } else if (block->bytes != NULL) {
        check(block, block->size);
        free(block->bytes);
        block->bytes = NULL;
    } else {
        void *bytes = NULL;
        switch (next(state) % 4) {
        case 0:
            bytes = calloc(1, size);
            for (size_t i = 0; bytes != NULL && i < size; i++)
                if (((unsigned char *)bytes)[i] != 0)
                    fail("calloc gave a block that is not zero");
            break;
        case 1:
            if (posix_memalign(&bytes, 64, size) != 0 || (uintptr_t)bytes % 64 != 0)
                fail("posix_memalign failed");
            break;
        default:
            bytes = malloc(size);
        }
        if (bytes == NULL)
            fail("no memory");
        block->bytes = bytes;
        block->size = size;
        block->mark = (unsigned char)next(state);
        memset(bytes, block->mark, size);
    }
    atomic_fetch_add_explicit(&calls, 1, memory_order_relaxed);
}

static void drop_all(struct block *held) {
    for (int i = 0; i < HELD; i++)
        if (held[i].bytes != NULL) {
            check(&held[i], held[i].size);
            free(held[i].bytes);
        }
}

static void *brief(void *argument) {
    struct block held[HELD] = {{0}};
    uint64_t state = (uintptr_t)argument | 1;
    for (int i = 0; i < 200; i++)
        step(held, &state);
    drop_all(held);
    return NULL;
}

static void fork_one(struct block *held, uint64_t *state) {
    pid_t child = fork();
    if (child == 0) {
        for (int i = 0; i < 200; i++)
            step(held, state);
        drop_all(held);
        _exit(0);
    }
    int status = -1;
    if (child < 0 || waitpid(child, &status, 0) != child || status != 0)
        fail("a child has failed");
    atomic_fetch_add(&forks, 1);
}

static void *work(void *argument) {
    uintptr_t number = (uintptr_t)argument;
    struct block held[HELD] = {{0}};
    uint64_t state = 0x9e3779b97f4a7c15 * (number + 1);
    for (unsigned long round = 0; !atomic_load_explicit(&is_over, memory_order_relaxed); round++) {
        step(held, &state);
        if (number == 0 && round % 20000 == 0)
            fork_one(held, &state);
        if (number == 1 && round % 20000 == 0) {
            pthread_t thread;
            if (pthread_create(&thread, NULL, brief, (void *)(state | 1)) != 0)
                fail("no thread");
            pthread_join(thread, NULL);
        }
        if (number == 2 && round % 500 == 0)
            raise(SIGUSR1);
    }
    drop_all(held);
    return NULL;
}

static void on_signal(int number) {
    (void)number;
    atomic_fetch_add(&handled, 1);
}

int main(int count, char **arguments) {
    setvbuf(stdout, NULL, _IOLBF, 0);
    int threads = count > 1 ? atoi(arguments[1]) : 8;
    if (threads < 1 || threads > 64)
        fail("usage: storm THREADS");
    struct sigaction action = {.sa_handler = on_signal, .sa_flags = SA_RESTART};
    sigaction(SIGUSR1, &action, NULL);
    pthread_t all[64];
    for (int i = 0; i < threads; i++)
        if (pthread_create(&all[i], NULL, work, (void *)(uintptr_t)i) != 0)
            fail("no thread");
    puts("ready");
    char line[16];
    if (fgets(line, sizeof line, stdin) == NULL)
        line[0] = 0;
    atomic_store(&is_over, 1);
    for (int i = 0; i < threads; i++)
        pthread_join(all[i], NULL);
    printf("calls %lu forks %lu signals %lu\n", atomic_load(&calls), atomic_load(&forks),
           atomic_load(&handled));
    return 0;
}
