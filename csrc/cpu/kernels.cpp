// The five ops on the CPU, W mini-blocks at a time. Compiled once per instruction set and scalar type:
// MBF_KERNEL names the entry point, MBF_SCALAR the scalar. Everything else has internal linkage, so that
// the linker can never merge code of two instruction sets.
#include "kernels.h"

#include "memory.h"

#include "../numerics.h"

namespace mbf {
namespace {

using S = MBF_SCALAR;
using V = Lanes<S>;
constexpr int W = LanesOf<S>::kCount;

// Per-thread arrays of one group, entry-major: entry t of all W blocks is one V.
struct Workspace {
    V *f, *a, *inverse, *g, *m, *x, *w;

    Workspace(void* scratch, int n)
        : f(static_cast<V*>(scratch)), a(f + triangle_size(n)), inverse(a + triangle_size(n)),
          g(inverse + n), m(g + n), x(m + n), w(x + n) {}
};

template <int N>
struct Kernels {
    const Problem& problem;
    const Parameters& q;
    const int n;
    const Workspace s;

    // A <- L with L L^T = F + lambda I. `zero_block_lambda` is the damping of a block whose trace is zero
    // when damping is relative.
    V factor_damped(S zero_block_lambda) const {
        V lambda = V{} + S(q.damping);
        if (q.relative) {
            const V t = trace<N>(s.f, n);
            lambda = t > V{} ? lambda * (t / S(n)) : V{} + zero_block_lambda;
        }
        damp<N>(s.a, s.f, lambda, n);
        return factor<N, kFactorTile>(s.a, s.inverse, n);
    }

    V load_factor(Group group) const {
        load_triangle<S>(s.a, problem.factor, n, group);
        return invert_diagonal<N, V, V>(s.a, s.inverse, n);
    }

    void clear_bad(V* x, int length, V info) const {
        if (!any(info)) return;
        for (int k = 0; k < length; ++k) x[k] = info == V{} ? x[k] : V{};
    }

    void report(V info, Group group) const {
        int64_t bad = 0;
        for (int l = 0; l < group.active; ++l) {
            problem.info[group.first + l] = static_cast<int32_t>(info[l]);
            bad += info[l] != 0;
        }
        if (bad && problem.skipped) __atomic_fetch_add(problem.skipped, bad, __ATOMIC_RELAXED);
    }

    void accumulate_group(Group group) const {
        load_triangle<S>(s.f, problem.fisher, n, group);
        load_vector<S>(s.g, problem.grad, n, group);
        accumulate<N>(s.f, s.g, S(q.decay), S(1 - q.decay), n);
        store_triangle<S>(s.f, problem.fisher, n, group, flag_nonfinite_diagonal<N>(V{}, s.f, n));
    }

    void factor_group(Group group) const {
        load_triangle<S>(s.f, problem.fisher, n, group);
        const V info = factor_damped(0);
        clear_bad(s.a, triangle_size(n), info);
        store_triangle<S>(s.a, problem.factor, n, group, V{});
        report(info, group);
    }

    void fused_group(Group group) const {
        load_triangle<S>(s.f, problem.fisher, n, group);
        load_vector<S>(s.g, problem.grad, n, group);
        load_vector<S>(s.x, problem.rhs, n, group);
        accumulate<N>(s.f, s.g, S(q.decay), S(1 - q.decay), n);
        V info = factor_damped(0);
        info = flag_nonfinite<N>(info, s.g, n);
        info = flag_nonfinite<N>(info, s.x, n);
        solve<N>(s.a, s.inverse, s.x, n);
        info = flag_nonfinite<N>(info, s.x, n);
        clear_bad(s.x, n, info);
        store_triangle<S>(s.f, problem.fisher, n, group, info);
        store_vector<S>(s.x, problem.out, n, group, V{});
        report(info, group);
    }

    // F's diagonal is all that a grafted step needs of F when L is cached.
    void load_step_fisher(Group group) const {
        if (q.update || q.refactor || q.graft) load_triangle<S>(s.f, problem.fisher, n, group);
        if (q.update) accumulate<N>(s.f, s.g, S(q.decay), S(1 - q.decay), n);
    }

    void step_group(Group group) const {
        load_vector<S>(s.g, problem.grad, n, group);
        load_vector<S>(s.m, problem.rhs, n, group);
        load_vector<S>(s.w, problem.out, n, group);
        const S mu = q.momentum, sign = q.maximize ? -1 : 1;
        for (int k = 0; k < n; ++k) {
            s.g[k] = sign * s.g[k];
            s.m[k] = mu * s.m[k] + s.g[k];
            s.x[k] = q.nesterov ? mu * s.m[k] + s.g[k] : s.m[k];
        }
        load_step_fisher(group);
        V info = q.refactor ? factor_damped(1) : load_factor(group);
        info = flag_nonfinite<N>(info, s.g, n);
        info = flag_nonfinite<N>(info, s.x, n);
        V* direction = s.g;  // the gradient is used up
        for (int k = 0; k < n; ++k) direction[k] = s.x[k];
        solve<N>(s.a, s.inverse, s.x, n);
        info = flag_nonfinite<N>(info, s.x, n);
        const S shrink = 1 - q.lr * q.weight_decay;
        V rate = V{} + S(q.lr);
        if (q.graft) {
            V* diagonal = s.inverse;  // used up as well
            for (int k = 0; k < n; ++k) diagonal[k] = s.f[row(k) + k];
            rate = S(q.lr) * graft_scale<N>(diagonal, direction, s.x, S(problem.momentum_scale),
                                            S(problem.fisher_scale), S(q.eps), n);
        }
        for (int k = 0; k < n; ++k) s.w[k] = shrink * s.w[k] - rate * s.x[k];

        if (q.update) store_triangle<S>(s.f, problem.fisher, n, group, info);
        if (q.refactor && problem.factor) store_triangle<S>(s.a, problem.factor, n, group, info);
        store_vector<S>(s.m, problem.rhs, n, group, info);
        store_vector<S>(s.w, problem.out, n, group, info);
        report(info, group);
    }

    BlockView shifted(const BlockView& view, int64_t shift) const {
        BlockView moved = view;
        moved.base = static_cast<S*>(view.base) + shift;
        return moved;
    }

    // Lanes are blocks: right-hand side r of every block at once.
    void solve_group(Group group) const {
        const V info = load_factor(group);
        for (int64_t r = 0; r < q.rhs_count; ++r) {
            load_vector<S>(s.x, shifted(problem.rhs, r), n, group);
            solve<N>(s.a, s.inverse, s.x, n);
            clear_bad(s.x, n, info);
            store_vector<S>(s.x, shifted(problem.out, r), n, group, V{});
        }
    }

    // Lanes are right-hand sides of one block: W of them at once.
    void solve_many(int64_t block) const {
        S* l = reinterpret_cast<S*>(s.a);
        S* inverse = reinterpret_cast<S*>(s.inverse);
        const S* stored = static_cast<const S*>(problem.factor) + block_offset(n, block);
        for (int t = 0; t < triangle_size(n); ++t) l[t] = stored[t * entry_stride(n)];
        const bool bad = invert_diagonal<N, S, S>(l, inverse, n) != 0;
        const S* rhs = static_cast<const S*>(problem.rhs.base) + offset(problem.rhs.block, block);
        S* out = static_cast<S*>(problem.out.base) + offset(problem.out.block, block);
        for (int64_t r = 0; r < q.rhs_count; r += W) {
            const int64_t width = q.rhs_count - r < W ? q.rhs_count - r : W;
            for (int k = 0; k < n; ++k) {
                s.x[k] = V{};
                memcpy(&s.x[k], rhs + offset(problem.rhs.element, k) + r, width * sizeof(S));
            }
            solve<N>(l, inverse, s.x, n);
            clear_bad(s.x, n, bad ? V{} + 1 : V{});
            for (int k = 0; k < n; ++k)
                memcpy(out + offset(problem.out.element, k) + r, &s.x[k], width * sizeof(S));
        }
    }

    void run(Op op, int64_t first, int64_t last) const {
        if (op == Op::kSolve && q.rhs_count >= W) {
            for (int64_t b = first; b < last; ++b) solve_many(b);
            return;
        }
        for (int64_t b = first; b < last; b += W) {
            const Group group{b, static_cast<int>(last - b < W ? last - b : W)};
            switch (op) {
                case Op::kAccumulate: accumulate_group(group); break;
                case Op::kFactor: factor_group(group); break;
                case Op::kSolve: solve_group(group); break;
                case Op::kFused: fused_group(group); break;
                case Op::kStep: step_group(group); break;
            }
        }
    }
};

}  // namespace

namespace cpu {

void MBF_KERNEL(Op op, const Problem& problem, const Parameters& parameters, int n, int64_t first, int64_t last,
                void* scratch) {
    const Workspace workspace(scratch, n);
    switch (n) {
#define MBF_CASE(N) \
    case N: return Kernels<N>{problem, parameters, N, workspace}.run(op, first, last);
        MBF_FOR_EACH_SIZE(MBF_CASE)
#undef MBF_CASE
        default: return Kernels<0>{problem, parameters, n, workspace}.run(op, first, last);
    }
}

}  // namespace cpu
}  // namespace mbf
