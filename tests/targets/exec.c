/* exec PROGRAM ARGS...: allocates, and becomes PROGRAM at a go. */
#include "target.h"

KEEP void before_exec(void)
{
        void *block = malloc(111);
        ESCAPE(block);
}

int main(int argc, char **argv)
{
        check(argc > 1, "a program");
        wait_for_go();
        for (int i = 0; i < 5; i++)
                before_exec();
        execv(argv[1], argv + 1);
        return 92;
}
