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

// One mini-block, n scalars, moved in registers; lanes past n are zero when read and never written. A value, so that
// the compiler keeps it in registers whatever is stored through it.
template <Layout layout>
struct Row {
    S* start;
    S* last;                 // of a joined row, which lies elsewhere
    const int64_t* element;  // of a scattered row, from the start
    int n, run;              // elements, and those that do not lie elsewhere

    MBF_FN V load(int k) const {
        V v{};
        if constexpr (layout == Layout::kScattered) {
            for (int l = 0; l < W && k + l < n; ++l) v[l] = *place(k + l);
        } else if (k + W <= run) {
            v.part[0] = mbf::load<Register<S>>(start + k);
        } else {
            v.part[0] = load_part<Register<S>>(start + k, run - k);
            if constexpr (layout == Layout::kJoined) v[run - k] = *last;
        }
        return v;
    }

    MBF_FN void store(int k, V v) const {
        if constexpr (layout == Layout::kScattered) {
            for (int l = 0; l < W && k + l < n; ++l) *place(k + l) = v[l];
        } else if (k + W <= run) {
            mbf::store(start + k, v.part[0]);
        } else {
            store_part(start + k, v.part[0], run - k);
            if constexpr (layout == Layout::kJoined) *last = v[run - k];
        }
    }

    MBF_FN void prefetch() const {
        if constexpr (layout != Layout::kScattered)
            for (int k = 0; k < run; k += kLine) __builtin_prefetch(start + k, 1);
    }

private:
    MBF_FN S* place(int k) const { return k < run ? start + element[k] : last; }
};

// The mini-blocks of one matrix. Small, to be copied before a loop: then it stays in registers, too.
template <Layout layout>
class Rows {
public:
    // Room for n offsets at `element`.
    Rows(const SharedView& view, int n, int64_t samples, int64_t matrix, int64_t* element)
        : start_(static_cast<S*>(view.base) + matrix * view.matrix),
          last_(static_cast<S*>(view.last)),
          sample_(view.sample),
          last_sample_(view.last_sample),
          element_(element),
          n_(n),
          run_(view.joined ? n - 1 : n),
          even_(!view.base || view.sample.inner_count >= samples) {
        if (layout == Layout::kScattered && view.base)
            for (int k = 0; k < n; ++k) element[k] = offset(view.element, k);
    }

    MBF_FN Row<layout> operator[](int64_t sample) const {
        const int64_t from = even_ ? sample * sample_.inner : offset(sample_, sample);
        return {start_ + from, last_ + sample * last_sample_, element_, n_, run_};
    }

private:
    S *start_, *last_;
    Strides sample_;
    int64_t last_sample_;
    const int64_t* element_;
    int n_, run_;
    bool even_;  // one stride between samples (or no tensor at all)
};

Layout layout_of(const SharedView& view, int n) {
    const int run = view.joined ? n - 1 : n;
    if (run > 1 && (view.element.inner != 1 || view.element.inner_count < run)) return Layout::kScattered;
    return view.joined ? Layout::kJoined : Layout::kContiguous;
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
    SharedStep(const SharedProblem& problem, const MomentParameters& parameters, int n, int64_t matrix, void* scratch)
        : problem(problem),
          q(parameters.step),
          n(n),
          ld(padded_row<S>(n)),
          matrix(matrix),
          square_decay(parameters.square_decay),
          square_rest(1 - parameters.square_decay),
          grad(problem.grad, n, problem.samples, matrix, elements[0]),
          momentum(problem.momentum, n, problem.samples, matrix, elements[1]),
          square(problem.square, n, problem.samples, matrix, elements[2]),
          param(problem.param, n, problem.samples, matrix, elements[3]) {
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

    void run() const {
        if (q.update) update_fisher();
        const int info = invert();
        int64_t bad = info ? problem.samples : 0;
        for (int64_t s = 0; s < problem.samples && !info; s += kTileRows) bad += move(s);
        if (problem.info) problem.info[matrix] = info;
        if (problem.skipped && bad) __atomic_fetch_add(problem.skipped, bad, __ATOMIC_RELAXED);
    }

private:
    // F <- decay F + (1 - decay) mean_s g_s g_s^T, unless its diagonal would not be finite.
    void update_fisher() const {
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
        const Rows<layout> rows = grad;
        const int end = ld;
        const int64_t samples = problem.samples;
        S* to = packed;
        for (int64_t s = first; s < first + count; ++s, to += end) {
            const Row<layout> from = rows[s];
            if (s + kSharedRows < samples) rows[s + kSharedRows].prefetch();
            for (int k = 0; k < end; k += W) store(to + k, from.load(k));
        }
    }

    // inverse <- (F + lambda I)^-1, through double so that it costs no accuracy against solves with L. Where only
    // directions count, its largest entry is 1, so that no length leaves the range of S. Returns info.
    int invert() const {
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
        S adam[kTileRows], rate[kTileRows];
        prepare(first, active, adam);
        multiply_rows(p, ld, ld, false, d, ld, 1, inverse, n);
        const int bad = find_rates(active, adam, rate);
        finish(first, active, rate);
        return bad;
    }

    // M <- mu M + g, D = mu M + g (Nesterov) or M, v <- beta_2 v + (1 - beta_2) g^2, in the tile; |u|^2 up to mhat's
    // factor, NaN if anything is not finite.
    void prepare(int64_t first, int active, S* adam) const {
        const Rows<layout> g_rows = grad, m_rows = momentum, v_rows = square;
        const S mu = q.momentum, sign = q.maximize ? -1 : 1, beta = square_decay, rest = square_rest;
        const S scale = 1 / problem.square_weight, eps = q.eps;
        const bool graft = q.graft, nesterov = q.nesterov;
        const int end = ld;
        S *new_m = m, *new_d = d, *new_v = v;
        for (int r = 0; r < active; ++r) {
            const Row<layout> g_row = g_rows[first + r], m_row = m_rows[first + r], v_row = v_rows[first + r];
            g_rows[first + r + kTileRows].prefetch();
            m_rows[first + r + kTileRows].prefetch();
            V sum_of_squares{};
            for (int k = 0; k < end; k += W) {
                const V g_k = sign * g_row.load(k);
                const V m_k = mu * m_row.load(k) + g_k;
                const V d_k = nesterov ? mu * m_k + g_k : m_k;
                store(new_m + k, m_k);
                store(new_d + k, d_k);
                sum_of_squares = sum_of_squares + (d_k - d_k);
                if (!graft) continue;
                const V v_k = beta * v_row.load(k) + rest * g_k * g_k;
                store(new_v + k, v_k);
                const V denominator = square_root(scale * v_k) + eps;
                const V u = select(denominator > V{}, d_k / denominator, V{});
                sum_of_squares = sum_of_squares + u * u + (v_k - v_k);
            }
            adam[r] = sum(sum_of_squares);
            new_m += end, new_d += end, new_v += end;
        }
        for (int t = 0; t < (kTileRows - active) * end; t += W) store(new_d + t, V{});
    }

    // alpha, or alpha |u| / |P| when grafted, for P as it is left: in units of its largest element where its length
    // is too small or too large to be squared. NaN for a bad mini-block. Returns how many those are.
    int find_rates(int active, const S* adam, S* rate) const {
        int bad = 0;
        for (int r = 0; r < active; ++r) {
            S* step = p + r * ld;
            S unit = 1, length = squared_length(step);
            if (!(length > kSmall && length < 1 / kSmall)) {
                unit = 1 / peak(step);
                scale(step, unit);
                length = squared_length(step);
            }
            rate[r] = q.lr.value;
            if (q.graft) {
                const S ratio = length > 0 ? square_root(adam[r] / length) : 0;
                rate[r] *= S((1 - q.momentum) / problem.momentum_weight) * ratio;
            } else {
                rate[r] /= unit;
            }
            rate[r] += (rate[r] - rate[r]) + (adam[r] - adam[r]) + (length - length);
            bad += rate[r] != rate[r];
        }
        return bad;
    }

    // W <- (1 - alpha gamma) W - rate P; with it M and v.
    void finish(int64_t first, int active, const S* rate) const {
        const Rows<layout> m_rows = momentum, v_rows = square, w_rows = param;
        const S shrink = 1 - q.lr.value * q.weight_decay;
        const bool graft = q.graft;
        const int end = ld;
        for (int r = 0; r < active; ++r) {
            const Row<layout> m_row = m_rows[first + r], v_row = v_rows[first + r], w_row = w_rows[first + r];
            w_rows[first + r + kTileRows].prefetch();
            if (graft) v_rows[first + r + kTileRows].prefetch();
            if (rate[r] != rate[r]) continue;
            const S *new_m = m + r * end, *new_v = v + r * end, *step = p + r * end;
            for (int k = 0; k < end; k += W) {
                m_row.store(k, load<V>(new_m + k));
                w_row.store(k, shrink * w_row.load(k) - rate[r] * load<V>(step + k));
                if (graft) v_row.store(k, load<V>(new_v + k));
            }
        }
    }

    MBF_FN S squared_length(const S* step) const {
        V length{};
        for (int k = 0, end = ld; k < end; k += W) {
            const V x = load<V>(step + k);
            length = length + x * x;
        }
        return sum(length);
    }

    MBF_SHARED void scale(S* step, S factor) const {
        for (int k = 0; k < n; ++k) step[k] *= factor;
    }

    // The largest magnitude in P, at least one that has a quotient. A NaN shows in the length.
    MBF_SHARED S peak(const S* step) const {
        S largest = kSmall;
        for (int k = 0; k < n; ++k) {
            const S magnitude = step[k] < 0 ? -step[k] : step[k];
            largest = magnitude > largest ? magnitude : largest;
        }
        return largest;
    }

    static constexpr S kSmall = S(1e-30);  // between it and its inverse sums of squares are accurate

    const SharedProblem& problem;
    const Parameters& q;
    const int n, ld;
    const int64_t matrix;
    const S square_decay, square_rest;
    int64_t elements[4][layout == Layout::kScattered ? MBF_MAX_SIZE : 1];
    const Rows<layout> grad, momentum, square, param;
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
    case layout: return SharedStep<layout>(problem, parameters, n, matrix, scratch).run();
        MBF_CASE(Layout::kContiguous)
        MBF_CASE(Layout::kJoined)
        MBF_CASE(Layout::kScattered)
#undef MBF_CASE
    }
}

}  // namespace cpu
}  // namespace mbf
