/* functions [SIZE]: pools of its own. Each function is called from one that has a name. What
 * pools take from malloc during a call is theirs; what they took before is malloc's. */
#include "target.h"

enum { ROUNDS = 40, KEPT = 15 };

struct arena {
        char *base;
        size_t used, size;
        struct block { struct block *next; } *given_up;
};

static struct arena arena;

/* The first block has the address of the memory that it is in. */
KEEP void make_arena(struct arena *a, size_t size)
{
        a->base = malloc(size);
        a->size = size;
}

/* Stores the block, as posix_memalign does. */
KEEP int arena_blocks(struct arena *a, size_t count, size_t size, void **out)
{
        size_t bytes = count * size;
        if (a->given_up != NULL) {
                *out = a->given_up;
                a->given_up = a->given_up->next;
                return 0;
        }
        if (bytes > a->size - a->used) {
                *out = NULL;
                return -1;
        }
        *out = a->base + a->used;
        a->used += bytes;
        return 0;
}

KEEP void arena_give(struct arena *a, void *p)
{
        if (p == NULL)
                return;
        struct block *block = p;
        block->next = a->given_up;
        a->given_up = block;
}

/* No other file sees these two. Each call of them is one of malloc or free, too. */
KEEP static void *local_take(size_t size)
{
        void *block = malloc(size);
        if (block == NULL)
                return NULL;
        memset(block, 1, 1);
        return block;
}

KEEP static void local_give(void *block)
{
        ESCAPE(block);
        free(block);
        __asm__ volatile("");
}

/* Calls another of them. */
KEEP void *outer_take(int unused, size_t size)
{
        ESCAPE(&unused);
        char *block = local_take(size);
        check(block != NULL, "memory");
        return block;
}

/* Ends by a jump to where nobody knows. */
void *(*take_by)(size_t) = malloc;
void *jumping_take(size_t size);
__asm__(".text\n"
        ".globl jumping_take\n"
        ".type jumping_take, @function\n"
        "jumping_take:\n"
        "        .cfi_startproc\n"
        "        mov take_by(%rip), %rax\n"
        "        jmp *%rax\n"
        "        .cfi_endproc\n"
        ".size jumping_take, . - jumping_take\n");

KEEP void from_arena(size_t size)
{
        void *blocks[ROUNDS];
        for (int i = 0; i < ROUNDS; i++)
                check(arena_blocks(&arena, 2, size / 2, &blocks[i]) == 0, "the arena");
        check(blocks[0] == arena.base, "the first block is where the arena is");
        for (int i = 0; i < ROUNDS - KEPT; i++)
                arena_give(&arena, blocks[i]);
        arena_give(&arena, NULL);
}

KEEP void from_full_arena(void)
{
        struct arena full = { 0 };
        void *block;
        check(arena_blocks(&full, 1, 1000, &block) == -1, "an arena is full");
}

KEEP void from_local(size_t size)
{
        void *blocks[ROUNDS];
        for (int i = 0; i < ROUNDS; i++)
                blocks[i] = local_take(size);
        for (int i = 0; i < ROUNDS - KEPT; i++) {
                if (i % 2 == 0)
                        local_give(blocks[i]);
                else
                        free(blocks[i]);
        }
}

KEEP void from_outer(size_t size)
{
        for (int i = 0; i < ROUNDS; i++) {
                void *block = outer_take(0, size);
                if (i >= KEPT)
                        local_give(block);
        }
}

KEEP void from_jumping(size_t size)
{
        for (int i = 0; i < ROUNDS; i++) {
                void *block = jumping_take(size);
                ESCAPE(block);
                if (i >= KEPT)
                        free(block);
        }
}

KEEP void from_malloc(size_t size)
{
        for (int i = 0; i < ROUNDS; i++) {
                void *block = malloc(size);
                ESCAPE(block);
                if (i >= KEPT)
                        free(block);
        }
}

KEEP void *regrow(void *block, size_t size)
{
        block = realloc(block, size);
        ESCAPE(block);
        return block;
}

KEEP void from_regrown(size_t size)
{
        regrow(local_take(size), 2 * size);
}

int main(int argc, char **argv)
{
        size_t size = number(argc, argv, 1, 48);
        wait_for_go();
        make_arena(&arena, size * ROUNDS);
        from_arena(size);
        from_full_arena();
        from_local(size);
        from_outer(size);
        from_jumping(size);
        from_malloc(size);
        from_regrown(size);
        wait_for_end();
        return 0;
}
