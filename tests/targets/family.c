/* Every function of the family, each from a function of its own, with a size
 * and a count of its own. Each keeps the first KEPT of its blocks. */
#define _GNU_SOURCE
#include <malloc.h>

#include "target.h"

static void *taken;

KEEP void from_malloc(void) { taken = malloc(OPAQUE(1001UL)); ESCAPE(taken); }
KEEP void from_calloc(void) { taken = calloc(OPAQUE(13UL), 77); ESCAPE(taken); }
KEEP void from_realloc_null(void) { taken = realloc(OPAQUE((void *)0), 1003); ESCAPE(taken); }
KEEP void from_reallocarray_null(void) { taken = reallocarray(OPAQUE((void *)0), 17, 59); ESCAPE(taken); }
KEEP void from_posix_memalign(void) { check(posix_memalign(&taken, 64, 1005) == 0, "posix_memalign"); ESCAPE(taken); }
KEEP void from_aligned_alloc(void) { taken = aligned_alloc(64, OPAQUE(1024UL)); ESCAPE(taken); }
KEEP void from_memalign(void) { taken = memalign(128, OPAQUE(1007UL)); ESCAPE(taken); }
KEEP void from_valloc(void) { taken = valloc(OPAQUE(1008UL)); ESCAPE(taken); }
KEEP void from_pvalloc(void) { taken = pvalloc(OPAQUE(1009UL)); ESCAPE(taken); }

/* The block that realloc and reallocarray start from. */
KEEP void to_be_moved(void) { taken = malloc(OPAQUE(10UL)); ESCAPE(taken); }
KEEP void from_realloc_grow(void) { taken = realloc(taken, OPAQUE(2001UL)); ESCAPE(taken); }
KEEP void from_reallocarray_grow(void) { taken = reallocarray(taken, OPAQUE(31UL), 65); ESCAPE(taken); }

KEEP void give_back(void *block) { free(block); ESCAPE(block); }

static void moved_by_realloc(void) { to_be_moved(); from_realloc_grow(); }
static void moved_by_reallocarray(void) { to_be_moved(); from_reallocarray_grow(); }

static void several(void (*allocate)(void), int count, int kept)
{
        for (int i = 0; i < count; i++) {
                allocate();
                check(taken != NULL, "an allocation");
                if (i >= kept)
                        give_back(taken);
        }
}

int main(void)
{
        wait_for_go();
        several(from_malloc, 21, 1);
        several(from_calloc, 22, 2);
        several(from_realloc_null, 23, 3);
        several(from_reallocarray_null, 24, 4);
        several(from_posix_memalign, 25, 5);
        several(from_aligned_alloc, 26, 6);
        several(from_memalign, 27, 7);
        several(from_valloc, 28, 8);
        several(from_pvalloc, 29, 9);
        several(moved_by_realloc, 30, 10);
        several(moved_by_reallocarray, 31, 11);
        for (int i = 0; i < 1000; i++)
                free(OPAQUE((void *)0));
        wait_for_end();
        return 0;
}
