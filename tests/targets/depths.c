/* depths COUNT: allocates below 0 to COUNT - 1 calls of go_down, once each. */
#include "target.h"

KEEP void at_the_bottom(void)
{
        void *block = malloc(32);
        ESCAPE(block);
}

KEEP void go_down(unsigned long calls)
{
        if (calls > 0)
                go_down(calls - 1);
        else
                at_the_bottom();
        ESCAPE(calls);
}

int main(int argc, char **argv)
{
        unsigned long count = number(argc, argv, 1, 10);
        wait_for_go();
        for (unsigned long calls = 0; calls < count; calls++)
                go_down(calls);
        wait_for_end();
        return 0;
}
