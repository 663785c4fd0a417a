/* brief MILLISECONDS: lives that long, allocating all the while. */
#include <time.h>

#include "target.h"

int main(int argc, char **argv)
{
        struct timespec now, end;
        clock_gettime(CLOCK_MONOTONIC, &end);
        unsigned long wanted = number(argc, argv, 1, 0);
        end.tv_sec += wanted / 1000;
        end.tv_nsec += (long)(wanted % 1000) * 1000000;
        if (end.tv_nsec >= 1000000000)
                end.tv_sec++, end.tv_nsec -= 1000000000;
        do {
                void *block = malloc(100);
                ESCAPE(block);
                free(block);
                clock_gettime(CLOCK_MONOTONIC, &now);
        } while (now.tv_sec < end.tv_sec ||
                 (now.tv_sec == end.tv_sec && now.tv_nsec < end.tv_nsec));
        return 0;
}
