/* sites NULLS PAIRS: frees NULL, and allocates and frees in a tight loop, and
 * calls each other function a few times. */
#include "target.h"
#include <malloc.h>

KEEP void free_null(void)
{
        free(OPAQUE((void *)NULL));
}

KEEP void pair(void)
{
        void *block = malloc(OPAQUE((size_t)48));
        ESCAPE(block);
        free(block);
}

KEEP void zeroed(void)
{
        void *block = calloc(OPAQUE((size_t)3), OPAQUE((size_t)100));
        ESCAPE(block);
        free(block);
}

KEEP void grown(void)
{
        void *block = realloc(OPAQUE((void *)NULL), OPAQUE((size_t)100));
        ESCAPE(block);
        block = realloc(block, OPAQUE((size_t)50000));
        ESCAPE(block);
        free(block);
}

KEEP void aligned(void)
{
        void *block = NULL;
        check(posix_memalign(&block, OPAQUE((size_t)64), OPAQUE((size_t)500)) == 0,
              "posix_memalign");
        ESCAPE(block);
        free(block);
        block = aligned_alloc(OPAQUE((size_t)64), OPAQUE((size_t)640));
        ESCAPE(block);
        free(block);
}

KEEP void kept(void)
{
        void *block = malloc(OPAQUE((size_t)1000));
        ESCAPE(block);
}

int main(int argc, char **argv)
{
        unsigned long nulls = number(argc, argv, 1, 1000);
        unsigned long pairs = number(argc, argv, 2, 1000);
        wait_for_go();
        for (unsigned long i = 0; i < nulls; i++)
                free_null();
        for (unsigned long i = 0; i < pairs; i++)
                pair();
        for (int i = 0; i < 50; i++) {
                zeroed();
                grown();
                aligned();
        }
        for (int i = 0; i < 7; i++)
                kept();
        wait_for_end();
        return 0;
}
