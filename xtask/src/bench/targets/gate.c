/* Says `ready`, waits for a line on stdin, then becomes the command in its arguments: a tracer
 * can be put on the process before the command's first allocation. */
#include <unistd.h>

int main(int argc, char **argv) {
    char byte;
    if (argc < 2) return 2;
    if (write(1, "ready\n", 6) != 6) return 1;
    do {
        if (read(0, &byte, 1) != 1) return 1;
    } while (byte != '\n');
    execvp(argv[1], argv + 1);
    return 127;
}
