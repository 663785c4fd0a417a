/* Stacks that differ little, and one that is taken often. */
#include "target.h"

static unsigned long malloc_line, calloc_line;

KEEP void two_ways(void)
{
        void *block = malloc(64); malloc_line = __LINE__;
        ESCAPE(block);
        block = calloc(1, OPAQUE(64UL)); calloc_line = __LINE__;
        ESCAPE(block);
}

KEEP void twin_one(void) { void *block = malloc(96); ESCAPE(block); }
KEEP void twin_two(void) { void *block = malloc(96); ESCAPE(block); }

KEEP void same_path(void) { void *block = malloc(128); ESCAPE(block); }

int main(void)
{
        wait_for_go();
        for (int i = 0; i < 10; i++)
                two_ways();
        for (int i = 0; i < 20; i++) {
                twin_one();
                twin_two();
        }
        for (int i = 0; i < 1000; i++)
                same_path();
        say_value("malloc_line", malloc_line);
        say_value("calloc_line", calloc_line);
        wait_for_end();
        return 0;
}
