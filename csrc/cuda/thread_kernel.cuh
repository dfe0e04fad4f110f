// One thread per block, for blocks small enough to be factored in registers. F waits in shared memory, a column of it
// per thread on a bank of its own, so that a bad block can keep its old one and L has the registers to itself.
#pragma once

#include "staging.cuh"
#include "table.h"

namespace mbf {
namespace {

// The entries of one block in a tile.
template <class S>
struct Column {
    S* first;
    MBF_FN S& operator[](int t) const { return first[t * kTileBlocks]; }
};

// Numbers that are read from shared memory again at every use: registers are what these kernels run out of.
template <class S, int kStride>
struct OffRegisters {
    volatile S* first;
    MBF_FN volatile S& operator[](int t) const { return first[t * kStride]; }
};

template <class S, int N>
class ThreadKernel {
    static constexpr int kTriangle = triangle_size(N);
    static constexpr int kPitch = vector_pitch(N);
    static constexpr size_t kTileBytes = (kTriangle + 4 * kPitch) * kTileBlocks * sizeof(S);
    // As many tiles per thread block as fit in the 48 KB that every device has, four at most.
    static constexpr int kTiles = 4 * kTileBytes <= 49152 ? 4 : 2 * kTileBytes <= 49152 ? 2 : 1;
    static constexpr int kFactorTile = 3;  // of accumulators, see numerics.h

public:
    static constexpr int kBlocks = kTiles * kTileBlocks;  // of a thread block
    static constexpr int kThreads = kBlocks;
    // As many at once as fit in the shared memory of compute capability 9.0 and leave each thread the registers for L,
    // a few scalars per row and some 24 more, and no fewer than 64; a quarter of a multiprocessor has 512 per lane.
    static constexpr int kFitting = static_cast<int>(227 * 1024 / (kTiles * kTileBytes));
    static constexpr int kRegisters = (kTriangle + 3 * N) * static_cast<int>(sizeof(S)) / 4 + 24;
    static constexpr int kByRegisters = 4 * (512 / (kRegisters < 64 ? 64 : kRegisters)) * 32 / kThreads;
    static constexpr int kMinBlocks = kByRegisters < kFitting ? kByRegisters : kFitting;
    static size_t shared_bytes(int) { return kTiles * kTileBytes; }

    MBF_FN ThreadKernel(const Problem& problem, const Parameters& parameters, int, int unit)
        : problem_(problem), q_(parameters), first_(static_cast<int64_t>(unit) * kBlocks) {
        const int64_t left = problem.count - first_;
        active_ = left < kBlocks ? static_cast<int>(left) : kBlocks;
    }

    // One path through the ops, so that what they share is compiled once.
    MBF_FN void run_op(Op op) const {
        if (op == Op::kSolve) return solve_blocks();
        fetch_tiles(fisher());
        if (op != Op::kFactor) fetch(0, problem_.grad);
        if (op == Op::kFused) fetch(1, problem_.rhs);
        await_copies();
        if (is_active()) op_block(op);
        if (op != Op::kFused) return;
        __syncthreads();
        Staged::store_vectors(vectors(1), problem_.out, N, first_, active_);
    }

    MBF_FN void run_step() const {
        if (q_.update || q_.refactor || q_.graft) fetch_tiles(fisher());
        fetch(0, problem_.grad);
        fetch(1, problem_.rhs);
        fetch(2, problem_.out);
        await_copies();
        if (is_active()) step_block();
        __syncthreads();
        Staged::store_vectors(vectors(1), problem_.rhs, N, first_, active_);
        Staged::store_vectors(vectors(2), problem_.out, N, first_, active_);
    }

private:
    using Staged = Staging<S, N, kBlocks, kThreads>;

    MBF_FN void op_block(Op op) const {
        const Column<S> f = column();
        S* rhs = vector(1);
        const S doubt = op == Op::kFused ? doubt_of_vectors(vector(0), rhs) : S(0);
        if (op != Op::kFactor) update(f);
        if (op == Op::kAccumulate) {
            if (poison_of_diagonal<N, S>(f, N) == 0) store_column(fisher(), f);
            return;
        }
        S l[kTriangle];
        int info = factor_block(l, S(0));
        if (op == Op::kFactor) {
            MBF_UNROLL
            for (int t = 0; t < kTriangle; ++t) l[t] = info ? S(0) : l[t];
            store_column(stored(), l);
        } else {
            S x[N];
            MBF_UNROLL
            for (int k = 0; k < N; ++k) x[k] = rhs[k];
            solve<N>(l, inverse(), x, N);
            info = combine(info, doubt, x);
            if (!info) store_column(fisher(), f);
            MBF_UNROLL
            for (int k = 0; k < N; ++k) rhs[k] = info ? S(0) : x[k];
        }
        report(problem_, block(), info);
    }

    // One right-hand side after the other: L stays in shared memory.
    MBF_FN void solve_blocks() const {
        fetch_tiles(stored());
        await_copies();
        const OffRegisters<S, kTileBlocks> l{column().first};
        invert_diagonal<N>(l, inverse(), N);
        const bool bad = flag_pivots<N>(S(0), l, inverse(), N) != 0;
        for (int64_t r = 0; r < q_.rhs_count; ++r) {
            BlockView rhs = problem_.rhs, out = problem_.out;
            rhs.base = static_cast<S*>(rhs.base) + r;
            out.base = static_cast<S*>(out.base) + r;
            fetch(0, rhs);
            await_copies();
            S x[N];
            MBF_UNROLL
            for (int k = 0; k < N; ++k) x[k] = vector(0)[k];
            solve<N>(l, inverse(), x, N);
            MBF_UNROLL
            for (int k = 0; k < N; ++k) vector(0)[k] = bad ? S(0) : x[k];
            __syncthreads();
            Staged::store_vectors(vectors(0), out, N, first_, active_);
            __syncthreads();  // before the next one overwrites it
        }
    }

    MBF_FN void step_block() const {
        const Column<S> f = column();
        const Momentum<S> momentum(q_);
        const OffRegisters<S, 1> g{vector(0)}, m{vector(1)};
        S* w = vector(2);
        S doubt = 0;
        MBF_UNROLL
        for (int k = 0; k < N; ++k) {
            const S signed_g = momentum.sign * g[k];
            g[k] = signed_g;
            doubt = flag(doubt, signed_g - signed_g == 0, k + 1);
        }
        MBF_UNROLL
        for (int k = 0; k < N; ++k) {
            const S d = momentum.direction(m[k], g[k]);
            doubt = flag(doubt, d - d == 0, k + 1);
        }
        if (q_.update) update(f);

        S l[kTriangle], x[N];
        const int pivot = q_.refactor ? factor_block(l, S(1)) : load_factor(l);
        MBF_UNROLL
        for (int k = 0; k < N; ++k) x[k] = momentum.direction(m[k], g[k]);
        solve<N>(l, inverse(), x, N);

        const int info = combine(pivot, doubt, x);
        report(problem_, block(), info);
        if (info) return;
        if (q_.update) store_column(fisher(), f);
        if (q_.refactor && problem_.factor) store_column(stored(), l);
        const Rates<S> rates(problem_, q_);
        S rate = rates.lr;
        if (q_.graft) {
            S d[N];
            MBF_UNROLL
            for (int k = 0; k < N; ++k) d[k] = momentum.direction(m[k], g[k]);
            rate = rate * graft_scale<N>(f, d, x, rates.momentum_scale, rates.fisher_scale, S(q_.eps), N);
        }
        MBF_UNROLL
        for (int k = 0; k < N; ++k) {
            m[k] = momentum.next(m[k], g[k]);
            w[k] = rates.shrink * w[k] - rate * x[k];
        }
    }

    // L with L L^T = F + lambda I; the first bad pivot.
    MBF_FN int factor_block(S* l, S zero_block_lambda) const {
        const Column<S> f = column();
        const S lambda = block_damping<S>(q_, trace<N, S>(f, N), N, zero_block_lambda);
        factor<N, kFactorTile>(l, inverse(), f, lambda, N);
        return static_cast<int>(flag_pivots<N>(S(0), l, inverse(), N));
    }

    MBF_FN int load_factor(S* l) const {
        const Column<S> from{stored() + block_offset(N, block())};
        MBF_UNROLL
        for (int t = 0; t < kTriangle; ++t) l[t] = from[t];
        invert_diagonal<N>(l, inverse(), N);
        return static_cast<int>(flag_pivots<N>(S(0), l, inverse(), N));
    }

    MBF_FN void update(Column<S> f) const {
        S g[N];
        MBF_UNROLL
        for (int k = 0; k < N; ++k) g[k] = vector(0)[k];
        accumulate<N>(f, g, S(q_.decay), S(1 - q_.decay), N);
    }

    // The first element of g, else of d, that is not finite.
    MBF_FN S doubt_of_vectors(const S* g, const S* d) const {
        return flag_nonfinite<N>(flag_nonfinite<N>(S(0), g, N), d, N);
    }

    // info in LAPACK's meaning: pivots count before vectors, the solution last.
    MBF_FN int combine(int pivot, S doubt, const S* x) const {
        return pivot ? pivot : static_cast<int>(flag_nonfinite<N>(doubt, x, N));
    }

    template <class Entries>
    MBF_FN void store_column(S* storage, Entries entries) const {
        const Column<S> to{storage + block_offset(N, block())};
        MBF_UNROLL
        for (int t = 0; t < kTriangle; ++t) to[t] = entries[t];
    }

    // The tiles of this thread block are contiguous in both memories.
    MBF_FN void fetch_tiles(const S* storage) const {
        const int tiles = (active_ + kTileBlocks - 1) / kTileBlocks;
        Staged::template fetch_contiguous<kBlocks * kTriangle>(tiles_memory(), storage + block_offset(N, first_),
                                                               tiles * kTriangle * kTileBlocks);
    }

    MBF_FN void fetch(int which, const BlockView& view) const {
        Staged::fetch_vectors(vectors(which), view, N, first_, active_);
    }

    MBF_FN S* fisher() const { return static_cast<S*>(problem_.fisher); }
    MBF_FN S* stored() const { return static_cast<S*>(problem_.factor); }
    MBF_FN int64_t block() const { return first_ + threadIdx.x; }
    MBF_FN bool is_active() const { return static_cast<int>(threadIdx.x) < active_; }

    // Shared memory: the tiles of F (or L), then four sets of vectors, the last one 1 / diag(L).
    MBF_FN S* tiles_memory() const { return reinterpret_cast<S*>(shared_memory); }
    MBF_FN Column<S> column() const {
        const int tile = threadIdx.x / kTileBlocks, lane = threadIdx.x % kTileBlocks;
        return {tiles_memory() + tile * kTriangle * kTileBlocks + lane};
    }
    MBF_FN S* vectors(int which) const {
        return tiles_memory() + kTiles * kTriangle * kTileBlocks + which * kBlocks * kPitch;
    }
    MBF_FN S* vector(int which) const { return vectors(which) + threadIdx.x * kPitch; }
    MBF_FN OffRegisters<S, 1> inverse() const { return {vector(3)}; }

    const Problem& problem_;
    const Parameters& q_;
    const int64_t first_;
    int active_;
};

}  // namespace
}  // namespace mbf
