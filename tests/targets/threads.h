/* Threads that exist before the handshake ends, so that what the C library
 * allocates for them is not traced. */
#pragma once

#include <pthread.h>

#include "target.h"

#define THREADS 4

static pthread_barrier_t gate;

static inline void threads_start(pthread_t *threads, void *(*body)(void *))
{
        pthread_barrier_init(&gate, NULL, THREADS + 1);
        for (unsigned long i = 0; i < THREADS; i++)
                check(pthread_create(&threads[i], NULL, body, (void *)i) == 0,
                      "pthread_create");
}

static inline void threads_run(pthread_t *threads)
{
        pthread_barrier_wait(&gate);
        for (int i = 0; i < THREADS; i++)
                check(pthread_join(threads[i], NULL) == 0, "pthread_join");
}

static inline unsigned next_random(unsigned long *state)
{
        *state = *state * 6364136223846793005UL + 1442695040888963407UL;
        return (unsigned)(*state >> 33);
}
