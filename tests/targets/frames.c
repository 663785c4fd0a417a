/* One shape of frame an argument; each allocates in `leaf`, called from `shaped`. */
#include <alloca.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>

#define KEEP __attribute__((noinline, noclone))

static void *volatile sink;

KEEP void leaf(void) {
    void *block = malloc(777);
    sink = block;
    free(block);
}

/* Beyond what 32 bits of a row can say of a frame, and beyond a page. */
KEEP static void large(void) {
    volatile char space[3 << 20];
    space[0] = 1;
    space[sizeof space - 1] = 2;
    leaf();
    sink = (void *)&space[1];
}

/* Where the stack pointer is, only rbp tells. */
KEEP static void dynamic(int size) {
    char *space = alloca(size);
    memset(space, size, size);
    leaf();
    sink = space;
}

/* The frame begins at a multiple of 128, wherever the caller was. */
KEEP static void realigned(int size) {
    volatile char space[256] __attribute__((aligned(128)));
    space[size & 255] = 1;
    leaf();
    sink = (void *)space;
}

/* Both: gcc counts from a third register at entry, and saves where it came from. */
KEEP static void realigned_dynamic(int size) {
    volatile char space[256] __attribute__((aligned(64)));
    char *more = alloca(size);
    memset(more, size, size);
    space[size & 255] = more[0];
    leaf();
    sink = (void *)space;
    sink = more;
}

/* rbp holds a number while `leaf` runs; the unwind information says where the caller's is. */
__asm__(".text\n"
        ".type free_rbp, @function\n"
        "free_rbp:\n"
        "  .cfi_startproc\n"
        "  push %rbp\n"
        "  .cfi_adjust_cfa_offset 8\n"
        "  .cfi_rel_offset %rbp, 0\n"
        "  sub $48, %rsp\n"
        "  .cfi_adjust_cfa_offset 48\n"
        "  mov $3, %ebp\n"
        "  call leaf\n"
        "  add $48, %rsp\n"
        "  .cfi_adjust_cfa_offset -48\n"
        "  pop %rbp\n"
        "  .cfi_restore %rbp\n"
        "  .cfi_adjust_cfa_offset -8\n"
        "  ret\n"
        "  .cfi_endproc\n"
        ".size free_rbp, . - free_rbp\n");
void free_rbp(void);

/* By hand: pushes at a call, a state that is remembered and taken back, rbp aside. */
__asm__(".text\n"
        ".type by_hand, @function\n"
        "by_hand:\n"
        "  .cfi_startproc\n"
        "  sub $1048, %rsp\n"
        "  .cfi_adjust_cfa_offset 1048\n"
        "  mov %rbp, 1000(%rsp)\n"
        "  .cfi_rel_offset %rbp, 1000\n"
        "  mov $5, %ebp\n"
        "  .cfi_remember_state\n"
        "  test %edi, %edi\n"
        "  jne 1f\n"
        "  mov 1000(%rsp), %rbp\n"
        "  .cfi_restore %rbp\n"
        "  add $1048, %rsp\n"
        "  .cfi_adjust_cfa_offset -1048\n"
        "  ret\n"
        "1:\n"
        "  .cfi_restore_state\n"
        "  push $1\n"
        "  .cfi_adjust_cfa_offset 8\n"
        "  push $2\n"
        "  .cfi_adjust_cfa_offset 8\n"
        "  call leaf\n"
        "  add $16, %rsp\n"
        "  .cfi_adjust_cfa_offset -16\n"
        "  mov 1000(%rsp), %rbp\n"
        "  .cfi_restore %rbp\n"
        "  add $1048, %rsp\n"
        "  .cfi_adjust_cfa_offset -1048\n"
        "  ret\n"
        "  .cfi_endproc\n"
        ".size by_hand, . - by_hand\n");
void by_hand(int call);

/* As sanitizers and old compilers do: the CFA by an expression that is none of the
   common ones (rsp + 8 + 8 * 1 + 0). The stack is cut here, and says so. */
__asm__(".text\n"
        ".type expression, @function\n"
        "expression:\n"
        "  .cfi_startproc\n"
        "  push %rbx\n"
        /* DW_CFA_def_cfa_expression, 6 bytes: breg7 8, lit1, lit8, mul, plus */
        "  .cfi_escape 0x0f, 0x06, 0x77, 0x08, 0x31, 0x38, 0x1e, 0x22\n"
        "  call leaf\n"
        "  pop %rbx\n"
        "  ret\n"
        "  .cfi_endproc\n"
        ".size expression, . - expression\n");
void expression(void);

/* Its caller's rbp is needed only further out: `outer` counts from it. */
KEEP static void outer(int size, void (*call)(void)) {
    char *space = alloca(size);
    memset(space, size, size);
    call();
    sink = space;
}

static void by_hand_called(void) {
    by_hand(1);
    __asm__ volatile("");
}

int main(int count, char **arguments) {
    const char *what = count > 1 ? arguments[1] : "";
    int size = 100 + count;
    if (strcmp(what, "large") == 0)
        large();
    else if (strcmp(what, "dynamic") == 0)
        dynamic(size);
    else if (strcmp(what, "realigned") == 0)
        realigned(size);
    else if (strcmp(what, "realigned_dynamic") == 0)
        realigned_dynamic(size);
    else if (strcmp(what, "free_rbp") == 0)
        outer(size, free_rbp);
    else if (strcmp(what, "by_hand") == 0)
        outer(size, by_hand_called);
    else if (strcmp(what, "expression") == 0)
        outer(size, expression);
    else
        return 1;
    return 0;
}
