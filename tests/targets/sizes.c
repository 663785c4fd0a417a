/* Many allocations of one size from each of several functions. Every second
 * block is freed again. */
#include "target.h"

#define SIZE(bytes)                                                            \
        KEEP void size_##bytes(int freed)                                      \
        {                                                                      \
                void *block = malloc(bytes);                                   \
                ESCAPE(block);                                                 \
                if (freed)                                                     \
                        free(block);                                           \
        }

SIZE(16)
SIZE(200)
SIZE(3000)
SIZE(20000)
SIZE(300000)

static void many(void (*allocate)(int), int count)
{
        for (int i = 0; i < count; i++)
                allocate(i % 2);
}

int main(void)
{
        wait_for_go();
        many(size_16, 60000);
        many(size_200, 30000);
        many(size_3000, 6000);
        many(size_20000, 1000);
        many(size_300000, 100);
        wait_for_end();
        return 0;
}
