/* Calls back, with a frame of some size. */
#include <string.h>

void plugin_call(void (*call)(void)) {
#ifndef ROOM
#define ROOM 300
#endif
    volatile char room[ROOM];
    room[0] = 1;
    call();
    room[ROOM - 1] = room[0];
}
