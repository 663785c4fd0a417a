/* realloc_race ROUNDS: four threads take blocks out of shared slots, resize
 * them, free them, fail to resize them, and put them into other slots. The first
 * word of a block is its size. Prints what is left. */
#include <stdint.h>

#include "threads.h"

#define SLOTS 64

static void *slots[SLOTS];
static unsigned long rounds;

static void *take(unsigned slot)
{
        return __atomic_exchange_n(&slots[slot], NULL, __ATOMIC_SEQ_CST);
}

KEEP void discard(void *block)
{
        free(block);
        ESCAPE(block);
}

static void put(unsigned slot, void *block)
{
        discard(__atomic_exchange_n(&slots[slot], block, __ATOMIC_SEQ_CST));
}

KEEP void *resize(void *block, size_t size)
{
        void *other = realloc(block, size);
        ESCAPE(other);
        if (other == NULL) {
                check(size == PTRDIFF_MAX, "realloc");
                return block;
        }
        *(size_t *)other = size;
        return other;
}

static void *body(void *argument)
{
        unsigned long random = (unsigned long)argument + 100;
        pthread_barrier_wait(&gate);
        for (unsigned long i = 0; i < rounds; i++) {
                unsigned draw = next_random(&random);
                size_t size = 16 + next_random(&random) % 3000;
                void *block = take(draw % SLOTS);
                if (draw % 64 == 63 && block != NULL)
                        block = resize(block, PTRDIFF_MAX);
                else if (draw % 5 == 0)
                        discard(block), block = NULL;
                else
                        block = resize(block, size);
                put(next_random(&random) % SLOTS, block);
        }
        return NULL;
}

int main(int argc, char **argv)
{
        pthread_t threads[THREADS];
        unsigned long count = 0, bytes = 0;
        rounds = number(argc, argv, 1, 1000);
        threads_start(threads, body);
        wait_for_go();
        threads_run(threads);
        for (int i = 0; i < SLOTS; i++) {
                if (slots[i] != NULL) {
                        count++;
                        bytes += *(size_t *)slots[i];
                }
        }
        say_value("inuse_objects", count);
        say_value("inuse_bytes", bytes);
        wait_for_end();
        return 0;
}
