/* Allocates in three functions, in known numbers, and nothing else: no stdio. */
#include <stdlib.h>

static void *volatile block;

__attribute__((noinline)) void keep_here(void) {
    for (int i = 0; i < 1000; i++) block = malloc(64);
}

__attribute__((noinline)) void churn_here(void) {
    for (int i = 0; i < 20000; i++) {
        block = malloc(100);
        free(block);
        block = calloc(3, 40);
        block = realloc(block, 500);
        free(block);
    }
}

/* Calls itself, and does something afterwards, so that each call has a frame. */
__attribute__((noinline)) int deep_here(int calls) {
    if (calls > 0) return deep_here(calls - 1) + 1;
    block = malloc(16);
    return 0;
}

int main(void) {
    keep_here();
    churn_here();
    return deep_here(99) != 99;
}
