/* linked LIBRARY: with each go, has the library's plugin_call call allocate, which
 * keeps a block. Ends with the input. */
#include <dlfcn.h>
#include "target.h"

typedef void plugin(void (*call)(void));

KEEP static void allocate(void)
{
        void *block = malloc(1000);
        ESCAPE(block);
        check(block != NULL, "malloc");
}

int main(int argc, char **argv)
{
        char byte = 0;
        check(argc == 2, "an argument");
        void *library = dlopen(argv[1], RTLD_NOW);
        check(library != NULL, "dlopen");
        plugin *call = (plugin *)dlsym(library, "plugin_call");
        check(call != NULL, "dlsym");
        say("ready\n");
        while (read(0, &byte, 1) == 1) {
                if (byte != '\n')
                        continue;
                call(allocate);
                say("done\n");
        }
        return 0;
}
