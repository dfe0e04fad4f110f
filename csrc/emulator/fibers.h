// Runs a grid: the threads of a thread block are fibers that hand over at barriers.
//
// The order in which threads run between two barriers is a schedule; a kernel whose result depends on it lacks a
// barrier. Under ThreadSanitizer every fiber is a thread of its own and only barriers order them, so a missing one is
// reported as a race, whatever the schedule. Shared memory starts as NaN, and AddressSanitizer knows where it ends.
#pragma once

#include <stddef.h>

#include <functional>

namespace emulator {

constexpr size_t kSharedBytes = 227 * 1024;  // of compute capability 9.0

// Of the thread that asks.
int thread_index();
int block_index();
int block_threads();

// A copy that takes place when its thread finishes its copies.
void start_copy(void* to, const void* from, size_t bytes);
void finish_copies();

// All threads of the block, or those of the warp, have come here.
void wait_for_block();
void wait_for_warp();

// Runs `body` for every thread of every block. One grid at a time. Aborts where a barrier is not reached by all whom it
// waits for.
void run_grid(int blocks, int threads, size_t shared_bytes, const std::function<void()>& body);

// 0: threads run in order between barriers; 1: in reverse; any other: shuffled, differently at each barrier. Blocks
// likewise.
void set_schedule(unsigned seed);

}  // namespace emulator
