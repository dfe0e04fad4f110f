// The optimizer step of tensors whose F is s h^T + lambda, row by row. Compiled as kernels.cpp.
#include "kernels.h"

#include "lanes.h"

namespace mbf {
namespace {

using S = MBF_SCALAR;
using V = Lanes<S, 1>;
constexpr int W = RegisterOf<S>::kLanes;

struct Scales {
    S momentum, rest, coupled, shrink, rate, damping;

    Scales(const RankOneProblem& problem, const RankOneParameters& parameters) {
        const Parameters& q = parameters.step;
        momentum = q.momentum;
        rest = 1 - q.momentum;
        coupled = parameters.decoupled ? 0 : q.weight_decay;
        shrink = parameters.decoupled ? 1 - q.lr.value * q.weight_decay : 1;
        rate = q.lr.value / problem.momentum_weight.value;
        damping = q.damping.value;
    }
};

// Elements next to each other.
struct Run {
    const S *grad, *column;
    S *momentum, *param;
};

// M <- beta M + (1 - beta) (g + coupled W), W <- shrink W - rate M / F
MBF_FN void step(const Scales& q, V f, V g, V& m, V& w) {
    m = q.momentum * m + q.rest * (g + q.coupled * w);
    w = q.shrink * w - q.rate * (m / f);
}

MBF_FN V part(const S* p, int count) {
    V v{};
    v.part[0] = load_part<Register<S>>(p, count);
    return v;
}

// s h + lambda, or lambda where there is no h. Lanes past the last element divide by lambda, too.
template <bool kCurved>
void step_run(const Scales& q, S s, const Run& run, int64_t count) {
    int64_t k = 0;
    for (; k + W <= count; k += W) {
        const V f = kCurved ? s * load<V>(run.column + k) + q.damping : V(q.damping);
        V m = load<V>(run.momentum + k), w = load<V>(run.param + k);
        step(q, f, load<V>(run.grad + k), m, w);
        store(run.momentum + k, m), store(run.param + k, w);
    }
    if (k == count) return;
    const int rest = static_cast<int>(count - k);
    const V f = kCurved ? s * part(run.column + k, rest) + q.damping : V(q.damping);
    V m = part(run.momentum + k, rest), w = part(run.param + k, rest);
    step(q, f, part(run.grad + k, rest), m, w);
    store_part(run.momentum + k, m.part[0], rest), store_part(run.param + k, w.part[0], rest);
}

const S* in_order_of_memory(const RankOneProblem& problem, void* scratch) {
    const S* column = static_cast<const S*>(problem.column);
    if (!is_permuted(problem)) return column;
    S* permuted = static_cast<S*>(scratch);
    for (int64_t k = 0; k < problem.columns; ++k) permuted[k] = column[offset(problem.order, k)];
    return permuted;
}

}  // namespace

namespace cpu {

void MBF_RANK_ONE_KERNEL(const RankOneProblem& problem, const RankOneParameters& parameters, int64_t first,
                         int64_t last, void* scratch) {
    const Scales q(problem, parameters);
    const S *grad = static_cast<const S*>(problem.grad), *row = static_cast<const S*>(problem.row);
    S *momentum = static_cast<S*>(problem.momentum), *param = static_cast<S*>(problem.param);
    if (!row) return step_run<false>(q, 0, {grad + first, nullptr, momentum + first, param + first}, last - first);
    const S* column = in_order_of_memory(problem, scratch);
    for (int64_t i = first; i < last;) {
        const int64_t r = i / problem.columns, at = i % problem.columns;
        const int64_t count = (problem.columns - at < last - i) ? problem.columns - at : last - i;
        step_run<true>(q, row[r], {grad + i, column + at, momentum + i, param + i}, count);
        i += count;
    }
}

}  // namespace cpu
}  // namespace mbf
