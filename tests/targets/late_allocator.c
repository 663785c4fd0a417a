/* Loads a library at a go, the first argument, and at the next allocates by its `malloc`:
   20 blocks of 555 bytes, of which 15 are freed. */
#include <dlfcn.h>

#include "target.h"

static void *(*late_malloc)(size_t);
static void (*late_free)(void *);

KEEP void *from_late(void)
{
        void *block = late_malloc(555);
        ESCAPE(block);
        return block;
}

int main(int argc, char **argv)
{
        char line[16];
        setvbuf(stdout, NULL, _IONBF, 0);
        puts("ready");
        check(fgets(line, sizeof line, stdin) != NULL, "a go");
        void *library = dlopen(argc > 1 ? argv[1] : "", RTLD_NOW | RTLD_LOCAL);
        check(library != NULL, "dlopen");
        *(void **)&late_malloc = dlsym(library, "malloc");
        *(void **)&late_free = dlsym(library, "free");
        puts("loaded");
        check(fgets(line, sizeof line, stdin) != NULL, "a go");
        for (int i = 0; i < 20; i++) {
                void *block = from_late();
                check(block != NULL, "a block");
                if (i % 4 != 0)
                        late_free(block);
        }
        puts("done");
        while (fgets(line, sizeof line, stdin) != NULL)
                ;
        return 0;
}
