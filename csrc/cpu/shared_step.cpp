// The optimizer step of mini-blocks that share averaged matrices, one matrix at a time: its statistic over all of its
// mini-blocks, its damped inverse, and their step. Between the first and the last the gradients stay in the cache, so
// that a step moves what an element-wise optimizer's does. Compiled once per instruction set and scalar type, as
// kernels.cpp.
#include "kernels.h"

#include "products.h"

namespace mbf {
namespace {

using cpu::kSharedRows;
using S = MBF_SCALAR;
using V = Lanes<S, 1>;
constexpr int W = RegisterOf<S>::kLanes;
constexpr int kLine = 64 / sizeof(S);

// How the elements of a mini-block lie: next to each other, likewise but for the last one, or anyhow.
enum class Layout { kContiguous, kJoined, kScattered };

// The mini-blocks of one matrix, n scalars each, moved in registers; lanes past n are zero when read and never written.
template <Layout layout>
class Rows {
public:
    Rows(const SharedView& view, int n, int64_t samples)
        : base_(static_cast<S*>(view.base)),
          last_(static_cast<S*>(view.last)),
          matrix_(view.matrix),
          last_sample_(view.last_sample),
          sample_(view.sample),
          n_(n),
          run_(view.last ? n - 1 : n),
          even_(sample_.inner_count >= samples) {
        if (layout == Layout::kScattered && base_)
            for (int k = 0; k < run_; ++k) element_[k] = offset(view.element, k);
    }

    void select(int64_t matrix) { start_ = base_ + matrix * matrix_; }

    MBF_FN V load(int64_t sample, int k) const {
        V v{};
        if constexpr (layout == Layout::kScattered) {
            for (int l = 0; l < W && k + l < n_; ++l) v[l] = *element(sample, k + l);
        } else {
            const S* from = row(sample) + k;
            if (k + W <= run_) {
                v.part[0] = mbf::load<Register<S>>(from);
            } else {
                v.part[0] = load_part<Register<S>>(from, run_ - k);
                if constexpr (layout == Layout::kJoined) v[run_ - k] = last_[sample * last_sample_];
            }
        }
        return v;
    }

    MBF_FN void store(int64_t sample, int k, V v) const {
        if constexpr (layout == Layout::kScattered) {
            for (int l = 0; l < W && k + l < n_; ++l) *element(sample, k + l) = v[l];
        } else {
            S* to = row(sample) + k;
            if (k + W <= run_) {
                mbf::store(to, v.part[0]);
            } else {
                store_part(to, v.part[0], run_ - k);
                if constexpr (layout == Layout::kJoined) last_[sample * last_sample_] = v[run_ - k];
            }
        }
    }

    MBF_FN void prefetch(int64_t sample) const {
        if constexpr (layout != Layout::kScattered)
            for (int k = 0; k < run_; k += kLine) __builtin_prefetch(row(sample) + k, 1);
    }

private:
    MBF_FN S* row(int64_t sample) const { return start_ + (even_ ? sample * sample_.inner : offset(sample_, sample)); }

    S* element(int64_t sample, int k) const {
        return k < run_ ? row(sample) + element_[k] : last_ + sample * last_sample_;
    }

    S *const base_, *const last_;
    S* start_ = nullptr;
    const int64_t matrix_, last_sample_;
    const Strides sample_;
    const int n_, run_;  // elements, and those that lie in rows
    const bool even_;    // one stride between samples
    int64_t element_[layout == Layout::kScattered ? MBF_MAX_SIZE : 1];
};

Layout layout_of(const SharedView& view, int n) {
    const int run = view.last ? n - 1 : n;
    if (run > 1 && (view.element.inner != 1 || view.element.inner_count < run)) return Layout::kScattered;
    return view.last ? Layout::kJoined : Layout::kContiguous;
}

Layout layout_of(const SharedProblem& problem, int n) {
    Layout common = Layout::kContiguous;
    for (const SharedView* view : {&problem.grad, &problem.momentum, &problem.square, &problem.param})
        if (view->base && layout_of(*view, n) > common) common = layout_of(*view, n);
    return common;
}

// The sum over lanes, by halves.
template <int half = W / 2, int... l>
MBF_FN S sum(Register<S> v, std::integer_sequence<int, l...> lanes) {
    using Index = decltype(v < v);
    constexpr Index other{(l ^ half)...};
    v += __builtin_shuffle(v, other);
    if constexpr (half > 1) return sum<half / 2>(v, lanes);
    return v[0];
}

MBF_FN S sum(V v) {
    return sum(v.part[0], std::make_integer_sequence<int, W>());
}

template <Layout layout>
class SharedStep {
public:
    SharedStep(const SharedProblem& problem, const MomentParameters& parameters, int n, void* scratch)
        : problem(problem),
          q(parameters.step),
          n(n),
          ld(padded_row<S>(n)),
          square_decay(parameters.square_decay),
          square_rest(1 - parameters.square_decay),
          grad(problem.grad, n, problem.samples),
          momentum(problem.momentum, n, problem.samples),
          square(problem.square, n, problem.samples),
          param(problem.param, n, problem.samples) {
        char* at = static_cast<char*>(scratch);
        const auto take = [&](auto& pointer, int rows, int row) {
            pointer = reinterpret_cast<std::remove_reference_t<decltype(pointer)>>(at);
            at += sizeof(*pointer) * rows * row;
        };
        const int wide = padded_row<double>(n);
        take(u, n, wide);
        take(y, n + 1, wide);  // one row more: a product's last tile reads past the end
        take(wide_inverse, padded_rows(n), wide);
        take(statistic, padded_rows(n), ld);
        take(inverse, n, ld);
        take(packed, kSharedRows + 1, ld);
        for (S** tile : {&m, &v, &d, &p}) take(*tile, kTileRows, ld);
    }

    void run(int64_t matrix) {
        for (Rows<layout>* rows : {&grad, &momentum, &square, &param}) rows->select(matrix);
        if (q.update) update_fisher(matrix);
        const int info = invert(matrix);
        int64_t bad = info ? problem.samples : 0;
        for (int64_t s = 0; s < problem.samples && !info; s += kTileRows) bad += move(s);
        if (problem.info) problem.info[matrix] = info;
        if (problem.skipped && bad) __atomic_fetch_add(problem.skipped, bad, __ATOMIC_RELAXED);
    }

private:
    // F <- decay F + (1 - decay) mean_s g_s g_s^T, unless its diagonal would not be finite.
    void update_fisher(int64_t matrix) const {
        for (int64_t s = 0; s < problem.samples; s += kSharedRows) {
            const int count = static_cast<int>(problem.samples - s < kSharedRows ? problem.samples - s : kSharedRows);
            pack(s, count);
            gram(statistic, s > 0, packed, count, n);
        }
        const S decay = q.decay, weight = (1 - q.decay) / problem.samples;
        S* entry = static_cast<S*>(problem.fisher) + block_offset(n, matrix);
        S doubt = 0;
        for (int k = 0; k < n; ++k) {
            const S updated = decay * entry[entry_of(k, k)] + weight * statistic[k * ld + k];
            doubt += updated - updated;
        }
        if (doubt != 0) return;
        for (int i = 0; i < n; ++i)
            for (int j = 0; j <= i; ++j) {
                S& f = entry[entry_of(i, j)];
                f = decay * f + weight * statistic[i * ld + j];
            }
    }

    int64_t entry_of(int i, int j) const { return (triangle_size(i) + j) * entry_stride(n); }

    void pack(int64_t first, int count) const {
        for (int r = 0; r < count; ++r) {
            if (first + r + kSharedRows < problem.samples) grad.prefetch(first + r + kSharedRows);
            for (int k = 0; k < n; k += W) store(packed + r * ld + k, grad.load(first + r, k));
        }
    }

    // inverse <- (F + lambda I)^-1, through double so that it costs no accuracy against solves with L. Where only
    // directions count, its largest entry is 1, so that no length leaves the range of S. Returns info.
    int invert(int64_t matrix) const {
        const int wide = padded_row<double>(n);
        const S* f = static_cast<const S*>(q.refactor ? problem.fisher : problem.factor) + block_offset(n, matrix);
        for (int i = 0; i < n; ++i)
            for (int j = 0; j <= i; ++j) u[j * wide + i] = f[entry_of(i, j)];
        if (q.refactor) damp();
        for (int t = 0; t < (n + 1) * wide; ++t) y[t] = 0;
        const int info = eliminate(u, y, n, !q.refactor);
        if (info) return info;
        if (q.refactor && problem.factor) {
            S* l = static_cast<S*>(problem.factor) + block_offset(n, matrix);
            for (int i = 0; i < n; ++i)
                for (int j = 0; j <= i; ++j) l[entry_of(i, j)] = static_cast<S>(u[j * wide + i]);
        }
        gram(wide_inverse, false, y, n, n);
        double peak = 0;  // the largest entry of an SPD matrix is on its diagonal
        for (int k = 0; k < n; ++k)
            if (wide_inverse[k * wide + k] > peak) peak = wide_inverse[k * wide + k];
        const double unit = q.graft ? 1 / peak : 1;
        for (int i = 0; i < n; ++i) {
            for (int j = 0; j <= i; ++j)
                inverse[i * ld + j] = inverse[j * ld + i] = static_cast<S>(unit * wide_inverse[i * wide + j]);
            for (int j = n; j < ld; ++j) inverse[i * ld + j] = 0;
        }
        return 0;
    }

    // A block of zeros has no scale for damping to be relative to: there lambda is 1.
    void damp() const {
        const int wide = padded_row<double>(n);
        double lambda = q.damping.value;
        if (q.relative) {
            double trace = 0;
            for (int k = 0; k < n; ++k) trace += u[k * wide + k];
            lambda = trace > 0 ? lambda * (trace / n) : 1;
        }
        for (int k = 0; k < n; ++k) u[k * wide + k] += lambda;
    }

    // The step of up to kTileRows mini-blocks; returns how many are bad and keep what they had.
    int move(int64_t first) const {
        const int active = static_cast<int>(problem.samples - first < kTileRows ? problem.samples - first : kTileRows);
        S adam[kTileRows] = {};
        for (int r = 0; r < active; ++r) adam[r] = prepare(r, first + r);
        for (int r = active; r < kTileRows; ++r)
            for (int k = 0; k < ld; k += W) store(d + r * ld + k, V{});
        multiply_rows(p, ld, ld, false, d, ld, 1, inverse, n);
        int bad = 0;
        for (int r = 0; r < active; ++r) bad += !finish(r, first + r, adam[r]);
        return bad;
    }

    // M <- mu M + g, D = mu M + g (Nesterov) or M, v <- beta_2 v + (1 - beta_2) g^2, in the tile; returns |u|^2 up to
    // mhat's factor, NaN if anything is not finite.
    S prepare(int r, int64_t sample) const {
        grad.prefetch(sample + kTileRows);
        momentum.prefetch(sample + kTileRows);
        const S mu = q.momentum, sign = q.maximize ? -1 : 1, beta = square_decay, rest = square_rest;
        const S scale = 1 / problem.square_weight, eps = q.eps;
        V adam{};
        for (int k = 0; k < ld; k += W) {
            const V g = sign * grad.load(sample, k);
            const V new_m = mu * momentum.load(sample, k) + g;
            const V new_d = q.nesterov ? mu * new_m + g : new_m;
            store(m + r * ld + k, new_m);
            store(d + r * ld + k, new_d);
            adam = adam + (new_d - new_d);
            if (!q.graft) continue;
            const V new_v = beta * square.load(sample, k) + rest * g * g;
            store(v + r * ld + k, new_v);
            const V denominator = square_root(scale * new_v) + eps;
            const V u = select(denominator > V{}, new_d / denominator, V{});
            adam = adam + u * u + (new_v - new_v);
        }
        return sum(adam);
    }

    // W <- (1 - lr weight_decay) W - lr P, or lr (|u| / |P|) P when grafted; with it M and v. False for a bad block.
    bool finish(int r, int64_t sample, S adam) const {
        param.prefetch(sample + kTileRows);
        if (q.graft) square.prefetch(sample + kTileRows);
        S unit = 1, length = squared_length(r, unit);
        if (!(length > kSmall && length < 1 / kSmall)) {
            unit = 1 / peak(r);
            length = squared_length(r, unit);
        }
        if (!(adam - adam == 0 && length - length == 0)) return false;

        S rate = q.lr.value;
        if (q.graft) {
            const S ratio = length > 0 ? unit * square_root(adam / length) : 0;
            rate *= S((1 - q.momentum) / problem.momentum_weight) * ratio;
        }
        const S shrink = 1 - q.lr.value * q.weight_decay;
        for (int k = 0; k < ld; k += W) {
            momentum.store(sample, k, load<V>(m + r * ld + k));
            param.store(sample, k, shrink * param.load(sample, k) - rate * load<V>(p + r * ld + k));
            if (q.graft) square.store(sample, k, load<V>(v + r * ld + k));
        }
        return true;
    }

    // |unit P|^2
    MBF_FN S squared_length(int r, S unit) const {
        V length{};
        for (int k = 0; k < ld; k += W) {
            const V x = unit * load<V>(p + r * ld + k);
            length = length + x * x;
        }
        return sum(length);
    }

    // The largest magnitude in P, NaN if there is one; at least what has a quotient.
    MBF_SHARED S peak(int r) const {
        S largest = kSmall;
        for (int k = 0; k < n; ++k) {
            const S magnitude = p[r * ld + k] < 0 ? -p[r * ld + k] : p[r * ld + k];
            largest = magnitude <= largest ? largest : magnitude;  // NaN stays
        }
        return largest;
    }

    static constexpr S kSmall = S(1e-30);  // between it and its inverse sums of squares are accurate

    const SharedProblem& problem;
    const Parameters& q;
    const int n, ld;
    const S square_decay, square_rest;  // the rest from the double: 1 - S(0.999) has three digits less
    Rows<layout> grad, momentum, square, param;
    double *u, *y, *wide_inverse;  // L^T, L^-1 and their product, the inverse
    S *statistic, *inverse, *packed;
    S *m, *v, *d, *p;  // a tile of mini-blocks
};

}  // namespace

namespace cpu {

void MBF_SHARED_KERNEL(const SharedProblem& problem, const MomentParameters& parameters, int n, int64_t matrix,
                       void* scratch) {
    switch (layout_of(problem, n)) {
#define MBF_CASE(layout) \
    case layout: return SharedStep<layout>(problem, parameters, n, scratch).run(matrix);
        MBF_CASE(Layout::kContiguous)
        MBF_CASE(Layout::kJoined)
        MBF_CASE(Layout::kScattered)
#undef MBF_CASE
    }
}

}  // namespace cpu
}  // namespace mbf
