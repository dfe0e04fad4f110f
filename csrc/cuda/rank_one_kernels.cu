// The optimizer step of tensors whose F is s h^T + lambda, an element to a lane. Compiled once per scalar type:
// MBF_SCALAR, with MBF_ENTRY the entry point's name.
#include "run.cuh"

namespace mbf {
namespace {

struct RankOneKernel {
    static constexpr int kThreads = 128, kPerThread = 4;
    static constexpr int kElements = kThreads * kPerThread;  // of a thread block
    static size_t shared_bytes(int) { return 0; }
};

template <class S>
struct Scales {
    S momentum, rest, coupled, shrink, rate, damping;

    MBF_FN Scales(const RankOneProblem& problem, const RankOneParameters& parameters) {
        const Parameters& q = parameters.step;
        const S lr = read<S>(q.lr), decay = S(q.weight_decay);
        momentum = S(q.momentum);
        rest = S(1 - q.momentum);
        coupled = parameters.decoupled ? S(0) : decay;
        shrink = parameters.decoupled ? S(1) - lr * decay : S(1);
        rate = lr / read<S>(problem.momentum_weight);
        damping = read<S>(q.damping);
    }
};

// Where the elements of a thread block stand in F.
class Place {
public:
    MBF_FN Place(const RankOneProblem& problem, int64_t first)
        : columns_(problem.columns),
          row_(first / columns_),
          column_(first % columns_),
          period_(columns_ < RankOneKernel::kElements ? static_cast<int>(columns_) : RankOneKernel::kElements) {}

    // Reads s and h of an element after the first one, by less than kElements.
    template <class S>
    MBF_FN void read(const RankOneProblem& problem, int after, S& s, S& h) const {
        int64_t row = row_, column = column_ + after;
        if (column >= columns_) {
            const int over = static_cast<int>(column - columns_);  // less than kElements, too
            row += 1 + over / period_;
            column = over % period_;
        }
        s = static_cast<const S*>(problem.row)[row];
        h = static_cast<const S*>(problem.column)[is_permuted(problem) ? offset(problem.order, column) : column];
    }

private:
    int64_t columns_, row_, column_;
    int period_;
};

// M <- beta M + (1 - beta) (g + coupled W), W <- shrink W - rate M / F. All reads come before the first write, so that
// many are under way at a time.
template <class S>
__global__ void __launch_bounds__(RankOneKernel::kThreads) rank_one_kernel(const __grid_constant__ RankOneTable table) {
    constexpr int kThreads = RankOneKernel::kThreads, kPerThread = RankOneKernel::kPerThread;
    const int p = problem_of(table, blockIdx.x);
    const RankOneProblem& problem = table.problems[p];
    const int64_t first = static_cast<int64_t>(blockIdx.x - table.first_unit[p]) * RankOneKernel::kElements;
    const S* grad = static_cast<const S*>(problem.grad);
    S *momentum = static_cast<S*>(problem.momentum), *param = static_cast<S*>(problem.param);

    S g[kPerThread], m[kPerThread], w[kPerThread], s[kPerThread] = {}, h[kPerThread] = {};
    MBF_UNROLL
    for (int k = 0; k < kPerThread; ++k) {
        const int64_t i = first + threadIdx.x + k * kThreads;
        if (i < problem.count) g[k] = grad[i], m[k] = momentum[i], w[k] = param[i];
    }
    if (problem.row) {
        const Place place(problem, first);
        MBF_UNROLL
        for (int k = 0; k < kPerThread; ++k) {
            const int after = threadIdx.x + k * kThreads;
            if (first + after < problem.count) place.read(problem, after, s[k], h[k]);
        }
    }
    const Scales<S> q(problem, table.parameters);
    MBF_UNROLL
    for (int k = 0; k < kPerThread; ++k) {
        const int64_t i = first + threadIdx.x + k * kThreads;
        if (i >= problem.count) return;
        m[k] = q.momentum * m[k] + q.rest * (g[k] + q.coupled * w[k]);
        momentum[i] = m[k];
        param[i] = q.shrink * w[k] - q.rate * (m[k] / (s[k] * h[k] + q.damping));
    }
}

}  // namespace

namespace MBF_GPU {

cudaError_t MBF_ENTRY(const RankOneProblem* problems, int count, const RankOneParameters& parameters,
                      cudaStream_t stream) {
    for (int done = 0; done < count;) {
        RankOneTable table;
        table.parameters = parameters;
        const int taken = fill(table, RankOneKernel::kElements, problems + done, count - done);
        if (!taken) return cudaErrorInvalidConfiguration;
        const cudaError_t error =
            start<RankOneKernel>(rank_one_kernel<MBF_SCALAR>, table.first_unit[taken], 0, stream, table);
        if (error != cudaSuccess) return error;
        done += taken;
    }
    return cudaSuccess;
}

}  // namespace MBF_GPU
}  // namespace mbf
