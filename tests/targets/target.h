/* What every C and C++ target shares. Nothing here allocates: stdio would, so
 * input and output go through read(2) and write(2). */
#pragma once

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

/* A function that keeps its own frame and its name. */
#if defined(__GNUC__) && !defined(__clang__)
#define KEEP __attribute__((noinline, noipa))
#else
#define KEEP __attribute__((noinline))
#endif

/* Makes the compiler believe that somebody looks at the block. */
#define ESCAPE(pointer) __asm__ volatile("" : : "r"(pointer) : "memory")

/* A value that the compiler cannot know. */
#define OPAQUE(value) (__extension__({                                         \
        __typeof__(value) opaque_ = (value);                                   \
        __asm__ volatile("" : "+r"(opaque_));                                  \
        opaque_;                                                               \
}))

static inline void say(const char *text)
{
        size_t left = strlen(text);
        while (left > 0) {
                ssize_t wrote = write(1, text, left);
                if (wrote <= 0)
                        _exit(90);
                text += wrote;
                left -= (size_t)wrote;
        }
}

static inline void say_value(const char *name, unsigned long value)
{
        char line[128];
        snprintf(line, sizeof line, "%s=%lu\n", name, value);
        say(line);
}

/* Reads up to and with the next newline; an end of input counts as one. */
static inline void wait_line(void)
{
        char byte;
        while (read(0, &byte, 1) == 1 && byte != '\n')
                ;
}

/* The handshake: nothing is allocated before this returns ... */
static inline void wait_for_go(void)
{
        say("ready\n");
        wait_line();
}

/* ... nor after this is called. */
static inline void wait_for_end(void)
{
        say("done\n");
        wait_line();
}

static inline unsigned long number(int argc, char **argv, int index,
                                   unsigned long otherwise)
{
        return index < argc ? strtoul(argv[index], NULL, 10) : otherwise;
}

static inline void check(int holds, const char *what)
{
        if (!holds) {
                say("target failed: ");
                say(what);
                say("\n");
                _exit(91);
        }
}
