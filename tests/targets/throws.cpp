// Exceptions thrown through frames with destructors that allocate.
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

struct Guard {
    std::string name;
    explicit Guard(int n) : name(std::string(40, 'a') + std::to_string(n)) {}
    ~Guard() { std::string copy = name + name; asm volatile("" : : "r"(copy.data())); }
};

__attribute__((noinline)) static int sink(int depth) {
    Guard guard(depth);
    if (depth == 0)
        throw std::runtime_error(std::string(60, 'x'));
    return sink(depth - 1) + static_cast<int>(guard.name.size());
}

int main() {
    std::map<int, std::vector<std::unique_ptr<int>>> kept;
    for (int round = 0; round < 400; round++) {
        try {
            sink(round % 10);
        } catch (const std::exception &error) {
            kept[round % 7].push_back(std::make_unique<int>(round));
        }
    }
    return kept.size() == 7 ? 0 : 1;
}
