// Allocations from a method, from operator new, and from an inlined function.
#include "target.h"

namespace leak {

struct Holder {
        void *block = nullptr;
        KEEP void grow(int size);
        KEEP void make(int count);
};

void Holder::grow(int size)
{
        block = malloc(static_cast<size_t>(size));
        ESCAPE(block);
}

void Holder::make(int count)
{
        block = new char[static_cast<size_t>(count)];
        ESCAPE(block);
}

inline __attribute__((always_inline)) void *inlined_helper(size_t size)
{
        void *block = malloc(size);
        ESCAPE(block);
        return block;
}

KEEP void around_inlined()
{
        void *block = inlined_helper(333);
        ESCAPE(block);
}

} // namespace leak

int main()
{
        leak::Holder holder;
        wait_for_go();
        for (int i = 0; i < 40; i++)
                holder.grow(1234);
        for (int i = 0; i < 30; i++)
                holder.make(4321);
        for (int i = 0; i < 20; i++)
                leak::around_inlined();
        wait_for_end();
        return 0;
}
