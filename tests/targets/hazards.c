/* One hazard to unwinding an argument; each allocates in `leaf`. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#define KEEP __attribute__((noinline, noclone))

static void *volatile sink;

KEEP void leaf(void) {
    void *block = malloc(777);
    sink = block;
    free(block);
}

KEEP static void plain(void) {
    leaf();
    __asm__ volatile("");
}

static void on_signal(int number) {
    (void)number;
    leaf();
    __asm__ volatile("");
}

KEEP static void interrupted(void) { __asm__ volatile("nop\n\tint3\n\tnop"); }

static void catch_signal(int flags) {
    struct sigaction action = {.sa_handler = on_signal, .sa_flags = flags};
    sigaction(SIGTRAP, &action, NULL);
}

static char other_stack[65536];

static void *thread_main(void *argument) {
    leaf();
    return argument;
}

#ifdef __GLIBC__
static ucontext_t back, there;

static void coroutine_body(void) {
    leaf();
    __asm__ volatile("");
}

KEEP static void coroutine(void) {
    getcontext(&there);
    there.uc_stack.ss_sp = malloc(65536);
    there.uc_stack.ss_size = 65536;
    there.uc_link = &back;
    makecontext(&there, coroutine_body, 0);
    swapcontext(&back, &there);
}
#endif

KEEP static int recurse(int depth) {
    if (depth == 0) {
        leaf();
        return 1;
    }
    return recurse(depth - 1) + (sink != NULL);
}

KEEP static int large(int depth) {
    volatile char room[600 * 1024];
    room[0] = (char)depth;
    room[sizeof room - 1] = 1;
    if (depth == 0)
        leaf();
    return room[0] + (depth > 0 ? large(depth - 1) : 0);
}

/* push %rbp; mov %rsp, %rbp; call *%rdi; pop %rbp; ret */
static const unsigned char code[] = {0x55, 0x48, 0x89, 0xe5, 0xff, 0xd7, 0x5d, 0xc3};

KEEP static void generated(void) {
    void *page = mmap(NULL, 4096, PROT_READ | PROT_WRITE | PROT_EXEC,
                      MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    memcpy(page, code, sizeof code);
    void (*call)(void (*)(void));
    memcpy(&call, &page, sizeof call);
    /* As compilers at run time do for perf. */
    char path[64];
    snprintf(path, sizeof path, "/tmp/perf-%d.map", getpid());
    FILE *map = fopen(path, "w");
    if (map != NULL) {
        fprintf(map, "%lx %zx made_at_run_time\n", (unsigned long)page, sizeof code);
        fclose(map);
    }
    /* The mapping is told of; its place in the tables takes a moment. */
    usleep(1500000);
    call(leaf);
    __asm__ volatile("");
    unlink(path);
}

/* No word about its frame, and rbp is no frame pointer. */
__asm__(".text\n"
        ".type undescribed, @function\n"
        "undescribed:\n"
        "  push %rbp\n"
        "  push %rbx\n"
        "  push %rbx\n"
        "  mov $3, %ebp\n"
        "  call *%rdi\n"
        "  pop %rbx\n"
        "  pop %rbx\n"
        "  pop %rbp\n"
        "  ret\n"
        ".size undescribed, . - undescribed\n");
void undescribed(void (*call)(void));

static jmp_buf out;

KEEP __attribute__((noreturn)) static void leave(void) {
    leaf();
    longjmp(out, 1);
}

/* Ends in a call: its return address is the next function's. */
KEEP static void ends_in_call(void) {
    if (setjmp(out) == 0)
        leave();
}

KEEP static void plugin(const char *path) {
    void *library = dlopen(path, RTLD_NOW);
    if (library == NULL) {
        fprintf(stderr, "%s\n", dlerror());
        exit(1);
    }
    void (*call)(void (*)(void));
    *(void **)&call = dlsym(library, "plugin_call");
    usleep(300000);
    call(leaf);
    dlclose(library);
}

int main(int count, char **arguments) {
    const char *what = count > 1 ? arguments[1] : "plain";
    if (strcmp(what, "plain") == 0) {
        plain();
    } else if (strcmp(what, "signal") == 0) {
        catch_signal(0);
        interrupted();
    } else if (strcmp(what, "sigaltstack") == 0) {
        stack_t stack = {.ss_sp = other_stack, .ss_size = sizeof other_stack};
        sigaltstack(&stack, NULL);
        catch_signal(SA_ONSTACK);
        interrupted();
    } else if (strcmp(what, "thread") == 0) {
        pthread_t thread;
        pthread_create(&thread, NULL, thread_main, NULL);
        pthread_join(thread, NULL);
    } else if (strcmp(what, "recursion") == 0) {
        recurse(2000);
    } else if (strcmp(what, "large") == 0) {
        large(4);
    } else if (strcmp(what, "generated") == 0) {
        generated();
    } else if (strcmp(what, "undescribed") == 0) {
        undescribed(leaf);
    } else if (strcmp(what, "noreturn") == 0) {
        ends_in_call();
    } else if (strcmp(what, "plugin") == 0) {
        for (int n = 2; n < count; n++)
            plugin(arguments[n]);
#ifdef __GLIBC__
    } else if (strcmp(what, "coroutine") == 0) {
        coroutine();
#endif
    } else {
        return 2;
    }
    return 0;
}
