/* Loads a library, the first argument, and allocates through it at once: a block each
 * millisecond, as many as the second argument says. */
#include <dlfcn.h>

#include "target.h"

KEEP void leaf(void)
{
        void *block = malloc(777);
        ESCAPE(block);
        free(block);
        __asm__ volatile("");
}

int main(int argc, char **argv)
{
        wait_for_go();
        void *library = dlopen(argc > 1 ? argv[1] : "", RTLD_NOW);
        check(library != NULL, "dlopen");
        void (*call)(void (*)(void));
        *(void **)&call = dlsym(library, "plugin_call");
        for (unsigned long n = number(argc, argv, 2, 1000); n > 0; n--) {
                call(leaf);
                usleep(1000);
        }
        wait_for_end();
        return 0;
}
