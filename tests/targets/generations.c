/* generations COUNT SIZE: with the first go allocates COUNT blocks of SIZE bytes
 * in old_here, with the second as many in new_here, with the third frees the old
 * ones. Ends with the input. */
#include "target.h"

static void *blocks[10000];

KEEP void *old_here(size_t size)
{
        void *block = malloc(size);
        ESCAPE(block);
        return block;
}

KEEP void new_here(size_t size)
{
        void *block = malloc(size);
        ESCAPE(block);
}

int main(int argc, char **argv)
{
        unsigned long count = number(argc, argv, 1, 100);
        unsigned long size = number(argc, argv, 2, 1000);
        check(count <= sizeof blocks / sizeof *blocks, "too many blocks");
        wait_for_go();
        for (unsigned long i = 0; i < count; i++)
                blocks[i] = old_here(size);
        wait_for_end();
        for (unsigned long i = 0; i < count; i++)
                new_here(size);
        wait_for_end();
        for (unsigned long i = 0; i < count; i++)
                free(blocks[i]);
        wait_for_end();
        return 0;
}
