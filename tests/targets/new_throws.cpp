// operator new that throws, caught where it was called and further up, by several threads at
// once; and blocks made by the same calls in the same frames.
#include <new>
#include <thread>

#include "target.h"

static constexpr int threads = 3, rounds = 100;

// All by one instruction, so that only what was asked for tells them apart.
KEEP static void *make(size_t size, bool array, std::align_val_t alignment)
{
        void *block = static_cast<size_t>(alignment) > 16 ? operator new(size, alignment)
                      : array                             ? operator new[](size)
                                                          : operator new(size);
        ESCAPE(block);
        return block;
}

KEEP static void *after_a_throw(int round)
{
        void *block = make(48, round % 2, std::align_val_t(round % 3 == 0 ? 64 : 8));
        ESCAPE(block);
        return block;
}

KEEP static bool fail(int round)
{
        try {
                make(OPAQUE(1UL << 46), round % 2, std::align_val_t(round % 3 == 0 ? 64 : 8));
        } catch (const std::bad_alloc &) {
                return true;
        }
        return false;
}

static long thrown[threads], kept[threads];

static void work(int thread)
{
        for (int round = 0; round < rounds; round++) {
                thrown[thread] += fail(round);
                kept[thread] += after_a_throw(round) != nullptr;
        }
}

// Threads allocate where they begin and end.
static volatile int go, at_work = threads;

static void run(int thread)
{
        // The first exception of a thread makes its globals.
        fail(1);
        thrown[thread] = 0;
        __atomic_sub_fetch(&at_work, 1, __ATOMIC_SEQ_CST);
        while (__atomic_load_n(&go, __ATOMIC_SEQ_CST) == 0)
                usleep(1000);
        work(thread);
        __atomic_add_fetch(&at_work, 1, __ATOMIC_SEQ_CST);
        while (__atomic_load_n(&go, __ATOMIC_SEQ_CST) < 2)
                usleep(1000);
}

int main()
{
        std::thread all[threads];
        for (int i = 0; i < threads; i++)
                all[i] = std::thread(run, i);
        while (__atomic_load_n(&at_work, __ATOMIC_SEQ_CST) > 0)
                usleep(1000);
        wait_for_go();
        __atomic_store_n(&go, 1, __ATOMIC_SEQ_CST);
        while (__atomic_load_n(&at_work, __ATOMIC_SEQ_CST) < threads)
                usleep(1000);
        say_value("thrown", thrown[0] + thrown[1] + thrown[2]);
        say_value("kept", kept[0] + kept[1] + kept[2]);
        wait_for_end();
        _exit(0);
}
