// Splits a range over threads: OpenMP where it was found (then the pool is torch's own, when torch is
// loaded first), plain threads elsewhere.
#pragma once

#include <stdint.h>

#ifdef _OPENMP
#include <omp.h>
#else
#include <thread>
#include <vector>
#endif

namespace mbf::cpu {

// Calls body(begin, end) on at most `threads` threads with consecutive parts of [0, total).
template <class Body>
void parallel_for(int64_t total, int threads, const Body& body) {
    if (threads <= 1) return body(int64_t{0}, total);
    const auto part = [&](int i, int parts) { body(total * i / parts, total * (i + 1) / parts); };
#ifdef _OPENMP
#pragma omp parallel num_threads(threads)
    part(omp_get_thread_num(), omp_get_num_threads());
#else
    std::vector<std::thread> workers;
    for (int i = 1; i < threads; ++i) workers.emplace_back(part, i, threads);
    part(0, threads);
    for (std::thread& worker : workers) worker.join();
#endif
}

}  // namespace mbf::cpu
