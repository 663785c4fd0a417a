/* Loads libraries one after the other, and allocates through each. First argument: how
 * many milliseconds to wait before that; second: `same` if each has to be where the first
 * was, `other` if none may; then the libraries. The block's size is the number of the
 * library's name in the arguments times 1000. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <link.h>
#include <sys/mman.h>

#include "target.h"

static size_t size_bytes;

KEEP void leaf(void)
{
        void *block = malloc(size_bytes);
        ESCAPE(block);
        free(block);
        __asm__ volatile("");
}

KEEP static void run(void *library)
{
        void (*call)(void (*)(void));
        *(void **)&call = dlsym(library, "plugin_call");
        for (int n = 0; n < 10; n++)
                call(leaf);
        __asm__ volatile("");
}

int main(int argc, char **argv)
{
        unsigned long wait_ms = number(argc, argv, 1, 0);
        int same = argc > 2 && strcmp(argv[2], "same") == 0;
        ElfW(Addr) first = 0;
        for (int n = 3; n < argc; n++) {
                void *library = dlopen(argv[n], RTLD_NOW);
                check(library != NULL, "dlopen");
                struct link_map *map;
                check(dlinfo(library, RTLD_DI_LINKMAP, &map) == 0, "dlinfo");
                if (n == 3)
                        first = map->l_addr;
                else
                        check((map->l_addr == first) == same, "the library's place");
                usleep((useconds_t)wait_ms * 1000);
                int name = 3;
                while (strcmp(argv[name], argv[n]) != 0)
                        name++;
                size_bytes = (size_t)(name - 2) * 1000;
                run(library);
                ElfW(Addr) place = map->l_addr;
                check(dlclose(library) == 0, "dlclose");
                if (!same)
                        check(mmap((void *)place, 4096, PROT_NONE,
                                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE,
                                   -1, 0) != MAP_FAILED,
                              "holding the place");
        }
        return 0;
}
