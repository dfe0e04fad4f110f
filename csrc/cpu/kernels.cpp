// The five ops on the CPU, W mini-blocks at a time. Compiled once per instruction set and scalar type:
// MBF_KERNEL names the entry point, MBF_SCALAR the scalar. Everything else has internal linkage, so that
// the linker can never merge code of two instruction sets.
#include "kernels.h"

#include "memory.h"

namespace mbf {
namespace {

using S = MBF_SCALAR;

// Per-thread arrays of one group, entry-major: entry t of all W blocks is one V.
template <class V>
struct Workspace {
    V *f, *a;              // F, and L with L L^T = F + lambda I
    V* inverse;            // 1 / diag(L)
    V *g, *m, *d, *x, *w;  // gradient, momentum, right-hand side, solution, weights

    Workspace(void* scratch, int n)
        : f(static_cast<V*>(scratch)),
          a(f + triangle_size(n)),
          inverse(a + triangle_size(n)),
          g(inverse + n),
          m(g + n),
          d(m + n),
          x(d + n),
          w(x + n) {}
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
        load_and_accumulate(group);
        const V bad = poison_of_diagonal<N, V>(s.f, n());
        store_triangle<N, S, kParts>(s.f, fisher, n(), group, bad);
    }

    void factor_group(Group group) const {
        load_triangle<N, S, kParts>(s.f, fisher, n(), group);
        factor_damped(0, nullptr);
        V info{};
        if (any(poison_of_pivots<N>(s.a, s.inverse, n()) != V{})) info = flag_pivots<N>(info, s.a, s.inverse, n());
        clear_bad(s.a, triangle_size(n()), info);
        store_triangle<N, S, kParts>(s.a, stored, n(), group, V{});
        report(info, group);
    }

    void fused_group(Group group) const {
        Next ahead(fisher, grad, rhs, out, n_, group.next);
        grad.load(s.g, group);
        ahead.fetch_share();
        rhs.load(s.d, group);
        ahead.fetch_share();
        load_and_accumulate(group);
        ahead.fetch_share();
        ahead.fetch_share();
        factor_damped(0, &ahead);
        ahead.fetch_share();
        const V info = solve_checked();
        ahead.fetch_share();
        clear_bad(s.x, n(), info);
        store_triangle<N, S, kParts>(s.f, fisher, n(), group, info);
        ahead.fetch_share();
        out.store(s.x, group, V{});
        ahead.fetch_share();
        report(info, group);
    }

    void step_group(Group group) const {
        Next ahead(fisher, grad, rhs, out, n_, group.next);
        const bool runs = grad.is_run(group) && rhs.is_run(group) && out.is_run(group);
        if constexpr (N > 0)
            if (runs) form_direction_of_run(group);
        ahead.fetch_share();
        if (!runs) grad.load(s.g, group);
        ahead.fetch_share();
        if (!runs) {
            rhs.load(s.m, group);
            form_direction();
        }
        ahead.fetch_share();
        if (q.update)
            load_and_accumulate(group);
        else if (q.refactor || q.graft)
            load_triangle<N, S, kParts>(s.f, fisher, n(), group);
        ahead.fetch_share();
        if (q.refactor)
            factor_damped(1, &ahead);
        else
            load_factor(group);
        ahead.fetch_share();
        const V info = solve_checked();
        ahead.fetch_share();
        scale_step();
        ahead.fetch_share();
        if (q.update) store_triangle<N, S, kParts>(s.f, fisher, n(), group, info);
        ahead.fetch_share();
        if (q.refactor && stored) store_triangle<N, S, kParts>(s.a, stored, n(), group, info);
        if constexpr (N > 0)
            if (runs) move_run(group, info);
        ahead.fetch_share();
        if (!runs) {
            out.load(s.w, group);
            move_weights();
            rhs.store(s.m, group, info);
            out.store(s.w, group, info);
        }
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

    // F <- decay F + (1 - decay) g g^T, in lanes.
    MBF_SHARED void load_and_accumulate(Group group) const {
        const S decay = q.decay, weight = 1 - q.decay;
        if constexpr (is_tiled(N) && N > 0) {  // one pass
            const S* tile = fisher + block_offset(N, group.first);
            MBF_UNROLL
            for (int i = 0; i < N; ++i) {
                const V u = weight * s.g[i];
                MBF_UNROLL
                for (int j = 0; j <= i; ++j) {
                    const V f = load_pack<S, kParts>(tile + (row(i) + j) * kTileBlocks);
                    s.f[row(i) + j] = accumulate_entry(f, u, s.g[j], decay);
                }
            }
        } else {
            load_triangle<N, S, kParts>(s.f, fisher, n(), group);
            accumulate<N>(s.f, s.g, decay, weight, n());
        }
    }

    // A <- L with L L^T = F + lambda I, while `next` fetches. `zero_block_lambda`: the damping of a block whose trace
    // is zero, when damping is relative.
    MBF_SHARED void factor_damped(S zero_block_lambda, Next* next) const {
        V lambda = V{} + S(q.damping.value);
        if (q.relative) {
            const V t = trace<N, V>(s.f, n());
            lambda = select(t > V{}, lambda * (t / S(n())), V{} + zero_block_lambda);
        }
        factor<N, kTile>(s.a, s.inverse, s.f, lambda, n(), [=] {
            if (next) next->fetch_share();
        });
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

    // x <- (L L^T)^-1 d; returns info over the pivots, g, d and x.
    MBF_SHARED V solve_checked() const {
        for (int k = 0; k < n(); ++k) s.x[k] = s.d[k];
        solve_in_place(s.a, s.inverse, s.x);
        V info{};
        const V doubt =
            poison_of_pivots<N>(s.a, s.inverse, n()) + poison<N>(s.g, n()) + poison<N>(s.d, n()) + poison<N>(s.x, n());
        if (!any(doubt != V{})) return info;
        info = flag_pivots<N>(info, s.a, s.inverse, n());
        info = flag_nonfinite<N>(info, s.g, n());
        info = flag_nonfinite<N>(info, s.d, n());
        return flag_nonfinite<N>(info, s.x, n());
    }

    // M <- mu M + g; d = mu M + g (Nesterov) or M.
    void form_direction() const {
        const S mu = q.momentum, sign = q.maximize ? -1 : 1;
        for (int k = 0; k < n(); ++k) {
            s.g[k] = sign * s.g[k];
            s.m[k] = mu * s.m[k] + s.g[k];
            s.d[k] = q.nesterov ? mu * s.m[k] + s.g[k] : s.m[k];
        }
    }

    // The same for tensors whose blocks follow each other: in the order of memory, where M needs no transpose. The new
    // M stays in the workspace until it is known which blocks are good.
    void form_direction_of_run(Group group) const {
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
            gather_run<N, S, kParts>(s.g, p, g + p * kLanes * N);  // its sign does not count
            gather_run<N, S, kParts>(s.d, p, new_d + p * kLanes * N);
        }
    }

    // Likewise W <- (1 - lr weight_decay) W - X, and M.
    void move_run(Group group, V info) const {
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

    // X <- lr P, or lr (|u| / |P|) P when grafted, in place of P.
    void scale_step() const {
        V rate = V{} + S(q.lr.value);
        if (q.graft) {
            const S momentum_scale = (1 - q.momentum) / problem.momentum_weight.value;
            const S fisher_scale = 1 / problem.fisher_weight.value;
            rate = rate * graft_scale<N>(s.f, s.d, s.x, momentum_scale, fisher_scale, S(q.eps), n());
        }
        for (int k = 0; k < n(); ++k) s.x[k] = rate * s.x[k];
    }

    // W <- (1 - lr weight_decay) W - X
    void move_weights() const {
        const S shrink = 1 - q.lr.value * q.weight_decay;
        for (int k = 0; k < n(); ++k) s.w[k] = shrink * s.w[k] - s.x[k];
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
