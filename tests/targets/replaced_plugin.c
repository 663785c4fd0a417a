/* Built twice, with names of one length: then all is at the same places in both. */
#ifndef INNER
#define INNER first_inner
#endif

__attribute__((noinline, noclone)) void INNER(void (*call)(void)) {
    call();
    __asm__ volatile("");
}

void plugin_call(void (*call)(void)) {
    INNER(call);
    __asm__ volatile("");
}
