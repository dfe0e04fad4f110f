// The ops with a team of lanes per block (team.cuh).
#pragma once

#include <type_traits>

#include "panel_team.cuh"
#include "row_team.cuh"
#include "table.h"

namespace mbf {
namespace {

template <class S, int N, int PR, int PC, int kTeams>
using TeamOf = std::conditional_t<PC == 1, RowTeam<S, N, PR, kTeams>, PanelTeam<S, N, PR, PC, kTeams>>;

template <class S, int N, int PR, int PC, int kTeams>
class TeamKernel : TeamOf<S, N, PR, PC, kTeams> {
    using Base = TeamOf<S, N, PR, PC, kTeams>;
    using Base::c_;
    using Base::entries_;
    using Base::exchange;
    using Base::kCols;
    using Base::kFold;
    using Base::kLanes;
    using Base::kRows;
    using Base::lane_;
    using Base::n_;
    using Base::r_;
    using Base::rhs_;
    using Base::row_of;
    using Base::substitute_back;
    using Base::sync;
    using Base::team_;
    using Base::x_;

    // Scalars from one team's to the next one's in shared memory, for `length` and at least that. Row r of a triangle
    // starts r (r + 1) / 2 scalars in, which for the rows of a power of two in sequence are all different modulo it.
    static MBF_HOST_DEVICE constexpr int team_pitch(int length) {
        return kTeams == 1 ? length : Base::spread_pitch(length);
    }
    static constexpr int kMaxTriangle = padded_triangle_size(N);

public:
    static constexpr int kBlocks = kTeams;  // of a thread block
    static constexpr int kThreads = kTeams * kLanes;
    static MBF_HOST_DEVICE constexpr size_t shared_bytes(int n) {
        const int scalars = Base::kExchange + triangle_pitch(n) + 3 * vector_pitch(n);
        return kTeams * (scalars * sizeof(S) + sizeof(int));
    }
    // As many at once as fit in the shared memory of compute capability 9.0 and leave each thread the registers for its
    // entries, a few scalars per row and some 64 more, of which a quarter of a multiprocessor has 512 per lane.
    static constexpr int kFitting = 227 * 1024 / (shared_bytes(N) + 1024);
    static constexpr int kScalars = kFold * kRows * (kRows + 1) / 2 + 3 * kRows;
    static constexpr int kWarps = 4 * (512 / (kScalars * static_cast<int>(sizeof(S)) / 4 + 64));
    static constexpr int kByRegisters = kWarps * 32 / kThreads;
    static constexpr int kMinBlocks = kByRegisters < 1 ? 1 : kByRegisters < kFitting ? kByRegisters : kFitting;

    MBF_FN TeamKernel(const Problem& problem, const Parameters& parameters, int n, int unit)
        : Base(n), problem_(problem), q_(parameters), unit_(unit) {}

    // One path through the ops, so that what they share is compiled once. Teams beyond the last block work on whatever
    // lies in shared memory, and store nothing: all lanes of a warp meet at its barriers.
    MBF_FN void run_op(Op op) {
        if (op == Op::kSolve) return solve_blocks();
        fetch_triangles(fisher());
        if (op != Op::kFactor) fetch(0, problem_.grad);
        if (op == Op::kFused) fetch(1, problem_.rhs);
        begin();
        op_block(op);
        __syncthreads();
        if (op == Op::kFused) Staged::store_vectors(vectors(1), problem_.out, n_, first(), active());
        if (op == Op::kFactor)
            store_triangles(stored(), kGoodAndBad);
        else
            store_triangles(fisher(), kGoodOnly);
    }

    MBF_FN void run_step() {
        if (q_.update || q_.refactor || q_.graft) fetch_triangles(fisher());
        fetch(0, problem_.grad);
        fetch(1, problem_.rhs);
        fetch(2, problem_.out);
        begin();
        step_block();
        __syncthreads();
        Staged::store_vectors(vectors(1), problem_.rhs, n_, first(), active());
        Staged::store_vectors(vectors(2), problem_.out, n_, first(), active());
        if (q_.update) store_triangles(fisher(), kGoodOnly);
        if (!q_.refactor || !problem_.factor) return;
        __syncthreads();  // F is stored: L takes its place
        give(triangle());
        __syncthreads();
        store_triangles(stored(), kGoodOnly);
    }

private:
    using Staged = Staging<S, N, kBlocks, kThreads>;

    // What decides info: the lowest of pivots, then g, then the right-hand side, then the solution.
    enum Stage { kPivot = 0, kGrad = 256, kRhs = 512, kSolution = 768, kGood = 1024 };
    enum Which { kGoodOnly, kGoodAndBad };

    MBF_FN void op_block(Op op) {
        if (op == Op::kFused) {
            flag_vector(vector(0), kGrad);
            flag_vector(vector(1), kRhs);
        }
        take_fisher(op != Op::kFactor);
        if (op == Op::kAccumulate) return flag_diagonal();
        damp(S(0));
        MBF_UNROLL
        for (int a = 0; a < kRows; ++a) rhs_[a] = op == Op::kFused && row_of(a) < n_ ? vector(1)[row_of(a)] : S(0);
        flag_pivot(Base::template sweep<true>());
        if (op == Op::kFused) {
            substitute_back();
            flag_solution();
        }
        const int info = agreed_info();
        if (op == Op::kFactor) give(triangle(), info != 0);
        if (op == Op::kFused) give_solution(vector(1), info != 0);
        if (lane_ == 0 && is_active()) report(problem_, first() + team_, info);
    }

    // One right-hand side after the other: L stays in registers.
    MBF_FN void solve_blocks() {
        fetch_triangles(stored());
        begin();
        take(triangle());
        for (int64_t k = 0; k < q_.rhs_count; ++k) {
            BlockView rhs = problem_.rhs, out = problem_.out;
            rhs.base = static_cast<S*>(rhs.base) + k;
            out.base = static_cast<S*>(out.base) + k;
            fetch(0, rhs);
            await_copies();
            MBF_UNROLL
            for (int a = 0; a < kRows; ++a) rhs_[a] = row_of(a) < n_ ? vector(0)[row_of(a)] : S(0);
            const int bad = Base::template sweep<false>();
            substitute_back();
            give_solution(vector(0), bad != 0);
            __syncthreads();
            Staged::store_vectors(vectors(0), out, n_, first(), active());
            __syncthreads();  // before the next one overwrites it
        }
    }

    MBF_FN void step_block() {
        const Momentum<S> momentum(q_);
        S *g = vector(0), *m = vector(1), *w = vector(2);
        MBF_UNROLL
        for (int a = 0; a < kRows; ++a) {
            const int i = row_of(a);
            if (i >= n_ || c_) continue;
            const S g_i = momentum.sign * g[i];
            g[i] = g_i;
            if (!is_finite(g_i)) flag_stage(kGrad, i);
            if (!is_finite(momentum.direction(m[i], g_i))) flag_stage(kRhs, i);
        }
        sync();
        if (q_.update || q_.refactor) take_fisher(q_.update);
        MBF_UNROLL
        for (int a = 0; a < kRows; ++a) {
            const int i = row_of(a);
            rhs_[a] = i < n_ ? momentum.direction(m[i], g[i]) : S(0);
        }
        const Rates<S> rates(problem_, q_);
        const S adam = q_.graft ? adam_length(rates) : S(0);  // here, where registers are free
        if (q_.refactor) {
            damp(S(1));
            flag_pivot(Base::template sweep<true>());
        } else {
            take_stored();  // F keeps its place
            flag_pivot(Base::template sweep<false>());
        }
        substitute_back();
        flag_solution();
        const S rate = q_.graft ? rates.lr * graft_ratio(adam) : rates.lr;
        const int info = agreed_info();
        if (lane_ == 0 && is_active()) report(problem_, first() + team_, info);
        if (info || c_) return;
        MBF_UNROLL
        for (int a = 0; a < kRows; ++a) {
            const int i = row_of(a);
            if (i >= n_) continue;
            m[i] = momentum.next(m[i], g[i]);
            w[i] = rates.shrink * w[i] - rate * x_[a];
        }
    }

    // F, brought up to date with g and written back, or just read. Reads come first and writes last, for the compiler
    // cannot tell that they do not meet.
    MBF_FN void take_fisher(bool update) {
        take(triangle());
        if (!update) return;
        const S decay = q_.decay, weight = 1 - q_.decay;
        const S* g = vector(0);
        S u[kRows];
        MBF_UNROLL
        for (int a = 0; a < kRows; ++a) u[a] = row_of(a) < n_ ? weight * g[row_of(a)] : S(0);
        MBF_UNROLL
        for (int b = 0; b < kCols; ++b) {
            const int j = b * PC + c_;
            if (PC == 1 && b % PR == 0) sync();  // or all of g would be read at once, into as many registers
            const S g_j = j < n_ ? g[j] : S(0);
            MBF_UNROLL
            for (int a = b / kFold; a < kRows; ++a) entries_[a][b] = accumulate_entry(entries_[a][b], u[a], g_j, decay);
        }
        give(triangle());
    }

    // Zero beyond n and above the diagonal.
    template <int kStride = 1>
    MBF_FN void take(const S* from) {
        MBF_UNROLL
        for (int a = 0; a < kRows; ++a) {
            const int i = row_of(a);
            const S* entry = from + (row(i) + c_) * kStride;
            MBF_UNROLL
            for (int b = 0; b < (a + 1) * kFold; ++b) entries_[a][b] = 0;
            if (i >= n_) continue;
            MBF_UNROLL
            for (int b = 0; b < (a + 1) * kFold; ++b)
                if (b < a * kFold || b * PC + c_ <= i) entries_[a][b] = entry[b * PC * kStride];
        }
    }

    MBF_FN void take_stored() {
        const S* from = stored() + block_offset(n_, first() + (is_active() ? team_ : 0));
        if (is_tiled(n_))
            take<kTileBlocks>(from);
        else
            take(from);
    }

    MBF_FN void give(S* to, bool zero = false) const {
        MBF_UNROLL
        for (int a = 0; a < kRows; ++a) {
            const int i = row_of(a);
            S* entry = to + row(i) + c_;
            if (i >= n_) continue;
            MBF_UNROLL
            for (int b = 0; b < (a + 1) * kFold; ++b)
                if (b < a * kFold || b * PC + c_ <= i) entry[b * PC] = zero ? S(0) : entries_[a][b];
        }
    }

    // x, or zero.
    MBF_FN void give_solution(S* x, bool bad) const {
        MBF_UNROLL
        for (int a = 0; a < kRows; ++a)
            if (c_ == 0 && row_of(a) < n_) x[row_of(a)] = bad ? S(0) : x_[a];
    }

    // Adds lambda to the diagonal. With damping that is relative to it, F has to be up to date in shared memory.
    MBF_FN void damp(S zero_block_lambda) {
        S trace = 0;
        if (q_.relative) {
            sync();
            MBF_UNROLL
            for (int a = 0; a < kRows; ++a)
                if (row_of(a) < n_) trace = trace + triangle()[row(row_of(a)) + row_of(a)];
            trace = reduce(trace, [](S x, S y) { return x + y; });
        }
        const S lambda = block_damping<S>(q_, trace, n_, zero_block_lambda);
        for_each_diagonal_entry([&](S& entry, int) { entry = entry + lambda; });
    }

    // graft_scale of numerics.h with the elements shared out over the team: |u|^2 of the direction in rhs_, and then
    // |u| / |x|.
    MBF_FN S adam_length(const Rates<S>& rates) {
        sync();  // F is up to date
        S sum = 0;
        MBF_UNROLL
        for (int a = 0; a < kRows; ++a) {
            const int i = row_of(a);
            if (i >= n_) continue;
            const S f = triangle()[row(i) + i];
            sum = sum + adam_square(f, rhs_[a], rates.momentum_scale, rates.fisher_scale, S(q_.eps));
        }
        return reduce(sum, [](S a, S b) { return a + b; });
    }

    MBF_FN S graft_ratio(S adam) {
        S peak = 0, length = 0;  // x is zero beyond n
        MBF_UNROLL
        for (int a = 0; a < kRows; ++a) peak = larger_magnitude(peak, x_[a]);
        peak = reduce(peak, [](S a, S b) { return larger_magnitude(a, b); });
        const S unit = unit_of(peak);
        MBF_UNROLL
        for (int a = 0; a < kRows; ++a) length = length + (unit * x_[a]) * (unit * x_[a]);
        length = reduce(length, [](S a, S b) { return a + b; });
        return length_ratio(adam, peak, length);
    }

    // Of a value per row of the lanes' grid. The same for every lane, and in the same order whatever the lane.
    template <class Combine>
    MBF_FN S reduce(S value, Combine combine) {
        S* values = exchange();
        sync();  // the last reduction has been read
        if (c_ == 0) values[r_] = value;
        sync();
        S result = values[0];
        MBF_UNROLL
        for (int r = 1; r < PR; ++r) result = combine(result, values[r]);
        return result;
    }

    static MBF_FN bool is_finite(S x) { return x - x == 0; }
    MBF_FN void flag_stage(Stage stage, int k) { atomicMin(code(), stage + k + 1); }
    MBF_FN void flag_pivot(int pivot) {
        if (pivot && lane_ == 0) flag_stage(kPivot, pivot - 1);
    }
    MBF_FN void flag_vector(const S* x, Stage stage) {
        MBF_UNROLL
        for (int a = 0; a < kRows; ++a)
            if (c_ == 0 && row_of(a) < n_ && !is_finite(x[row_of(a)])) flag_stage(stage, row_of(a));
    }
    MBF_FN void flag_diagonal() {
        for_each_diagonal_entry([&](S& entry, int i) {
            if (!is_finite(entry)) flag_stage(kPivot, i);
        });
    }
    MBF_FN void flag_solution() {
        MBF_UNROLL
        for (int a = 0; a < kRows; ++a)
            if (row_of(a) < n_ && !is_finite(x_[a])) flag_stage(kSolution, row_of(a));
    }
    MBF_FN int agreed_info() {
        sync();
        return *code() < kGood ? *code() % kGrad : 0;
    }

    // Of this lane; those beyond n are zero.
    template <class Visit>
    MBF_FN void for_each_diagonal_entry(Visit visit) {
        MBF_UNROLL
        for (int a = 0; a < kRows; ++a) {
            MBF_UNROLL
            for (int b = a * kFold; b < (a + 1) * kFold; ++b)
                if (row_of(a) == b * PC + c_) visit(entries_[a][b], row_of(a));
        }
    }

    // Ends the copies into shared memory.
    MBF_FN void begin() {
        if (lane_ == 0) *code() = kGood;
        await_copies();
    }

    MBF_FN void fetch_triangles(const S* storage) const {
        const S* from = storage + block_offset(n_, first());
        if (is_tiled(n_)) {
            for_each_tiled_entry([&](int at, int64_t offset) {
                __pipeline_memcpy_async(triangles() + at, storage + offset, sizeof(S));
            });
        } else {
            MBF_UNROLL
            for (int i = 0; i < kTeams; ++i) {
                const int count = i < active() ? padded_triangle_size(n_) : 0;
                Staged::template fetch_contiguous<kMaxTriangle>(triangles() + i * triangle_pitch(n_), from, count);
                from += count;
            }
        }
    }

    MBF_FN void store_triangles(S* storage, Which which) const {
        const int n = n_again();
        const int* codes = code() - team_;
        if (is_tiled(n)) {
            for_each_tiled_entry([&](int at, int64_t offset) {
                if (which == kGoodAndBad || codes[at / triangle_pitch(n)] >= kGood) storage[offset] = triangles()[at];
            });
        } else {
            S* to = storage + block_offset(n, first());
            MBF_UNROLL
            for (int i = 0; i < kTeams; ++i) {
                const bool stored = i < active() && (which == kGoodAndBad || codes[i] >= kGood);
                const int count = stored ? padded_triangle_size(n) : 0;
                Staged::template store_contiguous<kMaxTriangle>(to, triangles() + i * triangle_pitch(n), count);
                to += padded_triangle_size(n);
            }
        }
    }

    // Calls move(index in shared memory, offset in storage) for all entries of tiled blocks.
    template <class Move>
    MBF_FN void for_each_tiled_entry(Move move) const {
        const int n = n_again();
        for (int e = threadIdx.x; e < kTeams * triangle_size(n); e += kThreads) {
            const int t = e / kTeams, i = e % kTeams;
            if (i < active()) move(i * triangle_pitch(n) + t, block_offset(n, first() + i) + t * entry_stride(n));
        }
    }

    MBF_FN void fetch(int which, const BlockView& view) const {
        Staged::fetch_vectors(vectors(which), view, n_, first(), active());
    }

    // Always n_, which the compiler cannot tell: it would keep what it computed from n_ in registers until here.
    MBF_FN int n_again() const { return n_ < 1 ? 1 : n_; }

    MBF_FN S* fisher() const { return static_cast<S*>(problem_.fisher); }
    MBF_FN S* stored() const { return static_cast<S*>(problem_.factor); }
    // The first block, and how many of this thread block's teams have one. Cheaper to compute than to keep.
    MBF_FN int64_t first() const { return static_cast<int64_t>(unit_) * kBlocks; }
    MBF_FN int active() const {
        const int64_t left = problem_.count - first();
        return left < kBlocks ? static_cast<int>(left) : kBlocks;
    }
    MBF_FN bool is_active() const { return team_ < active(); }
    static MBF_HOST_DEVICE constexpr int triangle_pitch(int n) { return team_pitch(padded_triangle_size(n)); }

    // Shared memory: what the lanes of a team exchange, triangles, three sets of vectors, a code per team.
    MBF_FN S* triangles() const { return reinterpret_cast<S*>(shared_memory) + kTeams * Base::kExchange; }
    MBF_FN S* triangle() const { return triangles() + team_ * triangle_pitch(n_); }
    MBF_FN S* vectors(int which) const {
        return triangles() + kTeams * (triangle_pitch(n_) + which * vector_pitch(n_));
    }
    MBF_FN S* vector(int which) const { return vectors(which) + team_ * vector_pitch(n_); }
    MBF_FN int* code() const { return reinterpret_cast<int*>(vectors(3)) + team_; }

    const Problem& problem_;
    const Parameters& q_;
    const int unit_;
};

}  // namespace
}  // namespace mbf
