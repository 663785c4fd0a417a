/* early: allocates in a constructor. Built with -DPRELOAD, a library to be preloaded, whose
 * constructor runs earlier, allocates, and loads $EARLY: so the loader allocates, too. */
#include <dlfcn.h>

#include "target.h"

KEEP void early(void)
{
        void *block = malloc(4242);
        ESCAPE(block);
}

#ifdef PRELOAD

KEEP void loads(void)
{
        void *library = dlopen(getenv("EARLY"), RTLD_NOW);
        check(library != NULL, "a library");
        ESCAPE(library);
}

__attribute__((constructor)) static void in_library(void)
{
        early();
        loads();
        __asm__ volatile("");
}

#else

__attribute__((constructor)) static void in_program(void)
{
        early();
        __asm__ volatile("");
}

int main(void)
{
        return 0;
}

#endif
