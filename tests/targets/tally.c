/* For LD_PRELOAD: counts what a target allocates and frees, as a check of the
 * totals that the tests expect of it. Writes them to stderr at exit. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stddef.h>
#include <stdio.h>
#include <unistd.h>

static unsigned long allocs, frees;

#define NEXT(name)                                                             \
        static __typeof__(&name) next;                                         \
        if (next == NULL)                                                      \
                next = (__typeof__(&name))dlsym(RTLD_NEXT, #name)

extern void *malloc(size_t);
extern void *calloc(size_t, size_t);
extern void *realloc(void *, size_t);
extern void *reallocarray(void *, size_t, size_t);
extern int posix_memalign(void **, size_t, size_t);
extern void *aligned_alloc(size_t, size_t);
extern void *memalign(size_t, size_t);
extern void *valloc(size_t);
extern void *pvalloc(size_t);
extern void free(void *);

static void *counted(void *block)
{
        if (block != NULL)
                __atomic_fetch_add(&allocs, 1, __ATOMIC_RELAXED);
        return block;
}

void *malloc(size_t size) { NEXT(malloc); return counted(next(size)); }
void *calloc(size_t count, size_t size) { NEXT(calloc); return counted(next(count, size)); }
void *aligned_alloc(size_t align, size_t size) { NEXT(aligned_alloc); return counted(next(align, size)); }
void *memalign(size_t align, size_t size) { NEXT(memalign); return counted(next(align, size)); }
void *valloc(size_t size) { NEXT(valloc); return counted(next(size)); }
void *pvalloc(size_t size) { NEXT(pvalloc); return counted(next(size)); }

int posix_memalign(void **block, size_t align, size_t size)
{
        NEXT(posix_memalign);
        int error = next(block, align, size);
        if (error == 0)
                counted(*block);
        return error;
}

void *realloc(void *old, size_t size)
{
        NEXT(realloc);
        void *block = counted(next(old, size));
        if (old != NULL && (block != NULL || size == 0))
                __atomic_fetch_add(&frees, 1, __ATOMIC_RELAXED);
        return block;
}

void *reallocarray(void *old, size_t count, size_t size)
{
        size_t bytes;
        if (__builtin_mul_overflow(count, size, &bytes)) {
                errno = ENOMEM;
                return NULL;
        }
        return realloc(old, bytes);
}

void free(void *block)
{
        NEXT(free);
        if (block != NULL)
                __atomic_fetch_add(&frees, 1, __ATOMIC_RELAXED);
        next(block);
}

__attribute__((destructor)) static void report(void)
{
        dprintf(2, "tally allocs=%lu frees=%lu\n", allocs, frees);
}
