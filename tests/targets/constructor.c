/* Allocates before main. */
#include "target.h"

__attribute__((constructor)) KEEP void before_main(void)
{
        for (int i = 0; i < 3; i++) {
                void *block = malloc(4242);
                ESCAPE(block);
        }
}

int main(void)
{
        wait_for_go();
        wait_for_end();
        return 0;
}
