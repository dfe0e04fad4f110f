// The optimizer step of tensors without blocks, element by element. Compiled as kernels.cpp.
#include "kernels.h"

#include "lanes.h"

namespace mbf {
namespace {

using S = MBF_SCALAR;
using V = Lanes<S, 1>;
constexpr int W = RegisterOf<S>::kLanes;

struct Scales {
    S momentum, mean, square_decay, square_rest, square_scale, eps, shrink, lr, sign;
    bool adam;  // v averages g^2, else the squared mean

    Scales(const DiagonalProblem& problem, const MomentParameters& parameters)
        : momentum(parameters.step.momentum),
          mean((1 - parameters.step.momentum) / (parameters.step.graft ? problem.momentum_weight : 1)),
          square_decay(parameters.square_decay),
          square_rest(1 - parameters.square_decay),
          square_scale(1 / problem.square_weight),
          eps(parameters.step.eps),
          shrink(1 - parameters.step.lr.value * parameters.step.weight_decay),
          lr(parameters.step.lr.value),
          sign(parameters.step.maximize ? -1 : 1),
          adam(parameters.step.graft) {}
};

// M <- mu M + g, E = mean M, v <- beta_2 v + (1 - beta_2) g^2 (or E^2), W <- shrink W - lr E / (sqrt(scale v) + eps)
MBF_FN void step(const Scales& q, V g, V& m, V& v, V& w) {
    g = q.sign * g;
    m = q.momentum * m + g;
    const V mean = q.mean * m, squared = q.adam ? g : mean;
    v = q.square_decay * v + q.square_rest * squared * squared;
    w = q.shrink * w - q.lr * (mean / (square_root(q.square_scale * v) + q.eps));
}

MBF_FN V part(const S* p, int count) {
    V v{};
    v.part[0] = load_part<Register<S>>(p, count);
    return v;
}

}  // namespace

namespace cpu {

void MBF_DIAGONAL_KERNEL(const DiagonalProblem& problem, const MomentParameters& parameters, int64_t first,
                         int64_t last) {
    const Scales q(problem, parameters);
    const S* grad = static_cast<const S*>(problem.grad);
    S *momentum = static_cast<S*>(problem.momentum), *square = static_cast<S*>(problem.square);
    S* param = static_cast<S*>(problem.param);
    int64_t i = first;
    for (; i + W <= last; i += W) {
        V m = load<V>(momentum + i), v = load<V>(square + i), w = load<V>(param + i);
        step(q, load<V>(grad + i), m, v, w);
        store(momentum + i, m), store(square + i, v), store(param + i, w);
    }
    if (i == last) return;
    const int rest = static_cast<int>(last - i);
    V m = part(momentum + i, rest), v = part(square + i, rest), w = part(param + i, rest);
    step(q, part(grad + i, rest), m, v, w);
    store_part(momentum + i, m.part[0], rest), store_part(square + i, v.part[0], rest);
    store_part(param + i, w.part[0], rest);
}

}  // namespace cpu
}  // namespace mbf
