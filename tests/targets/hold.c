/* hold COUNT SIZE: allocates COUNT blocks of SIZE bytes in hold_here and keeps
 * them; with another go it allocates as many again. Ends with the input. */
#include "target.h"

KEEP void hold_here(size_t size)
{
        void *block = malloc(size);
        ESCAPE(block);
        check(block != NULL, "malloc");
}

int main(int argc, char **argv)
{
        unsigned long count = number(argc, argv, 1, 100);
        unsigned long size = number(argc, argv, 2, 1000);
        char byte = 0;
        say("ready\n");
        while (read(0, &byte, 1) == 1) {
                if (byte != '\n')
                        continue;
                for (unsigned long i = 0; i < count; i++)
                        hold_here(size);
                say("done\n");
        }
        return 0;
}
