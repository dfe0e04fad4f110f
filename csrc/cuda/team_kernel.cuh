// A team of PR x PC lanes per block: a group of lanes within a warp, or a whole thread block.
//
// The lanes form a grid; lane (r, c) owns the entries (i, j) with i = r mod PR and j = c mod PC, in registers: entry
// [a][b] is (a PR + r, b PC + c). The triangle is factored column by column: whoever owns a column shows it to the team
// in shared memory, and everybody updates what he owns. A right-hand side rides along as one more row, so the forward
// substitution is done with the last column. Blocks are padded to N with the identity.
#pragma once

#include "staging.cuh"
#include "table.h"

namespace mbf {
namespace {

template <class S, int N, int PR, int PC, int kTeams>
class TeamKernel {
    static constexpr int kLanes = PR * PC;
    static constexpr int kRows = N / PR, kCols = N / PC;  // row and column slots of a lane
    static constexpr int kFold = PR / PC;                 // column slots per row slot
    static_assert(N % PR == 0 && PR % PC == 0 && (kLanes < 32 ? 32 % kLanes : kLanes % 32) == 0);
    static_assert(kLanes <= 32 || kTeams == 1);

    // Of a team, in shared memory: two columns in turn, each with its entry of the right-hand side; what each pivot
    // leaves for the backward substitution; a solution; a number per lane to reduce.
    static constexpr int kColumn = N + 4;
    static constexpr int kTeamScalars = 2 * kColumn + 3 * N + kLanes;

public:
    static constexpr int kBlocks = kTeams;  // of a thread block
    static constexpr int kThreads = kTeams * kLanes;
    static constexpr int kMinBlocks = 1;  // spills cost more than occupancy
    static size_t shared_bytes(int n) {
        const int scalars = padded_triangle_size(n) + 3 * vector_pitch(n) + kTeamScalars;
        return kTeams * (scalars * sizeof(S) + sizeof(int));
    }

    MBF_FN TeamKernel(const Problem& problem, const Parameters& parameters, int n, int unit)
        : problem_(problem),
          q_(parameters),
          n_(n),
          first_(static_cast<int64_t>(unit) * kBlocks),
          team_(threadIdx.x / kLanes),
          lane_(threadIdx.x % kLanes),
          r_(lane_ % PR),
          c_(lane_ / PR) {
        const int64_t left = problem.count - first_;
        active_ = left < kBlocks ? static_cast<int>(left) : kBlocks;
    }

    MBF_FN void run_op(Op op) {
        switch (op) {
            case Op::kAccumulate: return accumulate_blocks();
            case Op::kFactor: return factor_blocks();
            case Op::kSolve: return solve_blocks();
            default: return fused_blocks();
        }
    }

    MBF_FN void run_step() {
        if (q_.update || q_.refactor || q_.graft) fetch_triangles(fisher());
        fetch(0, problem_.grad);
        fetch(1, problem_.rhs);
        fetch(2, problem_.out);
        begin();
        if (is_active()) step_block();
        __syncthreads();
        store_vectors<S, kBlocks>(vectors(1), problem_.rhs, n_, first_, active_);
        store_vectors<S, kBlocks>(vectors(2), problem_.out, n_, first_, active_);
    }

private:
    // What decides info: the lowest of pivots, then g, then the right-hand side, then the solution.
    enum Stage { kPivot = 0, kGrad = 256, kRhs = 512, kSolution = 768, kGood = 1024 };

    MBF_FN void accumulate_blocks() {
        fetch_triangles(fisher());
        fetch(0, problem_.grad);
        begin();
        if (!is_active()) return;
        take_fisher(true);
        sync();
        if (poison_of_diagonal<0, S>(triangle(), n_) == 0) store_triangle(fisher());
    }

    MBF_FN void factor_blocks() {
        fetch_triangles(fisher());
        begin();
        if (!is_active()) return;
        take_fisher(false);
        sync();
        damp(S(0));
        const int info = sweep<true, false>();
        sync();  // everybody has read the trace
        give_factor(info != 0);
        sync();
        store_triangle(stored());
        if (lane_ == 0) report(problem_, block(), info);
    }

    // One right-hand side after the other: L stays in registers.
    MBF_FN void solve_blocks() {
        fetch_triangles(stored());
        begin();
        if (is_active()) take(triangle());
        for (int64_t k = 0; k < q_.rhs_count; ++k) {
            BlockView rhs = problem_.rhs, out = problem_.out;
            rhs.base = static_cast<S*>(rhs.base) + k;
            out.base = static_cast<S*>(out.base) + k;
            fetch(0, rhs);
            await_copies();
            if (is_active()) {
                take_rhs(vector(0));
                const int bad = sweep<false, true>();
                sync();  // everybody has taken the right-hand side
                substitute_back(vector(0));
                sync();
                for (int i = lane_; bad && i < n_; i += kLanes) vector(0)[i] = 0;
            }
            __syncthreads();
            store_vectors<S, kBlocks>(vectors(0), out, n_, first_, active_);
            __syncthreads();  // before the next one overwrites it
        }
    }

    MBF_FN void fused_blocks() {
        fetch_triangles(fisher());
        fetch(0, problem_.grad);
        fetch(1, problem_.rhs);
        begin();
        if (is_active()) fused_block();
        __syncthreads();
        store_vectors<S, kBlocks>(vectors(1), problem_.out, n_, first_, active_);
    }

    MBF_FN void fused_block() {
        S *g = vector(0), *x = vector(1);
        flag_vector(g, kGrad);
        flag_vector(x, kRhs);
        take_fisher(true);
        sync();
        damp(S(0));
        take_rhs(x);
        flag_pivot(sweep<true, true>());
        sync();  // everybody has taken the right-hand side
        substitute_back(x);
        sync();
        flag_vector(x, kSolution);
        const int info = agreed_info();
        if (!info) store_triangle(fisher());
        for (int k = lane_; info && k < n_; k += kLanes) x[k] = 0;
        if (lane_ == 0) report(problem_, block(), info);
    }

    MBF_FN void step_block() {
        const Momentum<S> momentum(q_);
        S *g = vector(0), *m = vector(1), *w = vector(2);
        for (int k = lane_; k < n_; k += kLanes) {
            g[k] = momentum.sign * g[k];
            const S d = momentum.direction(m[k], g[k]);
            if (!(g[k] - g[k] == 0)) flag_stage(kGrad, k);
            if (!(d - d == 0)) flag_stage(kRhs, k);
        }
        sync();
        if (q_.update || q_.refactor) take_fisher(q_.update);
        sync();
        if (q_.refactor)
            damp(S(1));
        else
            take(stored() + block_offset(n_, block()), static_cast<int>(entry_stride(n_)));  // F keeps its place
        MBF_UNROLL
        for (int a = 0; a < kRows; ++a) {
            const int i = a * PR + r_;
            rhs_[a] = i < n_ ? momentum.direction(m[i], g[i]) : S(0);
        }
        flag_pivot(q_.refactor ? sweep<true, true>() : sweep<false, true>());
        sync();
        S* x = solution();
        substitute_back(x);
        sync();
        flag_vector(x, kSolution);
        const Rates<S> rates(problem_, q_);
        S rate = rates.lr;
        if (q_.graft) rate = rate * team_graft_scale(rates, momentum, x);
        const int info = agreed_info();
        if (lane_ == 0) report(problem_, block(), info);
        if (info) return;
        if (q_.update) store_triangle(fisher());
        MBF_DO_NOT_UNROLL
        for (int k = lane_; k < n_; k += kLanes) {
            m[k] = momentum.next(m[k], g[k]);
            w[k] = rates.shrink * w[k] - rate * x[k];
        }
        if (q_.refactor && problem_.factor) {
            sync();  // F is stored: L takes its place
            give_factor(false);
            sync();
            store_triangle(stored());
        }
    }

    // F, brought up to date with g and written back, or just read; the identity beyond n.
    MBF_FN void take_fisher(bool update) {
        if (!update) return take(triangle());
        const S decay = q_.decay, weight = 1 - q_.decay;
        S* f = triangle();
        const S* g = vector(0);
        for_each_entry([&](S& entry, int i, int j, bool inside) {
            if (!inside) {
                entry = i == j ? S(1) : S(0);
                return;
            }
            entry = accumulate_entry(f[row(i) + j], weight * g[i], g[j], decay);
            f[row(i) + j] = entry;
        });
    }

    MBF_FN void take(const S* from, int stride = 1) {
        for_each_entry([&](S& entry, int i, int j, bool inside) {
            entry = inside ? from[(row(i) + j) * stride] : i == j ? S(1) : S(0);
        });
    }

    // L, or zero, to where F was.
    MBF_FN void give_factor(bool bad) {
        S* l = triangle();
        for_each_entry([&](S& entry, int i, int j, bool inside) {
            if (inside) l[row(i) + j] = bad ? S(0) : entry;
        });
    }

    MBF_FN void take_rhs(const S* from) {
        MBF_UNROLL
        for (int a = 0; a < kRows; ++a) {
            const int i = a * PR + r_;
            rhs_[a] = i < n_ ? from[i] : S(0);
        }
    }

    // Adds lambda to the diagonal; F is up to date in shared memory.
    MBF_FN void damp(S zero_block_lambda) {
        const S sum = q_.relative ? trace<0, S>(triangle(), n_) : S(0);
        const S lambda = block_damping<S>(q_, sum, n_, zero_block_lambda);
        for_each_entry([&](S& entry, int i, int j, bool inside) {
            if (inside && i == j) entry = entry + lambda;
        });
    }

    // Goes through the columns. kFactor: entries become those of L with L L^T = A; otherwise they are L already.
    // kForward: rhs_ becomes L^-1 rhs. Returns the first bad pivot.
    template <bool kFactor, bool kForward>
    MBF_FN int sweep() {
        S info = 0;
        MBF_UNROLL
        for (int b = 0; b < kCols; ++b) {
            const int a0 = b / kFold;  // the row slot of these columns' pivots
            MBF_DO_NOT_UNROLL
            for (int owner = 0; owner < PC; ++owner) {
                const int j = b * PC + owner, pivot_row = j % PR;
                if (j >= n_) break;
                S* column = columns() + (j & 1) * kColumn;
                if (c_ == owner) {
                    MBF_UNROLL
                    for (int a = a0; a < kRows; ++a) column[r_ * kRows + a] = entries_[a][b];
                    if (kForward && r_ == pivot_row) column[N] = rhs_[a0];
                }
                sync();
                const S pivot = column[pivot_row * kRows + a0];
                const S root = kFactor ? square_root(pivot) : pivot;
                const S inverse = 1 / root;
                const S one = root * inverse;
                info = flag(info, one == one, j + 1);

                S below[kRows];  // the column of L in this lane's rows, without the pivot and what lies above
                MBF_UNROLL
                for (int a = a0; a < kRows; ++a) {
                    below[a] = kFactor ? column[r_ * kRows + a] * inverse : column[r_ * kRows + a];
                    if (a == a0 && r_ <= pivot_row) below[a] = 0;
                }
                if (kForward) {
                    const S y = column[N] * inverse;
                    MBF_UNROLL
                    for (int a = a0; a < kRows; ++a) rhs_[a] = rhs_[a] - below[a] * y;
                    if (lane_ == 0) forward()[j] = y;
                    if (lane_ == 0) inverses()[j] = inverse;
                }
                if (kFactor) {
                    if (c_ == owner) {
                        MBF_UNROLL
                        for (int a = a0; a < kRows; ++a) entries_[a][b] = a == a0 && r_ == pivot_row ? root : below[a];
                    }
                    MBF_UNROLL
                    for (int b2 = b; b2 < kCols; ++b2) {
                        // row b2 PC + c of the column, as those rows' owners showed it
                        S across = column[(b2 % kFold * PC + c_) * kRows + b2 / kFold] * inverse;
                        if (b2 == b && c_ <= owner) across = 0;  // columns that are done
                        MBF_UNROLL
                        for (int a = b2 / kFold; a < kRows; ++a) entries_[a][b2] = entries_[a][b2] - below[a] * across;
                    }
                }
            }
        }
        return static_cast<int>(info);
    }

    // x <- L^-T y, from the last row to the first. Each lane sums what its own rows contribute to its columns.
    MBF_FN void substitute_back(S* x) {
        S sums[kCols];
        MBF_UNROLL
        for (int b = 0; b < kCols; ++b) sums[b] = 0;
        MBF_UNROLL
        for (int b = kCols - 1; b >= 0; --b) {
            const int a0 = b / kFold;
            MBF_DO_NOT_UNROLL
            for (int owner = PC - 1; owner >= 0; --owner) {
                const int k = b * PC + owner;
                if (k >= n_) continue;
                S* partial = columns() + (k & 1) * kColumn;
                if (c_ == owner) partial[r_] = sums[b];
                sync();
                S sum = partial[0];
                MBF_UNROLL
                for (int r = 1; r < PR; ++r) sum = sum + partial[r];
                const S x_k = (forward()[k] - sum) * inverses()[k];
                if (lane_ == 0) x[k] = x_k;
                const S mine = r_ == k % PR ? x_k : S(0);
                MBF_UNROLL
                for (int b2 = 0; b2 <= b; ++b2) sums[b2] = sums[b2] + entries_[a0][b2] * mine;
            }
        }
    }

    // graft_scale of numerics.h with the elements shared out over the team.
    MBF_FN S team_graft_scale(const Rates<S>& rates, const Momentum<S>& momentum, const S* x) {
        const S *g = vector(0), *m = vector(1), *f = triangle();
        S peak = 0, adam = 0;
        MBF_DO_NOT_UNROLL
        for (int k = lane_; k < n_; k += kLanes) {
            peak = larger_magnitude(peak, x[k]);
            adam = adam + adam_square(f[row(k) + k], momentum.direction(m[k], g[k]), rates.momentum_scale,
                                      rates.fisher_scale, S(q_.eps));
        }
        peak = reduce(peak, [](S a, S b) { return larger_magnitude(a, b); });
        adam = reduce(adam, [](S a, S b) { return a + b; });
        const S unit = unit_of(peak);
        S length = 0;
        for (int k = lane_; k < n_; k += kLanes) length = length + (unit * x[k]) * (unit * x[k]);
        length = reduce(length, [](S a, S b) { return a + b; });
        return length_ratio(adam, peak, length);
    }

    // The same for every lane, and in the same order whatever the lane.
    template <class Combine>
    MBF_FN S reduce(S value, Combine combine) {
        S* values = reduction();
        sync();  // the last reduction has been read
        values[lane_] = value;
        sync();
        S result = values[0];
        MBF_DO_NOT_UNROLL
        for (int lane = 1; lane < kLanes; ++lane) result = combine(result, values[lane]);
        return result;
    }

    MBF_FN void flag_stage(Stage stage, int k) { atomicMin(code(), stage + k + 1); }
    MBF_FN void flag_pivot(int pivot) {
        if (pivot && lane_ == 0) flag_stage(kPivot, pivot - 1);
    }
    MBF_FN void flag_vector(const S* x, Stage stage) {
        for (int k = lane_; k < n_; k += kLanes)
            if (!(x[k] - x[k] == 0)) flag_stage(stage, k);
    }
    MBF_FN int agreed_info() {
        sync();
        return *code() < kGood ? *code() % kGrad : 0;
    }

    // Every entry of this lane that can lie in the triangle, and whether it does.
    template <class Visit>
    MBF_FN void for_each_entry(Visit visit) {
        MBF_UNROLL
        for (int a = 0; a < kRows; ++a) {
            MBF_UNROLL
            for (int b = 0; b < (a + 1) * kFold; ++b) {
                const int i = a * PR + r_, j = b * PC + c_;
                visit(entries_[a][b], i, j, i < n_ && j <= i);
            }
        }
    }

    MBF_FN void sync() const {
        if (kLanes > 32)
            __syncthreads();
        else
            __syncwarp(((kLanes == 32 ? 0u : 1u << kLanes % 32) - 1u) << threadIdx.x % 32 / kLanes * kLanes);
    }

    // Ends the copies into shared memory.
    MBF_FN void begin() {
        if (lane_ == 0) *code() = kGood;
        await_copies();
    }

    MBF_FN void fetch_triangles(const S* storage) const {
        if (!is_tiled(n_)) return fetch_contiguous(triangles(), storage + block_offset(n_, first_), active_ * padded());
        for (int e = threadIdx.x; e < kTeams * triangle_size(n_); e += kThreads) {
            const int t = e / kTeams, i = e % kTeams;
            if (i >= active_) continue;
            const S* from = storage + block_offset(n_, first_ + i) + t * entry_stride(n_);
            __pipeline_memcpy_async(triangles() + i * padded() + t, from, sizeof(S));
        }
    }

    MBF_FN void store_triangle(S* storage) const {
        S* to = storage + block_offset(n_, block());
        const int length = is_tiled(n_) ? triangle_size(n_) : padded();
        for (int t = lane_; t < length; t += kLanes) to[t * entry_stride(n_)] = triangle()[t];
    }

    MBF_FN void fetch(int which, const BlockView& view) const {
        fetch_vectors<S, kBlocks>(vectors(which), view, n_, first_, active_);
    }

    MBF_FN S* fisher() const { return static_cast<S*>(problem_.fisher); }
    MBF_FN S* stored() const { return static_cast<S*>(problem_.factor); }
    MBF_FN int64_t block() const { return first_ + team_; }
    MBF_FN bool is_active() const { return team_ < active_; }
    MBF_FN int padded() const { return padded_triangle_size(n_); }

    // Shared memory: triangles, three sets of vectors, what each team exchanges, a code per team.
    MBF_FN S* triangles() const { return reinterpret_cast<S*>(shared_memory); }
    MBF_FN S* triangle() const { return triangles() + team_ * padded(); }
    MBF_FN S* vectors(int which) const { return triangles() + kTeams * padded() + which * kBlocks * vector_pitch(n_); }
    MBF_FN S* vector(int which) const { return vectors(which) + team_ * vector_pitch(n_); }
    MBF_FN S* columns() const { return vectors(3) + team_ * kTeamScalars; }
    MBF_FN S* forward() const { return columns() + 2 * kColumn; }
    MBF_FN S* inverses() const { return forward() + N; }
    MBF_FN S* solution() const { return inverses() + N; }
    MBF_FN S* reduction() const { return solution() + N; }
    MBF_FN int* code() const { return reinterpret_cast<int*>(vectors(3) + kTeams * kTeamScalars) + team_; }

    const Problem& problem_;
    const Parameters& q_;
    const int n_;
    const int64_t first_;
    const int team_, lane_, r_, c_;
    int active_;
    S entries_[kRows][kCols];
    S rhs_[kRows];
};

}  // namespace
}  // namespace mbf
