/* What realloc settles at its exit, and calls that fail. */
#include <errno.h>
#include <stdint.h>

#include "target.h"

static void *block;

KEEP void chain_start(void) { block = malloc(10); ESCAPE(block); }
KEEP void chain_grow(size_t size) { block = realloc(block, size); ESCAPE(block); }

KEEP void from_null(void) { block = realloc(OPAQUE((void *)0), 300); ESCAPE(block); }

KEEP void zero_start(void) { block = malloc(400); ESCAPE(block); }
KEEP void to_zero(void) { block = realloc(block, OPAQUE(0UL)); ESCAPE(block); }

KEEP void kept_by_failure(void) { block = malloc(500); ESCAPE(block); }
KEEP void failing_realloc(void)
{
        void *other = realloc(block, OPAQUE((size_t)PTRDIFF_MAX));
        ESCAPE(other);
        check(other == NULL, "realloc was expected to fail");
}

KEEP void freed_after_failure(void) { block = malloc(600); ESCAPE(block); }

KEEP void failing_malloc(void)
{
        void *none = malloc(OPAQUE((size_t)PTRDIFF_MAX));
        ESCAPE(none);
        check(none == NULL, "malloc was expected to fail");
}

KEEP void failing_calloc(void)
{
        void *none = calloc(OPAQUE((size_t)SIZE_MAX / 2), OPAQUE((size_t)8));
        ESCAPE(none);
        check(none == NULL, "calloc was expected to fail");
}

KEEP void failing_posix_memalign(void)
{
        void *none = &none;
        int error = posix_memalign(&none, OPAQUE((size_t)3), 700);
        ESCAPE(none);
        check(error == EINVAL, "posix_memalign was expected to fail");
}

int main(void)
{
        wait_for_go();
        chain_start();
        for (size_t i = 1; i <= 100; i++)
                chain_grow(10 + 10 * i);
        for (int i = 0; i < 7; i++)
                from_null();
        for (int i = 0; i < 8; i++) {
                zero_start();
                to_zero();
                check(block == NULL, "realloc(p, 0) frees here");
        }
        for (int i = 0; i < 9; i++) {
                kept_by_failure();
                failing_realloc();
                failing_realloc();
        }
        for (int i = 0; i < 6; i++) {
                freed_after_failure();
                failing_realloc();
                free(block);
        }
        for (int i = 0; i < 5; i++) {
                failing_malloc();
                failing_calloc();
                failing_posix_memalign();
        }
        wait_for_end();
        return 0;
}
