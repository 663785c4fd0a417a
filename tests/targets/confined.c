/* confined COUNT SIZE: confines itself by a seccomp filter that knows the system
 * calls it makes and kills it for any other, then allocates COUNT blocks of SIZE
 * bytes and frees all but one. */
#include <linux/audit.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <sys/prctl.h>
#include <sys/syscall.h>

#include "target.h"

#define ALLOW(number)                                                          \
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, (number), 0, 1),                   \
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW)

static void confine(void)
{
        struct sock_filter filter[] = {
                BPF_STMT(BPF_LD | BPF_W | BPF_ABS, 0),
                ALLOW(SYS_read),
                ALLOW(SYS_write),
                ALLOW(SYS_brk),
                ALLOW(SYS_mmap),
                ALLOW(SYS_munmap),
                ALLOW(SYS_getrandom),
                ALLOW(SYS_restart_syscall),
                ALLOW(SYS_exit_group),
                BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_KILL_PROCESS),
        };
        struct sock_fprog program = {
                .len = sizeof filter / sizeof *filter,
                .filter = filter,
        };
        check(prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0, "no new privileges");
        check(prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program) == 0, "filter");
}

KEEP void *confined_alloc(size_t size)
{
        void *block = malloc(size);
        ESCAPE(block);
        return block;
}

int main(int argc, char **argv)
{
        unsigned long count = number(argc, argv, 1, 10);
        unsigned long size = number(argc, argv, 2, 100);
        confine();
        wait_for_go();
        for (unsigned long i = 0; i < count; i++) {
                void *block = confined_alloc(size);
                if (i != 0)
                        free(block);
        }
        wait_for_end();
        return 0;
}
