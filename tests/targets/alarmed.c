/* alarmed TURNS: main allocates and frees that often, and a handler of SIGALRM, which comes all the
 * time, too. The allocator is the program's own, and may be interrupted anywhere. Prints how often
 * the handler has run. */
#include <signal.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/time.h>

#include "target.h"

#define SLOTS (1UL << 13)

static _Alignas(64) char room[SLOTS][2048];
static unsigned long next;

/* Blocks that were handed out long ago are free by then. Nothing here calls the C library, which
 * calls it before it is set up. */
KEEP void *malloc(size_t size)
{
        unsigned long slot = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED);
        return size <= sizeof room[0] ? room[slot % SLOTS] : NULL;
}

static volatile unsigned long given_up;

KEEP void free(void *block)
{
        given_up = given_up + (block != NULL);
        given_up = given_up + (block > (void *)room);
}

KEEP void *calloc(size_t count, size_t size)
{
        volatile char *block = size == 0 || count <= sizeof room[0] / size ? malloc(count * size) : NULL;
        for (size_t i = 0; block != NULL && i < count * size; i++)
                block[i] = 0;
        return (void *)block;
}

KEEP void *realloc(void *old, size_t size)
{
        volatile char *block = malloc(size), *from = old;
        for (size_t i = 0; block != NULL && from != NULL && i < size; i++)
                block[i] = from[i];
        if (block != NULL && old != NULL)
                free(old);
        return (void *)block;
}

KEEP void *in_main(void)
{
        void *block = malloc(32);
        ESCAPE(block);
        return block;
}

KEEP void *zeroed_in_main(void)
{
        void *block = calloc(4, 8);
        ESCAPE(block);
        return block;
}

static volatile unsigned long alarms;

KEEP void *in_handler(void)
{
        void *block = malloc(16);
        ESCAPE(block);
        return block;
}

static void on_alarm(int signal)
{
        (void)signal;
        alarms++;
        free(in_handler());
}

int main(int argc, char **argv)
{
        unsigned long turns = number(argc, argv, 1, 1000);
        struct sigaction action = {.sa_handler = on_alarm};
        struct itimerval often = {{0, 100}, {0, 100}}, never = {{0, 0}, {0, 0}};
        wait_for_go();
        sigaction(SIGALRM, &action, NULL);
        setitimer(ITIMER_REAL, &often, NULL);
        for (unsigned long i = 0; i < turns; i++)
                free(i % 2 == 0 ? in_main() : zeroed_in_main());
        setitimer(ITIMER_REAL, &never, NULL);
        say_value("alarms", alarms);
        wait_for_end();
        return 0;
}
