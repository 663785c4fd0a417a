/* stepped FILE: is interrupted behind every instruction of some calls, and allocates in
 * the handler. FILE tells what the stack was each time, as followed by the calls and
 * returns that were seen, and where code is mapped. */
#define _GNU_SOURCE
#include <alloca.h>
#include <execinfo.h>
#include <signal.h>
#include <sys/time.h>
#include <time.h>
#include <ucontext.h>

#include "target.h"

enum { STEPS = 30000, DEPTH = 32 };

/* Each step's stack: addresses of instructions, then 0. */
static unsigned long stacks[STEPS][DEPTH];
static unsigned count;

/* The calls that have not returned: return address, and where it lies. */
static unsigned long returns[DEPTH], slots[DEPTH];
static int depth;
static unsigned long before_ip, before_sp;

/* What `stepped` was called through. */
static void *base[DEPTH];
static int base_depth;

__attribute__((noinline)) static void on_step(int number, siginfo_t *info, void *context)
{
        (void)number;
        (void)info;
        greg_t *registers = ((ucontext_t *)context)->uc_mcontext.gregs;
        unsigned long ip = (unsigned long)registers[REG_RIP];
        unsigned long sp = (unsigned long)registers[REG_RSP];
        /* The stack pointer has left what a call had pushed. */
        while (depth > 0 && slots[depth - 1] < sp)
                depth--;
        /* The instruction before has pushed the address of the one behind it. */
        if (before_ip != 0 && sp == before_sp - 8) {
                unsigned long pushed = *(unsigned long *)sp;
                if (pushed - before_ip - 1 < 8) {
                        check(depth < DEPTH, "few calls in one another");
                        returns[depth] = pushed;
                        slots[depth++] = sp;
                }
        }
        before_ip = ip;
        before_sp = sp;

        check(count < STEPS, "few steps");
        unsigned long *stack = stacks[count++];
        int length = 0;
        stack[length++] = ip;
        for (int i = depth; i-- > 0;)
                stack[length++] = returns[i] - 1;
        for (int i = 1; i < base_depth; i++) {
                check(length < DEPTH - 1, "room for a stack");
                stack[length++] = (unsigned long)base[i] - 1;
        }
        void *block = malloc(4321);
        ESCAPE(block);
}

/* Sets and clears the trap flag. */
__asm__(".text\n"
        ".type begin_steps, @function\n"
        "begin_steps:\n"
        "  .cfi_startproc\n"
        "  pushfq\n"
        "  .cfi_adjust_cfa_offset 8\n"
        "  orl $0x100, (%rsp)\n"
        "  popfq\n"
        "  .cfi_adjust_cfa_offset -8\n"
        "  ret\n"
        "  .cfi_endproc\n"
        ".size begin_steps, . - begin_steps\n"
        ".type end_steps, @function\n"
        "end_steps:\n"
        "  .cfi_startproc\n"
        "  pushfq\n"
        "  .cfi_adjust_cfa_offset 8\n"
        "  andl $~0x100, (%rsp)\n"
        "  popfq\n"
        "  .cfi_adjust_cfa_offset -8\n"
        "  ret\n"
        "  .cfi_endproc\n"
        ".size end_steps, . - end_steps\n");
void begin_steps(void);
void end_steps(void);

KEEP static int variable(int bytes)
{
        char *room = alloca((size_t)bytes);
        room[bytes / 2] = (char)bytes;
        ESCAPE(room);
        return bytes > 16 ? variable(bytes - 16) + room[0] : 0;
}

KEEP __attribute__((force_align_arg_pointer)) static int realigned(int n)
{
        _Alignas(64) volatile char room[256];
        room[n & 255] = 1;
        return room[1] + (n > 0 ? realigned(n - 1) : 0);
}

KEEP static long large(int n)
{
        volatile char room[600 * 1024];
        room[sizeof room - 1] = (char)n;
        ESCAPE(room);
        return room[0] + (n > 0 ? large(n - 1) : 0);
}

KEEP static long busy(long a, long b, long c, long d, long e, long f, int n)
{
        long g = a * b, h = c * d, i = e * f, j = a ^ d;
        if (n > 0)
                g += busy(b, c, d, e, f, g, n - 1);
        return a + b + c + d + e + f + g + h + i + j;
}

static int compare(const void *a, const void *b)
{
        return *(const int *)a - *(const int *)b;
}

KEEP static long stepped(void)
{
        static char from[300], to[300], text[100];
        const char *volatile digits = "-1234", *volatile words = "some text";
        int numbers[] = { 5, 3, 9, 1 };
        struct timespec time;
        struct timeval day;
        long sum = 0;
        base_depth = backtrace(base, DEPTH);
        begin_steps();
        /* The first call of each is bound by the loader if it is bound lazily. */
        for (int round = 0; round < 2; round++) {
                sum += strtol(digits, NULL, 10);
                sum += clock_gettime(CLOCK_MONOTONIC, &time);
                sum += gettimeofday(&day, NULL);
                memcpy(to, from, OPAQUE(sizeof to));
                sum += (long)strlen(words);
        }
        sum += snprintf(text, sizeof text, "%d %s %lx", numbers[1], "text", 77UL);
        qsort(numbers, 4, sizeof *numbers, compare);
        sum += variable(64);
        sum += realigned(2);
        sum += large(1);
        sum += busy(1, 2, 3, 4, 5, numbers[0], 2);
        end_steps();
        return sum;
}

static void write_down(const char *path)
{
        FILE *file = fopen(path, "w"), *maps = fopen("/proc/self/maps", "r");
        check(file != NULL && maps != NULL, "files");
        for (unsigned step = 0; step < count; step++) {
                fprintf(file, "stack");
                for (unsigned long *at = stacks[step]; *at != 0; at++)
                        fprintf(file, " %lx", *at);
                fprintf(file, "\n");
        }
        char line[1000];
        while (fgets(line, sizeof line, maps) != NULL)
                fprintf(file, "map %s", line);
        check(fclose(file) == 0, "writing the file");
        fclose(maps);
}

int main(int argc, char **argv)
{
        check(argc == 2, "a file");
        /* Now, so that the handler's own call is bound. */
        void *block = malloc(1);
        ESCAPE(block);
        struct sigaction action = { .sa_sigaction = on_step, .sa_flags = SA_SIGINFO };
        sigaction(SIGTRAP, &action, NULL);
        long sum = stepped();
        ESCAPE(&sum);
        write_down(argv[1]);
        return 0;
}
