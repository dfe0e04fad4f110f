// What a lane is on a GPU: one thread, V a scalar. Where the blocks of a thread block lie in shared memory is in
// staging.cuh. Plain CUDA C++, so that csrc/emulator can stand in for the two headers of the toolkit.
#pragma once

#include <cuda_pipeline.h>
#include <cuda_runtime.h>
#include <math.h>
#include <stdint.h>

#include "../layout.h"
#include "../types.h"

#define MBF_FN __device__ __forceinline__
#define MBF_RESTRICT __restrict__
// Loops over arrays that must stay in registers; their trip counts are known once N is.
#define MBF_UNROLL _Pragma("unroll")
#define MBF_UNROLL_IN_REGISTERS _Pragma("unroll")
#define MBF_BOUND(needed, fixed) (fixed)
#define MBF_DO_NOT_UNROLL _Pragma("unroll 1")

namespace mbf {
namespace {

// Built with -prec-sqrt=false and -prec-div=false: square roots and quotients of floats are within 2 units in the
// last place, special values as in IEEE 754, and need no slow path, which would cost registers.
MBF_FN float square_root(float x) {
    return sqrtf(x);
}
MBF_FN double square_root(double x) {
    return sqrt(x);
}

template <class S>
MBF_FN S select(bool mask, S yes, S no) {
    return mask ? yes : no;
}

}  // namespace
}  // namespace mbf

#include "../numerics.h"

namespace mbf {
namespace {

template <class S>
MBF_FN S read(const Scalar& scalar) {
    if (!scalar.device) return static_cast<S>(scalar.value);
    return static_cast<S>(scalar.dtype == DType::kFloat32 ? *static_cast<const float*>(scalar.device)
                                                          : *static_cast<const double*>(scalar.device));
}

// lambda of a block. A block whose trace is zero has no scale for damping to be relative to.
template <class S>
MBF_FN S block_damping(const Parameters& q, S trace, int n, S zero_block_lambda) {
    const S damping = read<S>(q.damping);
    if (!q.relative) return damping;
    return trace > 0 ? damping * (trace / S(n)) : zero_block_lambda;
}

// How W moves, in the scalar type of the blocks.
template <class S>
struct Rates {
    S lr, shrink, momentum_scale, fisher_scale;

    MBF_FN Rates(const Problem& problem, const Parameters& q)
        : lr(read<S>(q.lr)),
          shrink(S(1) - lr * S(q.weight_decay)),
          momentum_scale(S(1 - q.momentum) / read<S>(problem.momentum_weight)),
          fisher_scale(S(1) / read<S>(problem.fisher_weight)) {}
};

// M <- mu M + g, and the direction D = mu M + g (Nesterov) or M, of one element.
template <class S>
struct Momentum {
    S mu, sign;
    bool nesterov;

    MBF_FN explicit Momentum(const Parameters& q) : mu(q.momentum), sign(q.maximize ? -1 : 1), nesterov(q.nesterov) {}

    MBF_FN S next(S m, S g) const { return mu * m + g; }
    MBF_FN S direction(S m, S g) const { return nesterov ? mu * next(m, g) + g : next(m, g); }
};

}  // namespace
}  // namespace mbf
