/* successors: threads that come and go, each on a stack of its own that no other ever has, and so
 * with a thread pointer of its own. Each line that it reads is how many come, one after the other;
 * "done" when they are gone. Each makes PAIRS blocks of 48 bytes, and frees them. One thread stays
 * from the first line on, begun when half of those have been; it makes as many of 56 bytes each
 * time. Ends with its input. */
#include <pthread.h>
#include <stdint.h>
#include <sys/mman.h>

#include "target.h"

#define PAIRS 5
#define STACK_BYTES (64UL << 10)

KEEP void *in_successor(void)
{
        void *block = malloc(48);
        ESCAPE(block);
        return block;
}

KEEP void *in_resident(void)
{
        void *block = malloc(56);
        ESCAPE(block);
        return block;
}

static void *succeed(void *unused)
{
        for (int i = 0; i < PAIRS; i++)
                free(in_successor());
        return unused;
}

static pthread_barrier_t turn;

static void *reside(void *unused)
{
        for (;;) {
                pthread_barrier_wait(&turn);
                for (int i = 0; i < PAIRS; i++)
                        free(in_resident());
                pthread_barrier_wait(&turn);
        }
        return unused;
}

static void come_and_go(void)
{
        void *stack = mmap(NULL, STACK_BYTES, PROT_READ | PROT_WRITE,
                           MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        check(stack != MAP_FAILED, "mmap");
        pthread_attr_t how;
        pthread_t thread;
        pthread_attr_init(&how);
        check(pthread_attr_setstack(&how, stack, STACK_BYTES) == 0, "a stack");
        check(pthread_create(&thread, &how, succeed, NULL) == 0, "pthread_create");
        check(pthread_join(thread, NULL) == 0, "pthread_join");
        pthread_attr_destroy(&how);
}

/* The number in the next line; 0 at the end. */
static unsigned long read_number(void)
{
        unsigned long number = 0;
        char byte;
        while (read(0, &byte, 1) == 1 && byte != '\n')
                number = 10 * number + (unsigned long)(byte - '0');
        return number;
}

int main(void)
{
        pthread_t resident;
        int resides = 0;
        unsigned long threads;
        say("ready\n");
        while ((threads = read_number()) > 0) {
                for (unsigned long i = 0; i < threads; i++) {
                        if (!resides && i == threads / 2) {
                                pthread_barrier_init(&turn, NULL, 2);
                                check(pthread_create(&resident, NULL, reside, NULL) == 0,
                                      "pthread_create");
                                resides = 1;
                        }
                        come_and_go();
                }
                if (resides) {
                        pthread_barrier_wait(&turn);
                        pthread_barrier_wait(&turn);
                }
                say("done\n");
        }
        return 0;
}
