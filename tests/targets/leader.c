/* leader COUNT SIZE: its first thread ends, and another goes on: it allocates COUNT
 * blocks of SIZE bytes. */
#include <pthread.h>

#include "target.h"

static unsigned long count, size;
static pthread_t leader;

KEEP void survivor(void)
{
        void *block = malloc(size);
        ESCAPE(block);
}

static void *body(void *argument)
{
        (void)argument;
        pthread_join(leader, NULL);
        for (unsigned long i = 0; i < count; i++)
                survivor();
        wait_for_end();
        exit(0);
}

int main(int argc, char **argv)
{
        pthread_t thread;
        count = number(argc, argv, 1, 10);
        size = number(argc, argv, 2, 100);
        leader = pthread_self();
        wait_for_go();
        check(pthread_create(&thread, NULL, body, NULL) == 0, "thread");
        pthread_exit(NULL);
}
