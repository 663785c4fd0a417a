/* forest DEPTH ROUNDS: allocates at the leaves of a binary recursion, 2^DEPTH different stacks,
 * ROUNDS times, and keeps every block; frees all of them after another go. */
#include "target.h"

static void **last;

KEEP void at_the_leaf(void)
{
        void **block = malloc(32);
        check(block != NULL, "malloc");
        *block = last;
        last = block;
}

KEEP void go_left(unsigned long depth);
KEEP void go_right(unsigned long depth);

static inline __attribute__((always_inline)) void descend(unsigned long depth)
{
        if (depth == 0) {
                at_the_leaf();
        } else {
                go_left(depth - 1);
                go_right(depth - 1);
        }
        ESCAPE(depth);
}

KEEP void go_left(unsigned long depth) { descend(depth); }
KEEP void go_right(unsigned long depth) { descend(depth); }

int main(int argc, char **argv)
{
        unsigned long depth = number(argc, argv, 1, 4);
        unsigned long rounds = number(argc, argv, 2, 1);
        wait_for_go();
        for (unsigned long i = 0; i < rounds; i++)
                go_left(depth);
        say("done\n");
        wait_line();
        while (last != NULL) {
                void **block = last;
                last = *block;
                free(block);
        }
        say("freed\n");
        wait_line();
        return 0;
}
