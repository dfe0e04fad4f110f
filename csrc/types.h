// The wall between Python and the kernels: plain structs of pointers, counts, strides and parameters.
#pragma once

#include <stdint.h>

#include "host_device.h"

namespace mbf {

enum class DType : int { kFloat32 = 0, kFloat64 = 1 };

enum class Op : int { kAccumulate = 0, kFactor = 1, kSolve = 2, kFused = 3, kStep = 4 };

// How a GPU maps a block to threads: one thread each, a group of lanes of a warp, a whole thread block.
enum class Mapping : int { kAuto = 0, kThread = 1, kGroup = 2, kBlock = 3 };

// One level of a mini-block's address: index i lies at (i / inner_count) * outer + (i % inner_count) * inner.
struct Strides {
    int64_t inner_count, outer, inner;  // strides in elements, not bytes
};

MBF_HOST_DEVICE static inline int64_t offset(const Strides& s, int64_t i) {
    return i / s.inner_count * s.outer + i % s.inner_count * s.inner;
}

// B blocks of n scalars inside a tensor, read and written where they are: element k of block b lies at
// base + offset(block, b) + offset(element, k). Contiguous, channels_last, column and grid views all fit.
struct BlockView {
    void* base;
    Strides block, element;
};

// A number: of the host, or one that the device holds and reads when the kernel runs, so that a captured graph
// follows its changes. The CPU kernels take `value` alone.
struct Scalar {
    double value;
    const void* device;  // null: `value` counts
    DType dtype;         // of what `device` points to
};

// One tensor of a launch. Pointers that an op does not use are null.
struct Problem {
    int64_t count;                          // B
    void* fisher;                           // F, in the storage of layout.h
    void* factor;                           // L, likewise
    int32_t* info;                          // [B], LAPACK meaning; null where the CPU shall not tell
    int64_t* skipped;                       // incremented by the number of bad blocks
    Scalar momentum_weight, fisher_weight;  // 1 - mu^t and 1 - beta^t: divided by, they undo the zero start
    BlockView grad;                         // g
    BlockView rhs;                          // right-hand side of a solve; the momentum M of a step
    BlockView out;                          // solution x; the weights W of a step
};

// What all tensors of a launch share.
struct Parameters {
    Scalar lr, damping;
    double momentum, decay, weight_decay, eps;
    bool relative;                   // damping is a multiple of trace(F)/n
    bool graft, nesterov, maximize;  // the forms of a step
    bool update;                     // F <- decay F + (1-decay) g g^T before a step uses it
    bool refactor;                   // a step factors F; otherwise `factor` holds L
    int64_t rhs_count;               // solve: right-hand sides per block, contiguous
};

// Mini-blocks that share averaged matrices: element k of sample s of matrix r lies at
// base + r * matrix + offset(sample, s) + offset(element, k). Where `joined` there is one matrix, and its last element
// lies at last + s * last_sample instead: the bias that joins a weight. Without samples either may have no address.
struct SharedView {
    void* base;
    int64_t matrix;
    Strides sample, element;
    void* last;
    int64_t last_sample;
    bool joined;
};

// One tensor of them.
struct SharedProblem {
    int64_t count, samples;                 // R matrices, S mini-blocks each
    void* fisher;                           // F, [R] in the storage of layout.h
    void* factor;                           // L, likewise, or null
    int32_t* info;                          // [R], LAPACK meaning, or null
    int64_t* skipped;                       // incremented by the number of bad mini-blocks, or null
    double momentum_weight, square_weight;  // 1 - mu^t and 1 - beta_2^t
    SharedView grad, momentum, square, param;
};

// One tensor without blocks: `count` elements next to each other.
struct DiagonalProblem {
    int64_t count;
    double momentum_weight, square_weight;
    const void* grad;
    void *momentum, *square, *param;
};

// What all tensors of a launch share that keeps element-wise second moments.
struct MomentParameters {
    Parameters step;
    double square_decay;  // beta_2
};

// One tensor whose F is s h^T + lambda: `count` elements next to each other, in rows of `columns`. Element k of a row
// belongs to entry offset(order, k) of h, for memory may have another order than h (channels_last).
struct RankOneProblem {
    int64_t count, columns;
    Scalar momentum_weight;  // 1 - beta^t
    const void* grad;
    void *momentum, *param;
    const void *row, *column;  // s and h; null: F = lambda
    Strides order;
};

MBF_HOST_DEVICE static inline bool is_permuted(const RankOneProblem& problem) {
    return problem.row && problem.order.inner != 1;
}

// What all tensors of its launch share.
struct RankOneParameters {
    Parameters step;
    bool decoupled;  // weight decay shrinks W, instead of joining the gradient
};

}  // namespace mbf
