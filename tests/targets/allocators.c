/* allocators FAMILY [LIBRARY]: every function of an allocator by its own name: of those in
 * LIBRARY, else of those that the process has. Each is called from a function of its own,
 * slot_N, so and so many times for blocks of a size of its own, of which some stay. What
 * was done is said, a line a function:
 *
 *     slot_N NAME CALLS KEPT SIZE
 *
 * Blocks that are to be reallocated come from first_block: `first_block - CALLS 0 10`. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdbool.h>

#include "target.h"

enum shape {
        SIZE,      /* f(size, more, 0) */
        COUNT,     /* f(7, size / 7, more, 0) */
        ALIGN,     /* f(64, size) */
        OUT,       /* int f(&block, 64, size) */
        RE,        /* f(block, size, more, 0) */
        REARRAY,   /* f(block, 7, size / 7, more, 0) */
        GROW,      /* size_t f(block, size, 0, 0): xallocx */
        GROW_FAIL, /* the same, for more than there is */
        HEAP_SIZE, /* f(heap, size, more, 0) */
        HEAP_COUNT,
        HEAP_RE,
        HEAP_REARRAY,
};

enum free_shape {
        FREE,       /* f(block) */
        FREE_SIZE,  /* f(block, size, more) */
        FREE_FLAGS, /* f(block, more) */
};

struct function {
        const char *name;
        enum shape shape;
        const char *free;
        enum free_shape free_shape;
        unsigned long more; /* an alignment, or flags */
        unsigned long size; /* if not 0 */
};

/* MALLOCX_ALIGN(64) */
#define FLAGS 6

#define COMMON(prefix)                                                         \
        { prefix "malloc", SIZE, prefix "free", FREE, 0, 0 },                  \
        { prefix "calloc", COUNT, prefix "free", FREE, 0, 0 },                 \
        { prefix "realloc", RE, prefix "free", FREE, 0, 0 },                   \
        { prefix "posix_memalign", OUT, prefix "free", FREE, 0, 0 },           \
        { prefix "aligned_alloc", ALIGN, prefix "free", FREE, 0, 0 },          \
        { prefix "memalign", ALIGN, prefix "free", FREE, 0, 0 },               \
        { prefix "valloc", SIZE, prefix "free", FREE, 0, 0 }

#define EXTENDED(prefix)                                                       \
        { prefix "mallocx", SIZE, prefix "sdallocx", FREE_SIZE, FLAGS, 0 },    \
        { prefix "rallocx", RE, prefix "dallocx", FREE_FLAGS, FLAGS, 0 },      \
        { prefix "xallocx", GROW, prefix "dallocx", FREE_FLAGS, 0, 12 },       \
        { prefix "xallocx", GROW_FAIL, prefix "free", FREE, 0, 1UL << 40 }

static const struct function plain[] = { COMMON(""), { 0 } };
/* glibc's and musl's, which jemalloc need not have: its free would be given another's. */
static const struct function more[] = {
        COMMON(""),
        { "reallocarray", REARRAY, "free", FREE, 0, 0 },
        { "pvalloc", SIZE, "free", FREE, 0, 4096 },
        { "malloc", SIZE, "cfree", FREE, 0, 0 },
        { "reallocf", RE, "free", FREE, 0, 0 },
        { 0 }
};
static const struct function jemalloc[] = { COMMON(""), EXTENDED(""), { 0 } };
static const struct function je[] = { COMMON("je_"), EXTENDED("je_"), { 0 } };
static const struct function rjem[] = { COMMON("_rjem_"), EXTENDED("_rjem_"), { 0 } };
static const struct function tcmalloc[] = {
        { "tc_malloc", SIZE, "tc_free", FREE, 0, 0 },
        { "tc_malloc_skip_new_handler", SIZE, "tc_free_sized", FREE_SIZE, 0, 0 },
        { "tc_calloc", COUNT, "tc_cfree", FREE, 0, 0 },
        { "tc_realloc", RE, "tc_free", FREE, 0, 0 },
        { "tc_posix_memalign", OUT, "tc_free", FREE, 0, 0 },
        { "tc_memalign", ALIGN, "tc_free", FREE, 0, 0 },
        { "tc_valloc", SIZE, "tc_free", FREE, 0, 0 },
        { "tc_pvalloc", SIZE, "tc_free", FREE, 0, 4096 },
        { 0 }
};
static const struct function mimalloc[] = {
        { "mi_malloc", SIZE, "mi_free", FREE, 0, 0 },
        { "mi_malloc_small", SIZE, "mi_free_size", FREE_SIZE, 0, 0 },
        { "mi_zalloc", SIZE, "mi_free", FREE, 0, 0 },
        { "mi_zalloc_small", SIZE, "mi_free", FREE, 0, 0 },
        { "mi_malloc_aligned", SIZE, "mi_free_size_aligned", FREE_SIZE, 64, 0 },
        { "mi_malloc_aligned_at", SIZE, "mi_free_aligned", FREE_FLAGS, 64, 0 },
        { "mi_zalloc_aligned", SIZE, "mi_free", FREE, 64, 0 },
        { "mi_zalloc_aligned_at", SIZE, "mi_free", FREE, 64, 0 },
        { "mi_heap_malloc_small", HEAP_SIZE, "mi_free", FREE, 0, 0 },
        { "mi_calloc", COUNT, "mi_cfree", FREE, 0, 0 },
        { "mi_mallocn", COUNT, "mi_free", FREE, 0, 0 },
        { "mi_calloc_aligned", COUNT, "mi_free", FREE, 64, 0 },
        { "mi_calloc_aligned_at", COUNT, "mi_free", FREE, 64, 0 },
        { "mi_posix_memalign", OUT, "mi_free", FREE, 0, 0 },
        { "mi_aligned_alloc", ALIGN, "mi_free", FREE, 0, 0 },
        { "mi_memalign", ALIGN, "mi_free", FREE, 0, 0 },
        { "mi_valloc", SIZE, "mi_free", FREE, 0, 0 },
        { "mi_pvalloc", SIZE, "mi_free", FREE, 0, 4096 },
        { "mi_realloc", RE, "mi_free", FREE, 0, 0 },
        { "mi_reallocf", RE, "mi_free", FREE, 0, 0 },
        { "mi_rezalloc", RE, "mi_free", FREE, 0, 0 },
        { "mi_expand", RE, "mi_free", FREE, 0, 12 },
        { "mi_realloc_aligned", RE, "mi_free", FREE, 64, 0 },
        { "mi_realloc_aligned_at", RE, "mi_free", FREE, 64, 0 },
        { "mi_rezalloc_aligned", RE, "mi_free", FREE, 64, 0 },
        { "mi_rezalloc_aligned_at", RE, "mi_free", FREE, 64, 0 },
        { "mi_reallocn", REARRAY, "mi_free", FREE, 0, 0 },
        { "mi_reallocarray", REARRAY, "mi_free", FREE, 0, 0 },
        { "mi_recalloc", REARRAY, "mi_free", FREE, 0, 0 },
        { "mi_recalloc_aligned", REARRAY, "mi_free", FREE, 64, 0 },
        { "mi_recalloc_aligned_at", REARRAY, "mi_free", FREE, 64, 0 },
        { "mi_aligned_recalloc", REARRAY, "mi_free", FREE, 64, 0 },
        { "mi_aligned_offset_recalloc", REARRAY, "mi_free", FREE, 64, 0 },
        { "mi_heap_malloc", HEAP_SIZE, "mi_free", FREE, 0, 0 },
        { "mi_heap_zalloc", HEAP_SIZE, "mi_free", FREE, 0, 0 },
        { "mi_heap_malloc_aligned", HEAP_SIZE, "mi_free", FREE, 64, 0 },
        { "mi_heap_malloc_aligned_at", HEAP_SIZE, "mi_free", FREE, 64, 0 },
        { "mi_heap_zalloc_aligned", HEAP_SIZE, "mi_free", FREE, 64, 0 },
        { "mi_heap_zalloc_aligned_at", HEAP_SIZE, "mi_free", FREE, 64, 0 },
        { "mi_heap_calloc", HEAP_COUNT, "mi_free", FREE, 0, 0 },
        { "mi_heap_mallocn", HEAP_COUNT, "mi_free", FREE, 0, 0 },
        { "mi_heap_calloc_aligned", HEAP_COUNT, "mi_free", FREE, 64, 0 },
        { "mi_heap_calloc_aligned_at", HEAP_COUNT, "mi_free", FREE, 64, 0 },
        { "mi_heap_realloc", HEAP_RE, "mi_free", FREE, 0, 0 },
        { "mi_heap_reallocf", HEAP_RE, "mi_free", FREE, 0, 0 },
        { "mi_heap_rezalloc", HEAP_RE, "mi_free", FREE, 0, 0 },
        { "mi_heap_realloc_aligned", HEAP_RE, "mi_free", FREE, 64, 0 },
        { "mi_heap_realloc_aligned_at", HEAP_RE, "mi_free", FREE, 64, 0 },
        { "mi_heap_rezalloc_aligned", HEAP_RE, "mi_free", FREE, 64, 0 },
        { "mi_heap_rezalloc_aligned_at", HEAP_RE, "mi_free", FREE, 64, 0 },
        { "mi_heap_reallocn", HEAP_REARRAY, "mi_free", FREE, 0, 0 },
        { "mi_heap_recalloc", HEAP_REARRAY, "mi_free", FREE, 0, 0 },
        { "mi_heap_recalloc_aligned", HEAP_REARRAY, "mi_free", FREE, 64, 0 },
        { "mi_heap_recalloc_aligned_at", HEAP_REARRAY, "mi_free", FREE, 64, 0 },
        { 0 }
};

/* C++'s, under all names; an allocator has some of them. */
static const struct function cxx[] = {
        { "_Znwm", SIZE, "_ZdlPv", FREE, 0, 0 },
        { "_Znam", SIZE, "_ZdaPv", FREE, 0, 0 },
        { "_Znwm", SIZE, "_ZdlPvm", FREE_SIZE, 0, 24576 },
        { "_Znam", SIZE, "_ZdaPvm", FREE_SIZE, 0, 0 },
        { "_ZnwmRKSt9nothrow_t", SIZE, "_ZdlPvRKSt9nothrow_t", FREE, 0, 0 },
        { "_ZnamRKSt9nothrow_t", SIZE, "_ZdaPvRKSt9nothrow_t", FREE, 0, 0 },
        { "_ZnwmSt11align_val_t", SIZE, "_ZdlPvSt11align_val_t", FREE_FLAGS, 64, 0 },
        { "_ZnamSt11align_val_t", SIZE, "_ZdaPvSt11align_val_t", FREE_FLAGS, 64, 0 },
        { "_ZnwmSt11align_val_t", SIZE, "_ZdlPvmSt11align_val_t", FREE_SIZE, 64, 0 },
        { "_ZnamSt11align_val_t", SIZE, "_ZdaPvmSt11align_val_t", FREE_SIZE, 64, 0 },
        { "_ZnwmSt11align_val_tRKSt9nothrow_t", SIZE, "_ZdlPvSt11align_val_tRKSt9nothrow_t",
          FREE_FLAGS, 64, 0 },
        { "_ZnamSt11align_val_tRKSt9nothrow_t", SIZE, "_ZdaPvSt11align_val_tRKSt9nothrow_t",
          FREE_FLAGS, 64, 0 },
        { "tc_new", SIZE, "tc_delete", FREE, 0, 0 },
        { "tc_newarray_nothrow", SIZE, "tc_deletearray_sized", FREE_SIZE, 0, 24576 },
        { "tc_new_aligned", SIZE, "tc_delete_sized_aligned", FREE_SIZE, 64, 0 },
        { "tc_new_aligned_nothrow", SIZE, "tc_delete_aligned", FREE_FLAGS, 64, 0 },
        { "mi_new", SIZE, "mi_free", FREE, 0, 0 },
        { "mi_new_nothrow", SIZE, "mi_free", FREE, 0, 0 },
        { "mi_new_aligned", SIZE, "mi_free", FREE, 64, 0 },
        { "mi_new_aligned_nothrow", SIZE, "mi_free", FREE, 64, 0 },
        { "mi_new_n", COUNT, "mi_free", FREE, 0, 0 },
        { "mi_heap_alloc_new", HEAP_SIZE, "mi_free", FREE, 0, 0 },
        { "mi_heap_alloc_new_n", HEAP_COUNT, "mi_free", FREE, 0, 0 },
        { "mi_new_realloc", RE, "mi_free", FREE, 0, 0 },
        { "mi_new_reallocn", REARRAY, "mi_free", FREE, 0, 0 },
        { 0 }
};

static const struct {
        const char *name;
        const struct function *functions;
} families[] = {
        { "plain", plain },       { "more", more },     { "jemalloc", jemalloc },
        { "je", je },             { "rjem", rjem },     { "tcmalloc", tcmalloc },
        { "mimalloc", mimalloc }, { "cxx", cxx },
};

/* Any function: no argument is in anything but a register. */
typedef void *any(unsigned long, unsigned long, unsigned long, unsigned long, unsigned long);

static void *heap;
static any *first;
static unsigned long firsts;

KEEP static unsigned long first_block(void)
{
        void *block = first(10, 0, 0, 0, 0);
        check(block != NULL, "a first block");
        firsts++;
        return (unsigned long)block;
}

static inline __attribute__((always_inline)) void *
perform(const struct function *f, any *call, unsigned long old, unsigned long size)
{
        void *block = NULL;
        unsigned long h = (unsigned long)heap, n = size / 7;
        switch (f->shape) {
        case SIZE:
                return call(size, f->more, 0, 0, 0);
        case COUNT:
                return call(7, n, f->more, 0, 0);
        case ALIGN:
                return call(64, size, 0, 0, 0);
        case OUT:
                check((int)(long)call((unsigned long)&block, 64, size, 0, 0) == 0, f->name);
                return block;
        case RE:
                return call(old, size, f->more, 0, 0);
        case REARRAY:
                return call(old, 7, n, f->more, 0);
        case GROW:
                check((unsigned long)call(old, size, 0, 0, 0) >= size, "it grows");
                return (void *)old;
        case GROW_FAIL:
                check((unsigned long)call(old, size, 0, 0, 0) < size, "it does not grow");
                return (void *)old;
        case HEAP_SIZE:
                return call(h, size, f->more, 0, 0);
        case HEAP_COUNT:
                return call(h, 7, n, f->more, 0);
        case HEAP_RE:
                return call(h, old, size, f->more, 0);
        case HEAP_REARRAY:
                return call(h, old, 7, n, f->more);
        }
        return NULL;
}

typedef void *slot(const struct function *, any *, unsigned long, unsigned long);

#define SLOT(n)                                                                \
        KEEP static void *slot_##n(const struct function *f, any *call,        \
                                   unsigned long old, unsigned long size)      \
        {                                                                      \
                void *block = perform(f, call, old, size);                     \
                ESCAPE(block);                                                 \
                return block;                                                  \
        }
#define TEN(on, t)                                                             \
        on(t##0) on(t##1) on(t##2) on(t##3) on(t##4) on(t##5) on(t##6)         \
                on(t##7) on(t##8) on(t##9)
#define ALL(on)                                                                \
        TEN(on, ) TEN(on, 1) TEN(on, 2) TEN(on, 3) TEN(on, 4) TEN(on, 5)
#define ADDRESS(n) slot_##n,
ALL(SLOT)
static slot *const slots[] = { ALL(ADDRESS) };

static any *find(void *library, const char *name)
{
        any *found;
        *(void **)&found = dlsym(library, name);
        return found;
}

/* Whether `f` resizes a block. */
static bool takes_block(const struct function *f)
{
        return f->shape == RE || f->shape == REARRAY || f->shape == GROW ||
               f->shape == GROW_FAIL || f->shape == HEAP_RE || f->shape == HEAP_REARRAY;
}

static void give_back(const struct function *f, any *call, void *block, unsigned long size)
{
        unsigned long b = (unsigned long)block;
        switch (f->free_shape) {
        case FREE:
                call(b, 0, 0, 0, 0);
                break;
        case FREE_SIZE:
                call(b, size, f->more, 0, 0);
                break;
        case FREE_FLAGS:
                call(b, f->more, 0, 0, 0);
                break;
        }
}

static any *calls[64], *frees[64];

int main(int argc, char **argv)
{
        const struct function *functions = NULL;
        char line[128];
        check(argc > 1, "a family");
        for (size_t i = 0; i < sizeof families / sizeof *families; i++)
                if (strcmp(families[i].name, argv[1]) == 0)
                        functions = families[i].functions;
        check(functions != NULL, "a known family");
        void *library = argc > 2 ? dlopen(argv[2], RTLD_NOW | RTLD_LOCAL) : RTLD_DEFAULT;
        check(argc == 2 || library != NULL, "the library");
        first = find(library, functions[0].name);
        check(first != NULL, "the family's first function");
        any *default_heap = find(library, "mi_heap_get_default");
        /* The heap has to be this thread's, and made. */
        if (default_heap != NULL) {
                find(library, "mi_free")((unsigned long)find(library, "mi_malloc")(1, 0, 0, 0, 0), 0, 0, 0, 0);
                heap = default_heap(0, 0, 0, 0, 0);
        }
        for (int i = 0; functions[i].name != NULL; i++) {
                calls[i] = find(library, functions[i].name);
                frees[i] = find(library, functions[i].free);
        }
        wait_for_go();
        for (int i = 0; functions[i].name != NULL; i++) {
                const struct function *f = &functions[i];
                unsigned long size = f->size != 0 ? f->size : 64UL * 7 * (i % 2 + 1) + 0UL;
                int count = 3 + i, kept = i % 3;
                if (calls[i] == NULL || frees[i] == NULL)
                        continue;
                for (int k = 0; k < count; k++) {
                        unsigned long old = takes_block(f) ? first_block() : 0;
                        void *block = slots[i](f, calls[i], old, size);
                        check(block != NULL, f->name);
                        if (f->shape == GROW_FAIL || k >= kept)
                                give_back(f, frees[i], block, size);
                }
                if (f->shape == GROW_FAIL)
                        count = kept = 0;
                snprintf(line, sizeof line, "slot_%d %s %d %d %lu\n", i, f->name, count, kept, size);
                say(line);
        }
        snprintf(line, sizeof line, "first_block - %lu 0 10\n", firsts);
        say(line);
        wait_for_end();
        return 0;
}
