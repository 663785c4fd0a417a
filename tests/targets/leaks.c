/* Leaks of known sizes from known functions, and a function that leaks nothing. */
#include "target.h"

static unsigned long small_line, large_line;

KEEP void leak_small(void)
{
        void *block = malloc(24); small_line = __LINE__;
        ESCAPE(block);
}

KEEP void leak_large(void)
{
        void *block = malloc(1048581); large_line = __LINE__;
        ESCAPE(block);
}

KEEP void churn(void)
{
        void *block = malloc(64);
        ESCAPE(block);
        free(block);
}

KEEP void middle(void)
{
        for (int i = 0; i < 100; i++)
                leak_small();
        /* A count that the compiler does not know: it must not make three call
         * sites, and so three stacks, of one. */
        for (volatile int i = 0; i < 3; i++)
                leak_large();
        for (int i = 0; i < 1000; i++)
                churn();
}

KEEP void outer(void)
{
        middle();
        ESCAPE(0);
}

int main(void)
{
        wait_for_go();
        outer();
        say_value("small_line", small_line);
        say_value("large_line", large_line);
        wait_for_end();
        return 0;
}
