/* threads PAIRS LEAKS: four threads, each PAIRS pairs of malloc and free of
 * mixed sizes, and LEAKS blocks that stay. Prints what it holds at the end. */
#include "threads.h"

static unsigned long pairs, leaks;
static unsigned long held_count[THREADS], held_bytes[THREADS];

KEEP void pair(size_t size)
{
        void *block = malloc(size);
        ESCAPE(block);
        free(block);
}

KEEP void leak(size_t size)
{
        void *block = malloc(size);
        ESCAPE(block);
}

static void *body(void *argument)
{
        unsigned long me = (unsigned long)argument;
        unsigned long random = me + 1;
        unsigned long every = leaks ? pairs / leaks : 0;
        unsigned long count = 0, bytes = 0;
        pthread_barrier_wait(&gate);
        for (unsigned long i = 0; i < pairs; i++) {
                pair(1 + next_random(&random) % 2000);
                if (count < leaks && i % every == 0) {
                        size_t size = 1 + next_random(&random) % 500;
                        leak(size);
                        count++;
                        bytes += size;
                }
        }
        held_count[me] = count;
        held_bytes[me] = bytes;
        return NULL;
}

int main(int argc, char **argv)
{
        pthread_t threads[THREADS];
        unsigned long count = 0, bytes = 0;
        pairs = number(argc, argv, 1, 1000);
        leaks = number(argc, argv, 2, 10);
        threads_start(threads, body);
        wait_for_go();
        threads_run(threads);
        for (int i = 0; i < THREADS; i++) {
                count += held_count[i];
                bytes += held_bytes[i];
        }
        say_value("pairs", pairs * THREADS);
        say_value("inuse_objects", count);
        say_value("inuse_bytes", bytes);
        wait_for_end();
        return 0;
}
