// Built without ThreadSanitizer's instrumentation, with MBF_FIND_RACES defined instead: what the threads of a block
// share here is not the kernel's affair.
#include "fibers.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>

#include <algorithm>
#include <memory>
#include <mutex>
#include <numeric>
#include <random>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#if defined(MBF_FIND_RACES)
#include <sanitizer/tsan_interface.h>
#endif

namespace mbf {
alignas(16) unsigned char shared_memory[emulator::kSharedBytes];  // as staging.cuh declares it
}

namespace emulator {
namespace {

constexpr size_t kStackBytes = 256 * 1024;
constexpr int kWarp = 32;

struct Copy {
    void* to;
    const void* from;
    size_t bytes;
};

enum class State { kReady, kAtBlockBarrier, kAtWarpBarrier, kDone };

#define MBF_JUMPS __attribute__((noinline, no_sanitize("address", "undefined")))

// A stack and a place on it. Switching jumps; a context is only made to get onto a new stack. The compiler's own jumps:
// those of the C library refuse to change stacks where _FORTIFY_SOURCE is defined, and make AddressSanitizer forget
// what it knows of the stack, slowly.
class Context {
public:
    // The switch from `from` to `to`, told to the sanitizers; `for_good`: nobody will switch back.
    MBF_JUMPS static void swap(Context& from, Context& to, [[maybe_unused]] bool for_good = false) {
#if defined(__SANITIZE_ADDRESS__)
        __sanitizer_start_switch_fiber(for_good ? nullptr : &from.fake_stack_, to.bottom_, to.size_);
#endif
        if (__builtin_setjmp(from.place_) == 0) {
#if defined(MBF_FIND_RACES)
            __tsan_switch_to_fiber(to.tsan_, __tsan_switch_to_fiber_no_sync);
#endif
            to.enter();
        }
        from.arrived();
    }

    Context() = default;
    Context(const Context&) = delete;
    Context& operator=(const Context&) = delete;

protected:
    void arrived() {
#if defined(__SANITIZE_ADDRESS__)
        const void* bottom;
        size_t size;
        __sanitizer_finish_switch_fiber(fake_stack_, &bottom, &size);
#endif
    }

    void* place_[5];
    ucontext_t start_;
    bool started_ = true;
    const void* bottom_ = nullptr;
    size_t size_ = 0;
#if defined(__SANITIZE_ADDRESS__)
    void* fake_stack_ = nullptr;
#endif
#if defined(MBF_FIND_RACES)
    void* tsan_ = nullptr;
#endif

private:
    MBF_JUMPS void enter() {
        if (started_) __builtin_longjmp(place_, 1);
        started_ = true;
        setcontext(&start_);
        abort();
    }
};

// Whom fibers hand over to.
class Scheduler : public Context {
public:
    void adopt_caller() {
#if defined(MBF_FIND_RACES)
        tsan_ = __tsan_get_current_fiber();
#endif
    }
    void learn_stack() {
#if defined(__SANITIZE_ADDRESS__)
        __sanitizer_finish_switch_fiber(nullptr, &bottom_, &size_);
#endif
    }
};

Scheduler scheduler;

// What orders threads in ThreadSanitizer's eyes: everything before a signal comes before whatever follows its wait.
void signal(char* token) {
#if defined(MBF_FIND_RACES)
    __tsan_release(token);
#else
    (void)token;
#endif
}
void await(char* token) {
#if defined(MBF_FIND_RACES)
    __tsan_acquire(token);
#else
    (void)token;
#endif
}

class Fiber : public Context {
public:
    Fiber() : stack_(kStackBytes) {
#if defined(MBF_FIND_RACES)
        tsan_ = __tsan_create_fiber(0);
#endif
    }
    ~Fiber() {
#if defined(MBF_FIND_RACES)
        __tsan_destroy_fiber(tsan_);
#endif
    }

    void prepare(int thread) {
        index = thread;
        copies.clear();
        state = State::kReady;
        block_arrivals = warp_arrivals = 0;
        bottom_ = stack_.data();
        size_ = stack_.size();
        started_ = false;
        getcontext(&start_);
        start_.uc_stack.ss_sp = stack_.data();
        start_.uc_stack.ss_size = stack_.size();
        start_.uc_link = nullptr;
        makecontext(&start_, &Fiber::main, 0);
    }

    int index;
    std::vector<Copy> copies;  // started, not finished
    State state;
    int block_arrivals, warp_arrivals;  // barriers reached so far, either kind for itself: warps differ in the other

private:
    MBF_JUMPS static void main();  // never returns: no redzones of its own to leave behind

    std::vector<char> stack_;
};

std::vector<std::unique_ptr<Fiber>> fibers;
Fiber* running = nullptr;
int current_block, threads_per_block;
const std::function<void()>* body = nullptr;
unsigned schedule = 0;
std::mt19937 shuffler;
char block_started, block_ended;       // tokens
char barriers[2];                      // of a barrier and the next one, for blocks
char warp_barriers[2 * 1024 / kWarp];  // likewise, for each warp

void Fiber::main() {
    scheduler.learn_stack();
    await(&block_started);
    (*body)();
    signal(&block_ended);
    running->state = State::kDone;
    Context::swap(*running, scheduler, true);
}

// Hands over until everybody is at the barrier.
void wait(State barrier, char* tokens, int& arrivals) {
    Fiber& self = *running;
    char* token = tokens + arrivals++ % 2;
    self.state = barrier;
    signal(token);
    Context::swap(self, scheduler);
    await(token);
}

std::vector<int> order(int count) {
    std::vector<int> indices(count);
    std::iota(indices.begin(), indices.end(), 0);
    if (schedule == 1) std::reverse(indices.begin(), indices.end());
    if (schedule > 1) std::shuffle(indices.begin(), indices.end(), shuffler);
    return indices;
}

// Lets go whoever has been waiting for threads that are now all there; whether it was anybody.
bool release() {
    const auto waits = [](int i, State state) { return fibers[i]->state == state || fibers[i]->state == State::kDone; };
    const int count = threads_per_block;
    bool all = true, any = false;
    for (int i = 0; i < count; ++i) all &= waits(i, State::kAtBlockBarrier);
    for (int i = 0; i < count; ++i) {
        Fiber& fiber = *fibers[i];
        bool together = all && fiber.state == State::kAtBlockBarrier;
        if (fiber.state == State::kAtWarpBarrier) {
            together = true;
            const int first = i / kWarp * kWarp;
            for (int j = first; j < std::min(first + kWarp, count); ++j)
                together &= waits(j, State::kAtWarpBarrier) || fibers[j]->state == State::kReady;
        }
        if (!together) continue;
        fiber.state = State::kReady;
        any = true;
    }
    return any;
}

void run_block(int threads) {
    for (int i = 0; i < threads; ++i) fibers[i]->prepare(i);
    signal(&block_started);
    for (;;) {
        for (int i : order(threads)) {
            if (fibers[i]->state != State::kReady) continue;
            running = fibers[i].get();
            Context::swap(scheduler, *running);
        }
        const auto done = [](const auto& fiber) { return fiber->state == State::kDone; };
        if (std::all_of(fibers.begin(), fibers.begin() + threads, done)) break;
        if (!release()) {
            fprintf(stderr, "emulator: deadlock: block %d waits at a barrier that not all its threads reach\n",
                    current_block);
            abort();
        }
    }
    await(&block_ended);
}

void prepare_shared_memory(size_t bytes) {
#if defined(__SANITIZE_ADDRESS__)
    __asan_unpoison_memory_region(mbf::shared_memory, kSharedBytes);
    __asan_poison_memory_region(mbf::shared_memory + bytes, kSharedBytes - bytes);
#endif
    memset(mbf::shared_memory, 0xff, bytes);
}

}  // namespace

int thread_index() {
    return running->index;
}
int block_index() {
    return current_block;
}
int block_threads() {
    return threads_per_block;
}

void start_copy(void* to, const void* from, size_t bytes) {
    running->copies.push_back({to, from, bytes});
}
void finish_copies() {
    for (const Copy& copy : running->copies) memcpy(copy.to, copy.from, copy.bytes);
    running->copies.clear();
}

void wait_for_block() {
    wait(State::kAtBlockBarrier, barriers, running->block_arrivals);
}

void wait_for_warp() {
    wait(State::kAtWarpBarrier, warp_barriers + 2 * (running->index / kWarp), running->warp_arrivals);
}

void set_schedule(unsigned seed) {
    schedule = seed;
    shuffler.seed(seed);
}

void run_grid(int blocks, int threads, size_t shared_bytes, const std::function<void()>& kernel) {
    static std::mutex one_at_a_time;
    const std::lock_guard<std::mutex> guard(one_at_a_time);
    while (static_cast<int>(fibers.size()) < threads) fibers.push_back(std::make_unique<Fiber>());
    scheduler.adopt_caller();
    body = &kernel;
    threads_per_block = threads;
    for (int block : order(blocks)) {
        current_block = block;
        prepare_shared_memory(shared_bytes);
        run_block(threads);
    }
}

}  // namespace emulator
