/* Threads that allocate and free without a pause, each with a look at whether its blocks are as
   it has left them. The argument says how many. Prints "ready", goes on until it reads a line,
   and fails if a block was not. */
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static atomic_int over, wrong;

static void *work(void *argument) {
    enum { BLOCKS = 8 };
    unsigned char *blocks[BLOCKS] = {NULL}, mark = (unsigned char)(size_t)argument;
    for (size_t turn = 0; !atomic_load_explicit(&over, memory_order_relaxed); turn++) {
        size_t place = turn % BLOCKS, size = 16 + 8 * (turn % 61);
        unsigned char *block = blocks[place];
        if (block != NULL && (block[0] != mark || block[15] != mark))
            atomic_store(&wrong, 1);
        free(block);
        block = turn % 3 ? malloc(size) : calloc(1, size);
        if (block == NULL || (turn % 3 == 0 && block[size - 1] != 0))
            atomic_store(&wrong, 1);
        else
            memset(block, mark, 16);
        blocks[place] = block;
    }
    for (size_t place = 0; place < BLOCKS; place++)
        free(blocks[place]);
    return NULL;
}

int main(int count, char **arguments) {
    enum { MOST = 512 };
    static pthread_t all[MOST];
    int threads = count > 1 ? atoi(arguments[1]) : 0;
    if (threads < 1 || threads > MOST)
        return 2;
    for (int i = 0; i < threads; i++)
        if (pthread_create(&all[i], NULL, work, (void *)(size_t)i) != 0)
            return 3;
    puts("ready");
    fflush(stdout);
    char line[16];
    if (fgets(line, sizeof line, stdin) == NULL)
        return 4;
    atomic_store(&over, 1);
    for (int i = 0; i < threads; i++)
        pthread_join(all[i], NULL);
    return atomic_load(&wrong);
}
