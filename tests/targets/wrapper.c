/* For LD_PRELOAD: an allocator in front of the C library's. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stddef.h>

static void *(*next_malloc)(size_t);
static void *(*next_calloc)(size_t, size_t);
static void *(*next_realloc)(void *, size_t);
static void (*next_free)(void *);

__attribute__((constructor)) static void resolve(void)
{
        next_malloc = (void *(*)(size_t))dlsym(RTLD_NEXT, "malloc");
        next_calloc = (void *(*)(size_t, size_t))dlsym(RTLD_NEXT, "calloc");
        next_realloc = (void *(*)(void *, size_t))dlsym(RTLD_NEXT, "realloc");
        next_free = (void (*)(void *))dlsym(RTLD_NEXT, "free");
}

void *malloc(size_t size)
{
        if (next_malloc == NULL)
                resolve();
        return next_malloc(size);
}

void *calloc(size_t count, size_t size)
{
        if (next_calloc == NULL)
                resolve();
        return next_calloc(count, size);
}

void *realloc(void *block, size_t size)
{
        if (next_realloc == NULL)
                resolve();
        return next_realloc(block, size);
}

void free(void *block)
{
        if (next_free == NULL)
                resolve();
        next_free(block);
}
