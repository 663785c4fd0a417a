/* exec_thread PROGRAM ARGS...: allocates, and a second thread becomes PROGRAM at
 * a go. */
#include <pthread.h>

#include "target.h"

static char **program;

KEEP void before_exec(void)
{
        void *block = malloc(111);
        ESCAPE(block);
}

static void *become(void *nothing)
{
        for (int i = 0; i < 5; i++)
                before_exec();
        execv(program[0], program);
        exit(92);
        return nothing;
}

int main(int argc, char **argv)
{
        pthread_t thread;

        check(argc > 1, "a program");
        program = argv + 1;
        wait_for_go();
        check(!pthread_create(&thread, NULL, become, NULL), "a thread");
        pthread_join(thread, NULL);
        return 93;
}
