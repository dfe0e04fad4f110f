// The five ops on the CPU, W mini-blocks at a time. Compiled once per instruction set and scalar type:
// MBF_KERNEL names the entry point, MBF_SCALAR the scalar. Everything else has internal linkage, so that
// the linker can never merge code of two instruction sets.
#include "kernels.h"

#include "elimination.h"
#include "memory.h"

namespace mbf {
namespace {

using S = MBF_SCALAR;

// Per-thread arrays of one group, entry-major: entry t of all W blocks is one V.
template <class V>
struct Workspace {
    V *f, *d;      // F, and behind it as one more row the right-hand side
    V *a, *x;      // a factor of F + lambda I, and likewise the solution
    V* inverse;    // of the factor's diagonal
    V *g, *m, *w;  // gradient, momentum, weights

    Workspace(void* scratch, int n)
        : f(static_cast<V*>(scratch)),
          d(f + triangle_size(n)),
          a(d + n),
          x(a + triangle_size(n)),
          inverse(x + n),
          g(inverse + n),
          m(g + n),
          w(m + n) {}
};

template <int N>
class Kernels {
    // Small blocks wait for square roots and quotients: two registers side by side. Large ones have independent
    // work enough, and on 32 registers a larger tile of accumulators.
    static constexpr int kParts = N > 0 ? 2 : 1;
    static constexpr int kTile = N == 0 && kRegisters > 16 ? 4 : 3;
    static constexpr int W = kParts * RegisterOf<S>::kLanes;
    using V = Lanes<S, kParts>;
    using Next = Ahead<N, kTile, S, kParts>;

public:
    Kernels(const Problem& problem, const Parameters& parameters, int n, void* scratch)
        : problem(problem),
          q(parameters),
          n_(n),
          momentum_scale((1 - parameters.momentum) / problem.momentum_weight.value),
          fisher_scale(1 / problem.fisher_weight.value),
          s(scratch, n),
          fisher(static_cast<S*>(problem.fisher)),
          stored(static_cast<S*>(problem.factor)),
          grad(problem.grad, n),
          rhs(problem.rhs, n),
          out(problem.out, n) {}

    void run(Op op, int64_t first, int64_t last) const {
        if (op == Op::kSolve && q.rhs_count >= RegisterOf<S>::kLanes) {
            for (int64_t b = first; b < last; ++b) solve_many(b);
            return;
        }
        for (int64_t b = first; b < last; b += W) {
            const Group group{b, static_cast<int>(last - b < W ? last - b : W), b + W < last ? b + W : b};
            switch (op) {
                case Op::kAccumulate: accumulate_group(group); break;
                case Op::kFactor: factor_group(group); break;
                case Op::kSolve: solve_group(group); break;
                case Op::kFused: fused_group(group); break;
                case Op::kStep: step_group(group); break;
            }
        }
    }

private:
    int n() const { return size_of<N>(n_); }

    void accumulate_group(Group group) const {
        grad.load(s.g, group);
        load_and_accumulate(group, [](int) {});
        const V bad = poison_of_diagonal<N, V>(s.f, n());
        store_triangle<N, S, kParts>(s.f, fisher, n(), group, bad);
    }

    void factor_group(Group group) const {
        load_triangle<N, S, kParts>(s.f, fisher, n(), group);
        factor_damped(0);
        V info{};
        if (any(poison_of_pivots<N>(s.a, s.inverse, n()) != V{})) info = flag_pivots<N>(info, s.a, s.inverse, n());
        clear_bad(s.a, triangle_size(n()), info);
        store_triangle<N, S, kParts>(s.a, stored, n(), group, V{});
        report(info, group);
    }

    void fused_group(Group group) const {
        Next ahead(fisher, grad, rhs, out, n_, group.next);
        ahead.fetch_share();
        grad.load(s.g, group);
        ahead.fetch_share();
        rhs.load(s.d, group);
        ahead.fetch_share();
        load_and_accumulate(group, [&](int) { ahead.fetch_share(); });
        const V info = eliminate_checked(0, ahead);
        ahead.fetch_share();
        clear_bad(s.x, n(), info);
        ahead.fetch_share();
        store_triangle<N, S, kParts>(s.f, fisher, n(), group, info);
        ahead.fetch_share();
        out.store(s.x, group, V{});
        ahead.fetch_share();
        report(info, group);
        ahead.fetch_share();
    }

    void step_group(Group group) const {
        Next ahead(fisher, grad, rhs, out, n_, group.next);
        const bool runs = grad.is_run(group) && rhs.is_run(group) && out.is_run(group);
        if (runs)
            form_direction_of_run(group, ahead);
        else
            form_direction(group, ahead);
        V adam{};  // |u|^2 of Adam's step
        const auto after_row = [&](int k) {
            ahead.fetch_share();
            if (q.graft) adam = adam + adam_square(s.f[row(k) + k], s.d[k], momentum_scale, fisher_scale, S(q.eps));
        };
        if (q.update) {
            load_and_accumulate(group, after_row);
        } else if (q.refactor || q.graft) {
            load_triangle<N, S, kParts>(s.f, fisher, n(), group);
            for (int k = 0; k < n(); ++k) after_row(k);
        }
        const V info = find_step(group, ahead);
        ahead.fetch_share();
        scale_step(adam);
        ahead.fetch_share();
        if (q.update) store_triangle<N, S, kParts>(s.f, fisher, n(), group, info);
        ahead.fetch_share();
        if (runs)
            move_run(group, info);
        else
            move(group, info);
        ahead.fetch_share();
        report(info, group);
    }

    // Lanes are blocks: right-hand side r of every block at once.
    void solve_group(Group group) const {
        load_factor(group);
        const V bad = poison_of_pivots<N>(s.a, s.inverse, n());
        for (int64_t r = 0; r < q.rhs_count; ++r) {
            rhs.shifted(r).load(s.x, group);
            solve_in_place(s.a, s.inverse, s.x);
            clear_bad(s.x, n(), bad);
            out.shifted(r).store(s.x, group, V{});
        }
    }

    // Lanes are right-hand sides of one block: a register of them at once.
    void solve_many(int64_t block) const {
        using R = Register<S>;
        constexpr int kLanes = RegisterOf<S>::kLanes;
        S* l = reinterpret_cast<S*>(s.a);
        S* inverse = reinterpret_cast<S*>(s.inverse);
        R* x = reinterpret_cast<R*>(s.x);
        const S* entries = stored + block_offset(n(), block);
        for (int t = 0; t < triangle_size(n()); ++t) l[t] = entries[t * entry_stride(n())];
        invert_diagonal<N>(l, inverse, n());
        const bool bad = poison_of_pivots<N>(l, inverse, n()) != 0;
        const S* from = rhs.block(block);
        S* to = out.block(block);
        for (int64_t r = 0; r < q.rhs_count; r += kLanes) {
            const int width = static_cast<int>(q.rhs_count - r < kLanes ? q.rhs_count - r : kLanes);
            for (int k = 0; k < n(); ++k) x[k] = load_part<R>(from + rhs.element(k) + r, width);
            solve_in_place(l, inverse, x);
            for (int k = 0; k < n(); ++k) store_part(to + out.element(k) + r, bad ? R{} : x[k], width);
        }
    }

    // F <- decay F + (1 - decay) g g^T, in lanes; after_row(i) follows row i.
    template <class AfterRow>
    MBF_FN void load_and_accumulate(Group group, AfterRow after_row) const {
        constexpr bool kOnePass = N > 0 && is_tiled(N);
        const int n = size_of<N>(n_);
        const S decay = q.decay, weight = 1 - q.decay;
        const S* tile = fisher + block_offset(n, group.first);
        if (!kOnePass) load_triangle<N, S, kParts>(s.f, fisher, n, group);
        MBF_UNROLL
        for (int i = 0; i < n; ++i) {
            const V u = weight * s.g[i];
            MBF_UNROLL
            for (int j = 0; j <= i; ++j) {
                const int t = row(i) + j;
                const V f = kOnePass ? load_pack<S, kParts>(tile + t * kTileBlocks) : s.f[t];
                s.f[t] = accumulate_entry(f, u, s.g[j], decay);
            }
            after_row(i);
        }
    }

    // lambda; `zero_block`: that of a block whose trace is zero, when damping is relative.
    MBF_FN V damping(S zero_block) const {
        const V given = V{} + S(q.damping.value);
        if (!q.relative) return given;
        const V t = trace<N, V>(s.f, n());
        return select(t > V{}, given * (t / S(n())), V{} + zero_block);
    }

    // A <- L with L L^T = F + lambda I.
    MBF_SHARED void factor_damped(S zero_block) const {
        factor<N, kTile>(s.a, s.inverse, s.f, damping(zero_block), n());
    }

    void load_factor(Group group) const {
        load_triangle<N, S, kParts>(s.a, stored, n(), group);
        invert_diagonal<N>(s.a, s.inverse, n());
    }

    template <class L, class X>
    MBF_FN void solve_in_place(L l, L inverse, X* x) const {
        if constexpr (N > 0)
            solve<N>(l, inverse, x, N);
        else
            solve_in_tiles<4>(l, inverse, x, n_);
    }

    // x <- (L L^T)^-1 d; returns info over the pivots, g, d and x. The first question is for the pivots and x alone:
    // what is not finite in g is in F or d, and what is not finite in d is in x.
    MBF_SHARED V solve_checked() const {
        for (int k = 0; k < n(); ++k) s.x[k] = s.d[k];
        solve_in_place(s.a, s.inverse, s.x);
        V info{};
        if (!any(poison_of_pivots<N>(s.a, s.inverse, n()) + poison<N>(s.x, n()) != V{})) return info;
        info = flag_pivots<N>(info, s.a, s.inverse, n());
        info = flag_nonfinite<N>(info, s.g, n());
        info = flag_nonfinite<N>(info, s.d, n());
        return flag_nonfinite<N>(info, s.x, n());
    }

    // x <- (F + lambda I)^-1 d, while `next` fetches; returns info. Blocks whose elimination is in doubt go the longer
    // way through Cholesky, which takes denormal pivots, whose inverses overflow, and tells what failed.
    MBF_SHARED V eliminate_checked(S zero_block, Next& next) const {
        eliminate<N, kTile>(s.a, s.inverse, s.f, damping(zero_block), n(), [&] { next.fetch_share(); });
        const V doubt = doubt_of<N>(s.inverse, s.x, n());
        if (!any(doubt != V{})) return V{};
        V good[N > 0 ? N : MBF_MAX_SIZE];
        for (int k = 0; k < n(); ++k) good[k] = s.x[k];
        factor_damped(zero_block);
        const V info = solve_checked();
        for (int k = 0; k < n(); ++k) s.x[k] = select(doubt != V{}, s.x[k], good[k]);
        return select(doubt != V{}, info, V{});
    }

    // The step before its length: with a factor that is kept or was, Cholesky's.
    MBF_FN V find_step(Group group, Next& ahead) const {
        if (q.refactor && !stored) return eliminate_checked(1, ahead);
        if (q.refactor)
            factor_damped(1);
        else
            load_factor(group);
        const V info = solve_checked();
        if (q.refactor) store_triangle<N, S, kParts>(s.a, stored, n(), group, info);
        return info;
    }

    // M <- mu M + g; d = mu M + g (Nesterov) or M.
    MBF_FN void form_direction(Group group, Next& ahead) const {
        const S mu = q.momentum, sign = q.maximize ? -1 : 1;
        grad.load(s.g, group);
        ahead.fetch_share();
        rhs.load(s.m, group);
        ahead.fetch_share();
        for (int k = 0; k < n(); ++k) {
            s.g[k] = sign * s.g[k];
            s.m[k] = mu * s.m[k] + s.g[k];
            s.d[k] = q.nesterov ? mu * s.m[k] + s.g[k] : s.m[k];
        }
    }

    // The same for tensors whose blocks follow each other: in the order of memory, where M needs no transpose. The new
    // M stays in the workspace until it is known which blocks are good.
    MBF_FN void form_direction_of_run(Group group, Next& ahead) const {
        using R = Register<S>;
        constexpr int kLanes = RegisterOf<S>::kLanes;
        const S mu = q.momentum, sign = q.maximize ? -1 : 1;
        const S *g = grad.block(group.first), *m = rhs.block(group.first);
        S *new_m = reinterpret_cast<S*>(s.m), *new_d = reinterpret_cast<S*>(s.w);
        for (int i = 0; i < N * W; i += kLanes) {
            const R g_i = sign * load<R>(g + i), m_i = mu * load<R>(m + i) + g_i;
            mbf::store(new_m + i, m_i);
            mbf::store(new_d + i, q.nesterov ? mu * m_i + g_i : m_i);
        }
        for (int p = 0; p < kParts; ++p) {
            ahead.fetch_share();
            gather_run<N, S, kParts>(s.g, p, g + p * kLanes * N);  // its sign does not count
            ahead.fetch_share();
            gather_run<N, S, kParts>(s.d, p, new_d + p * kLanes * N);
        }
    }

    // `move` in the order of memory.
    MBF_FN void move_run(Group group, V info) const {
        using R = Register<S>;
        constexpr int kLanes = RegisterOf<S>::kLanes;
        const S shrink = 1 - q.lr.value * q.weight_decay;
        const S* new_m = reinterpret_cast<S*>(s.m);
        S *x = reinterpret_cast<S*>(s.w), *m = rhs.block(group.first), *w = out.block(group.first);
        for (int p = 0; p < kParts; ++p) scatter_run<N, S, kParts>(s.x, p, x + p * kLanes * N);
        if (!any(info != V{})) {
            for (int i = 0; i < N * W; i += kLanes) {
                mbf::store(m + i, load<R>(new_m + i));
                mbf::store(w + i, shrink * load<R>(w + i) - load<R>(x + i));
            }
            return;
        }
        for (int i = 0; i < N * W; ++i) {
            if (info[i / N] != 0) continue;
            m[i] = new_m[i];
            w[i] = shrink * w[i] - x[i];
        }
    }

    // W <- (1 - lr weight_decay) W - X, and M, of the good blocks.
    MBF_FN void move(Group group, V info) const {
        const S shrink = 1 - q.lr.value * q.weight_decay;
        out.load(s.w, group);
        for (int k = 0; k < n(); ++k) s.w[k] = shrink * s.w[k] - s.x[k];
        rhs.store(s.m, group, info);
        out.store(s.w, group, info);
    }

    // X <- lr P, or lr (|u| / |P|) P when grafted, in place of P.
    void scale_step(V adam) const {
        V rate = V{} + S(q.lr.value);
        if (q.graft) rate = rate * graft(adam);
        for (int k = 0; k < n(); ++k) s.x[k] = rate * s.x[k];
    }

    // |u| / |P|: at once where |P|^2 is far from the ends of the range, as it nearly always is.
    MBF_FN V graft(V adam) const {
        const int n = size_of<N>(n_);
        V length{};
        MBF_UNROLL
        for (int k = 0; k < n; ++k) length = length + s.x[k] * s.x[k];
        const V scale = square_root(adam) / square_root(length);
        const V above = select(length > V{} + S(1e-30), length, V{});
        const V within = select(above < V{} + S(1e30), above, V{});
        if (!any(within == V{})) return scale;
        const V anywhere = graft_scale<N>(s.f, s.d, s.x, momentum_scale, fisher_scale, S(q.eps), n);
        return select(within == V{}, anywhere, scale);
    }

    void clear_bad(V* x, int length, V bad) const {
        if (!any(bad != V{})) return;
        for (int k = 0; k < length; ++k) x[k] = select(bad != V{}, V{}, x[k]);
    }

    void report(V info, Group group) const {
        if (problem.info)
            for (int l = 0; l < group.active; ++l) problem.info[group.first + l] = static_cast<int32_t>(info[l]);
        if (!any(info != V{})) return;
        int64_t bad = 0;
        for (int l = 0; l < group.active; ++l) bad += info[l] != 0;
        if (problem.skipped) __atomic_fetch_add(problem.skipped, bad, __ATOMIC_RELAXED);
    }

    const Problem& problem;
    const Parameters& q;
    const int n_;
    const S momentum_scale, fisher_scale;  // of a step: undo the zero start of M and F
    const Workspace<V> s;
    S* const fisher;
    S* const stored;
    const LaneView<N, S, kParts> grad, rhs, out;
};

}  // namespace

namespace cpu {

void MBF_KERNEL(Op op, const Problem& problem, const Parameters& parameters, int n, int64_t first, int64_t last,
                void* scratch) {
    switch (n) {
#define MBF_CASE(N) \
    case N: return Kernels<N>(problem, parameters, n, scratch).run(op, first, last);
        MBF_FOR_EACH_SIZE(MBF_CASE)
#undef MBF_CASE
        default: return Kernels<0>(problem, parameters, n, scratch).run(op, first, last);
    }
}

}  // namespace cpu
}  // namespace mbf
