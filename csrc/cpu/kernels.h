// The CPU kernels as the dispatcher sees them: one entry point per instruction set and scalar type.
#pragma once

#include <stddef.h>

#include "../layout.h"
#include "../types.h"

namespace mbf::cpu {

// What one thread works in: two triangles and six vectors of packs, each of two registers for the compiled sizes.
static inline size_t scratch_bytes(int n) {
    constexpr size_t kRegisterBytes = 64;  // the widest
    return kRegisterBytes * (is_tiled(n) ? 2 : 1) * (2 * triangle_size(n) + 6 * n);
}

// What the step of shared matrices works in, in vectors of doubles: three matrices in double, two more, a chunk of rows
// and a tile of four kinds of rows in the scalar type.
constexpr int kSharedRows = 64;  // mini-blocks that a statistic takes at a time

static inline size_t shared_scratch_bytes(int n) {
    const size_t row = sizeof(double) * ((n + 15) / 16 * 16);
    return row * (5 * (n + 8) + kSharedRows + 1 + 4 * 8);
}

// Runs `op` on blocks [first, last) of `problem`; `first` is a multiple of 32. Scratch: scratch_bytes(n),
// 64-byte aligned.
using Kernel = void (*)(Op op, const Problem& problem, const Parameters& parameters, int n, int64_t first, int64_t last,
                        void* scratch);

// The whole step of one shared matrix of `problem`. Scratch: shared_scratch_bytes(n), 64-byte aligned.
using SharedKernel = void (*)(const SharedProblem& problem, const MomentParameters& parameters, int n, int64_t matrix,
                              void* scratch);

// The step of elements [first, last) of a tensor without blocks.
using DiagonalKernel = void (*)(const DiagonalProblem& problem, const MomentParameters& parameters, int64_t first,
                                int64_t last);

// The step of elements [first, last) of a tensor whose F has rank one. Scratch: rank_one_scratch_bytes(problem).
using RankOneKernel = void (*)(const RankOneProblem& problem, const RankOneParameters& parameters, int64_t first,
                               int64_t last, void* scratch);

// h in the order of memory.
static inline size_t rank_one_scratch_bytes(const RankOneProblem& problem) {
    return is_permuted(problem) ? sizeof(double) * problem.columns : 0;
}

#define MBF_DECLARE_KERNELS(isa)                                                                           \
    void run_##isa##_float(Op, const Problem&, const Parameters&, int, int64_t, int64_t, void*);           \
    void run_##isa##_double(Op, const Problem&, const Parameters&, int, int64_t, int64_t, void*);          \
    void shared_##isa##_float(const SharedProblem&, const MomentParameters&, int, int64_t, void*);         \
    void shared_##isa##_double(const SharedProblem&, const MomentParameters&, int, int64_t, void*);        \
    void diagonal_##isa##_float(const DiagonalProblem&, const MomentParameters&, int64_t, int64_t);        \
    void diagonal_##isa##_double(const DiagonalProblem&, const MomentParameters&, int64_t, int64_t);       \
    void rank_one_##isa##_float(const RankOneProblem&, const RankOneParameters&, int64_t, int64_t, void*); \
    void rank_one_##isa##_double(const RankOneProblem&, const RankOneParameters&, int64_t, int64_t, void*);
MBF_DECLARE_KERNELS(baseline)
MBF_DECLARE_KERNELS(avx2)
MBF_DECLARE_KERNELS(avx512)
#undef MBF_DECLARE_KERNELS

}  // namespace mbf::cpu
