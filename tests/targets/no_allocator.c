/* A static program without a C library: there is nothing to probe in it. */
static long system_call(long number, long a, long b, long c)
{
        long result;
        __asm__ volatile("syscall"
                         : "=a"(result)
                         : "a"(number), "D"(a), "S"(b), "d"(c)
                         : "rcx", "r11", "memory");
        return result;
}

__attribute__((noreturn)) void _start(void)
{
        char byte;
        system_call(1, 1, (long)"ready\n", 6);
        while (system_call(0, 0, (long)&byte, 1) == 1)
                ;
        system_call(231, 0, 0, 0);
        __builtin_unreachable();
}
