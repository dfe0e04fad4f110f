// What a kernel is given: the parameters and a table of problems, all by value, so that a captured graph holds them.
#pragma once

#include <limits.h>

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
constexpr int kMaxStepProblems = 12, kMaxRankOneProblems = 36;
#else
constexpr int kMaxStepProblems = 100, kMaxRankOneProblems = 300;
#endif
using OpTable = Table<1>;
using StepTable = Table<kMaxStepProblems>;
static_assert(sizeof(StepTable) <= 32764);

struct RankOneTable {
    RankOneParameters parameters;
    int problem_count;
    int first_unit[kMaxRankOneProblems + 1];
    RankOneProblem problems[kMaxRankOneProblems];
};
static_assert(sizeof(RankOneTable) <= 32764);

// The problem of thread block `unit`.
template <class AnyTable>
MBF_HOST_DEVICE inline int problem_of(const AnyTable& table, int unit) {
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

// Takes the first problems that fit, a thread block to every `per_unit` of a problem's count; returns how many, and
// none where a single one has too many for a grid.
template <class AnyTable, class Problem>
int fill(AnyTable& table, int64_t per_unit, const Problem* problems, int count) {
    constexpr int kMaxProblems = sizeof(table.problems) / sizeof(Problem);
    table.problem_count = 0;
    int64_t units = 0;
    while (table.problem_count < kMaxProblems && table.problem_count < count) {
        const Problem& problem = problems[table.problem_count];
        const int64_t more = (problem.count + per_unit - 1) / per_unit;
        if (units + more > INT_MAX) break;
        table.first_unit[table.problem_count] = static_cast<int>(units);
        table.problems[table.problem_count++] = problem;
        units += more;
    }
    table.first_unit[table.problem_count] = static_cast<int>(units);
    return table.problem_count;
}

}  // namespace mbf
