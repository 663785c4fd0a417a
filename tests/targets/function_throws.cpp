// A pool whose function throws, caught where it was called and further up, by several threads
// at once; and blocks made by the same calls in the same frames.
#include <new>
#include <thread>

#include "target.h"

static constexpr int threads = 3, rounds = 100;

struct Pool {
        KEEP void *take(size_t size);
        KEEP void give(void *block);
};

void *Pool::take(size_t size)
{
        ESCAPE(this);
        if (size > 1UL << 40)
                throw std::bad_alloc();
        void *block = malloc(size);
        if (block == nullptr)
                throw std::bad_alloc();
        return block;
}

void Pool::give(void *block)
{
        ESCAPE(this);
        free(block);
        __asm__ volatile("");
}

static Pool pool;

KEEP static void *make(size_t size)
{
        void *block = pool.take(size);
        ESCAPE(block);
        return block;
}

KEEP static bool fail(int round)
{
        try {
                if (round % 2)
                        pool.take(OPAQUE(1UL << 46));
                else
                        make(OPAQUE(1UL << 46));
        } catch (const std::bad_alloc &) {
                return true;
        }
        return false;
}

KEEP static void *after_a_throw(int round)
{
        void *block = make(48);
        if (round % 4 == 0) {
                pool.give(block);
                block = make(48);
        }
        return block;
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
