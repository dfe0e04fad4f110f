// What a kernel is given: the parameters and a table of problems, all by value, so that a captured graph holds them.
#pragma once

#include "../types.h"

namespace mbf {

template <int kMaxProblems>
struct Table {
    Parameters parameters;
    int n;
    int problem_count;
    int first_unit[kMaxProblems + 1];  // thread blocks before each problem's own; the last one: all of them
    Problem problems[kMaxProblems];
};

// A kernel takes 4 KB of parameters, 32,764 bytes since CUDA 12.1.
#if defined(CUDART_VERSION) && CUDART_VERSION < 12010
constexpr int kMaxStepProblems = 12;
#else
constexpr int kMaxStepProblems = 100;
#endif
using OpTable = Table<1>;
using StepTable = Table<kMaxStepProblems>;
static_assert(sizeof(StepTable) <= 32764);

// The problem of thread block `unit`.
template <int kMaxProblems>
MBF_HOST_DEVICE inline int problem_of(const Table<kMaxProblems>& table, int unit) {
    int first = 0, last = table.problem_count;
    while (last - first > 1) {
        const int middle = (first + last) / 2;
        if (table.first_unit[middle] <= unit)
            first = middle;
        else
            last = middle;
    }
    return first;
}

}  // namespace mbf
