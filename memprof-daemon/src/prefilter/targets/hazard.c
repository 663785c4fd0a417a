/* Processes that are hard to stop or to make calls in; which, the argument says. Each
 * writes "ready" and the address of a counter of what it does, goes on until its standard
 * input ends, and exits 0 if nothing was amiss. */
#define _GNU_SOURCE
#include <asm/prctl.h>
#include <errno.h>
#include <immintrin.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/poll.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

static volatile uint64_t counter;
static void ready(void) { printf("ready %lx\n", (unsigned long)&counter); fflush(stdout); }
static int is_over(void) {
    struct pollfd input = {0, POLLIN, 0};
    return poll(&input, 1, 0) == 1;
}
static void wait_for_end(void) { char byte; while (read(0, &byte, 1) < 0 && errno == EINTR) {} }
static void *sleeper(void *unused) { for (;;) usleep(20000); return unused; }
static void *waiter(void *lock) { pthread_mutex_lock(lock); return NULL; }
static void *spinner(void *unused) { for (;;) counter++; return unused; }
/* Two loops of the same instructions, each with a counter, and where they are. */
static volatile uint64_t twins[4];
static void *twin(void *unused) {
    __asm__ volatile(
        "lea 1f(%%rip), %%rax\n mov %%rax, %2\n lea 2f(%%rip), %%rax\n mov %%rax, %3\n"
        "1: incq %0\n nop\n jmp 1b\n 2: incq %1\n nop\n jmp 2b\n"
        : "+m"(twins[0]), "+m"(twins[1]), "=m"(twins[2]), "=m"(twins[3]) : : "rax", "memory");
    return unused;
}

/* All registers that a program can see the contents of, and the red zone. */
struct state { uint8_t vectors[16][32]; uint64_t general[8], red_zone[16]; uint32_t mxcsr; uint16_t x87; } __attribute__((aligned(32)));
static struct state in, out;
__attribute__((noinline, target("avx"))) static void turn(uint64_t rounds) {
    __asm__ volatile(
        "fldcw %[x87_in]\n ldmxcsr %[mxcsr_in]\n"
        ".irp n,0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15\n vmovdqa 32*\\n(%[in]), %%ymm\\n\n .endr\n"
        "mov 512(%[in]), %%r8\n mov 520(%[in]), %%r9\n mov 528(%[in]), %%r10\n mov 536(%[in]), %%r11\n"
        "mov 544(%[in]), %%r12\n mov 552(%[in]), %%r13\n mov 560(%[in]), %%r14\n mov 568(%[in]), %%r15\n"
        /* Nothing was pushed: the 128 bytes below are this function's. */
        ".irp n,0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15\n mov 576+8*\\n(%[in]), %%rax\n mov %%rax, -128+8*\\n(%%rsp)\n .endr\n"
        "stc\n"
        "1: lea -1(%[rounds]), %[rounds]\n pause\n jrcxz 2f\n jmp 1b\n"
        "2: jc 3f\n ud2\n 3:\n"
        ".irp n,0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15\n mov -128+8*\\n(%%rsp), %%rax\n mov %%rax, 576+8*\\n(%[out])\n .endr\n"
        "mov %%r8, 512(%[out])\n mov %%r9, 520(%[out])\n mov %%r10, 528(%[out])\n mov %%r11, 536(%[out])\n"
        "mov %%r12, 544(%[out])\n mov %%r13, 552(%[out])\n mov %%r14, 560(%[out])\n mov %%r15, 568(%[out])\n"
        ".irp n,0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15\n vmovdqa %%ymm\\n, 32*\\n(%[out])\n .endr\n"
        "stmxcsr %[mxcsr_out]\n fnstcw %[x87_out]\n"
        : [rounds] "+c"(rounds), [mxcsr_out] "=m"(out.mxcsr), [x87_out] "=m"(out.x87)
        : [in] "S"(&in), [out] "D"(&out), [mxcsr_in] "m"(in.mxcsr), [x87_in] "m"(in.x87)
        : "rax", "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15", "memory", "cc",
          "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10",
          "xmm11", "xmm12", "xmm13", "xmm14", "xmm15");
}
static int compute(void) {
    static char memory[65536];
    stack_t alternate = {.ss_sp = memory, .ss_size = sizeof memory}, seen;
    sigset_t mask, seen_mask;
    sigaltstack(&alternate, NULL);
    sigemptyset(&mask); sigaddset(&mask, SIGUSR2); sigaddset(&mask, SIGRTMIN + 3);
    sigprocmask(SIG_SETMASK, &mask, NULL);
    ready();
    while (!is_over()) {
        uint8_t *bytes = (uint8_t *)&in;
        for (size_t i = 0; i < sizeof in; i++) bytes[i] = (uint8_t)rand();
        in.mxcsr = 0x1f80 | (counter & 3) << 13;
        in.x87 = 0x037f | (counter & 3) << 10;
        memset(&out, 0, sizeof out);
        turn(20000);
        if (memcmp(&in, &out, offsetof(struct state, x87)) || in.x87 != out.x87) {
            for (size_t i = 0; i < sizeof in; i++) if (bytes[i] != ((uint8_t *)&out)[i]) fprintf(stderr, "byte %zu of the state\n", i);
            return 1;
        }
        counter++;
        sigaltstack(NULL, &seen);
        sigprocmask(SIG_SETMASK, NULL, &seen_mask);
        if (seen.ss_sp != memory || seen.ss_flags != 0 || seen.ss_size != sizeof memory) return 2;
        if (memcmp(&mask, &seen_mask, 8)) return 3;
    }
    return counter ? 0 : 4;
}

static volatile int expected, wrong;
static void on_signal(int signal, siginfo_t *info, void *context) {
    (void)signal; (void)context;
    wrong |= info->si_value.sival_int != expected++;
    counter++;
}
static int signals(void) {
    struct sigaction action = {.sa_sigaction = on_signal, .sa_flags = SA_SIGINFO | SA_RESTART};
    sigaction(SIGRTMIN, &action, NULL);
    ready();
    wait_for_end();
    if (wrong || expected != 1000) fprintf(stderr, "%d signals, wrong: %d\n", expected, wrong);
    return wrong || expected != 1000;
}

static void *short_lived(void *unused) { counter++; return unused; }
static void *spawner(void *unused) {
    for (;;) { pthread_t thread; if (!pthread_create(&thread, NULL, short_lived, NULL)) pthread_join(thread, NULL); }
    return unused;
}
static int confined(int nr) {
    struct sock_filter filter[] = {
        BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_mmap, 1, 0),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, (unsigned)nr, 0, 1),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_KILL_PROCESS),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
    };
    struct sock_fprog program = {sizeof filter / sizeof *filter, filter};
    ready();
    if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) || prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program)) return 1;
    while (!is_over()) counter++;
    return 0;
}
/* The whole program anew, from a thread that is not its first. */
static void *execs(void *unused) {
    usleep(3000);
    execl("/proc/self/exe", "memprof-hazard", "exec", "1", NULL);
    return unused;
}
/* Ends with the other, and holds none of its files open. */
static int in_clone(void *unused) {
    (void)unused;
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    close(1); close(2);
    for (;;) pause();
    return 0;
}
__attribute__((noreturn)) static int no_thread_pointer(void *unused) {
    (void)unused;
    syscall(SYS_arch_prctl, ARCH_SET_FS, 0L);
    counter = 1;
    for (;;) { long result; __asm__ volatile("syscall" : "=a"(result) : "0"(SYS_pause) : "rcx", "r11", "memory"); }
}
static int uring(void) {
    struct { uint32_t entries, cq, flags, cpu, idle, rest[25]; } parameters = {.flags = 2 /* SQPOLL */, .idle = 10000};
    if (syscall(SYS_io_uring_setup, 4, &parameters) < 0) { perror("io_uring_setup"); return 1; }
    ready();
    wait_for_end();
    return 0;
}

int main(int argc, char **argv) {
    if (argc < 2) return 91;
    const char *kind = argv[1];
    int threads = argc > 2 ? atoi(argv[2]) : 0;
    static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
    pthread_t thread;
    static char stack[65536];
#define IS(name) !strcmp(kind, name)
    alarm(120);
    if (IS("compute")) return compute();
    if (IS("signals")) return signals();
    if (IS("confined")) return confined(SYS_memfd_create);
    if (IS("uring")) return uring();
    if (IS("exec")) {
        if (!threads) ready();
        if (is_over()) return 0;
        for (int i = 0; i < 3; i++) pthread_create(&thread, NULL, sleeper, NULL);
        pthread_create(&thread, NULL, execs, NULL);
        for (;;) pause();
    }
    if (IS("vfork") || IS("vfork-soon")) {
        ready();
        while (IS("vfork-soon") && !counter) {} /* Who stops it says when. */
        if (vfork() == 0) { struct timespec t = {IS("vfork") ? 2 : 0, 500000000}; nanosleep(&t, NULL); _exit(0); }
        wait_for_end();
        return 0;
    }
    if (IS("clone-vm") && clone(in_clone, stack + sizeof stack, CLONE_VM | SIGCHLD, NULL) < 0) return 92;
    if (IS("no-thread-pointer")
        && clone(no_thread_pointer, stack + sizeof stack, CLONE_VM | CLONE_SIGHAND | CLONE_THREAD, NULL) < 0) return 92;
    while (IS("no-thread-pointer") && !counter) sched_yield();
    if (IS("coroutine")) { /* A stack that is not the thread's own. */
        ready();
        __asm__ volatile("mov %0, %%rsp\n 1: pause\n jmp 1b" : : "r"(stack + sizeof stack - 64));
    }
    if (IS("twins")) {
        counter = (uint64_t)twins;
        if (pthread_create(&thread, NULL, twin, NULL)) return 93;
        while (!twins[0]) sched_yield();
    }
    if (IS("leader-gone")) { pthread_create(&thread, NULL, spinner, NULL); ready(); pthread_exit(NULL); }
    pthread_mutex_lock(&lock);
    for (int i = 0; i < threads; i++) {
        void *(*body)(void *) = IS("spawners") ? spawner : IS("spinners") ? spinner : i % 2 ? sleeper : waiter;
        if (pthread_create(&thread, NULL, body, &lock)) return 93;
    }
    ready();
    wait_for_end();
    return 0;
}
