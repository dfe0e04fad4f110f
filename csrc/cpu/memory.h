// Moves mini-blocks between memory and lanes: triangles in the two storages of layout.h, and vectors
// through any BlockView.
#pragma once

#include "../layout.h"
#include "../types.h"
#include "lanes.h"

#include "../numerics.h"

namespace mbf {
namespace {

// The blocks of one pack: lane l holds block first + l. Lanes past `active` repeat the first block when read
// and are never written. The pack after it starts at block `next`.
struct Group {
    int64_t first;
    int active;
    int64_t next;

    MBF_FN int64_t block(int l) const { return first + (l < active ? l : 0); }
};

// Where lane l of the first (second) result of a transpose's round comes from, in lanes of (a, b). Within 128
// bits, where it is cheap, the round interleaves; across, it swaps halves.
template <class S>
constexpr int transpose_source(int half, int l, bool second) {
    constexpr int kLane = 16 / sizeof(S), W = RegisterOf<S>::kLanes;
    if (half >= kLane) return (l & half ? W : 0) + (l & ~half) + (second ? half : 0);
    return (l % 2 ? W : 0) + l / kLane * kLane + l % kLane / 2 + (second ? kLane / 2 : 0);
}

// W x W transpose in registers: log2(W) rounds over pairs of rows half = W/2, .., 1 apart. Rounds whose results
// the caller drops are dropped by the compiler.
template <int half, class R, class Index, int... l>
MBF_FN void transpose(R (&m)[sizeof...(l)], std::integer_sequence<int, l...> lanes) {
    using S = std::remove_reference_t<decltype(R{}[0])>;
    constexpr Index first{transpose_source<S>(half, l, false)...};
    constexpr Index second{transpose_source<S>(half, l, true)...};
    MBF_UNROLL
    for (int r = 0; r < int(sizeof...(l)); ++r) {
        if (r & half) continue;
        const R a = m[r], b = m[r + half];
        m[r] = __builtin_shuffle(a, b, first);
        m[r + half] = __builtin_shuffle(a, b, second);
    }
    if constexpr (half > 1) transpose<half / 2, R, Index>(m, lanes);
}

template <class S>
MBF_FN void transpose(Register<S> (&m)[RegisterOf<S>::kLanes]) {
    using R = Register<S>;
    constexpr int W = RegisterOf<S>::kLanes;
    transpose<W / 2, R, decltype(R{} < R{})>(m, std::make_integer_sequence<int, W>());
}

// v[k].part[p][l] <- rows[l][k] for k < length.
template <class S, int P>
MBF_FN void gather_rows(Lanes<S, P>* v, int p, S* const* rows, int length) {
    using R = Register<S>;
    constexpr int W = RegisterOf<S>::kLanes;
    for (int k = 0; k < length; k += W) {
        const int width = length - k < W ? length - k : W;
        R m[W];
        MBF_UNROLL
        for (int l = 0; l < W; ++l) m[l] = width == W ? load<R>(rows[l] + k) : load_part<R>(rows[l] + k, width);
        transpose<S>(m);
        MBF_UNROLL
        for (int r = 0; r < W; ++r)
            if (r < width) v[k + r].part[p] = m[r];
    }
}

// rows[l][k] <- v[k].part[p][l] for k < length and those lanes whose bit of `skip` is not set.
template <class S, int P>
MBF_FN void scatter_rows(const Lanes<S, P>* v, int p, S* const* rows, int length, unsigned skip) {
    using R = Register<S>;
    constexpr int W = RegisterOf<S>::kLanes;
    for (int k = 0; k < length; k += W) {
        const int width = length - k < W ? length - k : W;
        R m[W];
        MBF_UNROLL
        for (int r = 0; r < W; ++r) m[r] = r < width ? v[k + r].part[p] : R{};
        transpose<S>(m);
        MBF_UNROLL
        for (int l = 0; l < W; ++l)
            if (!(skip >> l & 1)) store_part(rows[l] + k, m[l], width);
    }
}

// The same for W blocks of n scalars that follow each other. Each row moves as a whole register that overruns
// into the next ones, which costs less than a partial access; the last rows, whose register would leave the run,
// do not.
template <int N, class S, int P>
MBF_FN void gather_run(Lanes<S, P>* v, int p, const S* run) {
    using R = Register<S>;
    constexpr int W = RegisterOf<S>::kLanes;
    MBF_UNROLL
    for (int k = 0; k < N; k += W) {
        const int width = N - k < W ? N - k : W;
        R m[W];
        MBF_UNROLL
        for (int l = 0; l < W; ++l) {
            const S* row = run + l * N + k;
            m[l] = l * N + k + W <= N * W ? load<R>(row) : load_part<R>(row, width);
        }
        transpose<S>(m);
        MBF_UNROLL
        for (int r = 0; r < width; ++r) v[k + r].part[p] = m[r];
    }
}

template <int N, class S, int P>
MBF_FN void scatter_run(const Lanes<S, P>* v, int p, S* run) {
    using R = Register<S>;
    constexpr int W = RegisterOf<S>::kLanes;
    // Backwards over columns and forwards over rows: what a row's last columns overrun is written later.
    MBF_UNROLL
    for (int k = (N - 1) / W * W; k >= 0; k -= W) {
        const int width = N - k < W ? N - k : W;
        R m[W];
        MBF_UNROLL
        for (int r = 0; r < W; ++r) m[r] = r < width ? v[k + r].part[p] : R{};
        transpose<S>(m);
        MBF_UNROLL
        for (int l = 0; l < W; ++l) {
            S* row = run + l * N + k;
            if (l * N + k + W <= N * W)
                store(row, m[l]);
            else
                store_part(row, m[l], width);
        }
    }
}

// The lanes of part p that are not to be written: bit l is set where `keep` is not zero, or lane l not active.
template <class S, int P>
MBF_FN unsigned lanes_to_skip(const Lanes<S, P>& keep, int p, Group group) {
    constexpr int W = RegisterOf<S>::kLanes;
    unsigned skip = 0;
    for (int l = 0; l < W; ++l) skip |= unsigned(p * W + l >= group.active || keep[p * W + l] != 0) << l;
    return skip;
}

template <int N, class S, int P>
MBF_SHARED void load_triangle(Lanes<S, P>* f, S* storage, int n_, Group group) {
    const int n = size_of<N>(n_);
    if (is_tiled(n)) {
        const S* tile = storage + block_offset(n, group.first);
        for (int t = 0; t < triangle_size(n); ++t) f[t] = load_pack<S, P>(tile + t * kTileBlocks);
        return;
    }
    constexpr int W = RegisterOf<S>::kLanes;
    for (int p = 0; p < P; ++p) {
        S* rows[W];
        for (int l = 0; l < W; ++l) rows[l] = storage + block_offset(n, group.block(p * W + l));
        gather_rows<S, P>(f, p, rows, triangle_size(n));
    }
}

// Writes the active blocks whose lane of `keep` is zero; the others, padding included, keep their bits.
template <int N, class S, int P>
MBF_SHARED void store_triangle(const Lanes<S, P>* f, S* storage, int n_, Group group, Lanes<S, P> keep) {
    const int n = size_of<N>(n_);
    constexpr int W = RegisterOf<S>::kLanes;
    if (!is_tiled(n)) {
        for (int p = 0; p < P; ++p) {
            S* rows[W];
            for (int l = 0; l < W; ++l) rows[l] = storage + block_offset(n, group.block(p * W + l));
            scatter_rows<S, P>(f, p, rows, triangle_size(n), lanes_to_skip<S, P>(keep, p, group));
        }
        return;
    }
    for (int l = group.active; l < P * W; ++l) keep[l] = 1;
    S* tile = storage + block_offset(n, group.first);
    if (!any(keep != 0)) {
        for (int t = 0; t < triangle_size(n); ++t) store_pack<S, P>(tile + t * kTileBlocks, f[t]);
        return;
    }
    for (int t = 0; t < triangle_size(n); ++t) {
        S* entry = tile + t * kTileBlocks;
        store_pack<S, P>(entry, select(keep != 0, load_pack<S, P>(entry), f[t]));
    }
}

// A tensor seen as blocks of n scalars. The three ways the blocks of a register can lie, fastest first: one after
// the other, the elements of each contiguous; likewise, element by element; anyhow.
template <int N, class S, int P>
class LaneView {
public:
    using V = Lanes<S, P>;
    static constexpr int W = RegisterOf<S>::kLanes;

    LaneView(const BlockView& view, int n)
        : base_(static_cast<S*>(view.base)),
          block_(view.block),
          n_(n),
          rows_(view.element.inner == 1 && view.element.inner_count >= n) {
        if (base_)
            for (int k = 0; k < n; ++k) element_[k] = offset(view.element, k);
    }

    // The same view `shift` elements further on.
    LaneView shifted(int64_t shift) const {
        LaneView moved = *this;
        moved.base_ += shift;
        return moved;
    }

    // The blocks of the group lie one after the other, without gaps.
    MBF_FN bool is_run(Group group) const {
        return N > 0 && rows_ && block_.inner == N && group.active == P * W &&
               group.first + P * W <= block_.inner_count;
    }

    // Element k of block b is at block(b)[element(k)].
    S* block(int64_t b) const { return base_ + (b < block_.inner_count ? b * block_.inner : offset(block_, b)); }
    int64_t element(int k) const { return element_[k]; }

    MBF_SHARED void load(V* v, Group group) const {
        for (int p = 0; p < P; ++p) load_register(v, p, group);
    }

    // Writes the active blocks whose lane of `keep` is zero.
    MBF_SHARED void store(const V* v, Group group, const V& keep) const {
        const bool all = group.active == P * W && !any(keep != 0);
        for (int p = 0; p < P; ++p) store_register(v, p, group, all ? 0 : lanes_to_skip<S, P>(keep, p, group));
    }

    bool has_rows() const { return rows_; }

    // The i-th cache line of the pack that starts at block(b) = start, where the pack lies in one of the two fast ways.
    const S* line(const S* start, int i) const {
        constexpr int kLine = 64 / sizeof(S);
        const int n = size_of<N>(n_);
        return start + (rows_ ? i * kLine : element_[i % n] + i / n * kLine);
    }

private:
    void load_register(V* v, int p, Group group) const {
        const int n = size_of<N>(n_);
        if constexpr (N > 0)
            if (is_run(group, p)) return gather_run<N, S, P>(v, p, block(group.first + p * W));
        if (is_beside(group, p)) {
            const S* start = block(group.first + p * W);
            for (int k = 0; k < n; ++k) v[k].part[p] = mbf::load<Register<S>>(start + element_[k]);
            return;
        }
        S* rows[W];
        find_rows(rows, p, group);
        if (rows_) return gather_rows<S, P>(v, p, rows, n);
        for (int k = 0; k < n; ++k)
            for (int l = 0; l < W; ++l) v[k].part[p][l] = rows[l][element_[k]];
    }

    void store_register(const V* v, int p, Group group, unsigned skip) const {
        const int n = size_of<N>(n_);
        if constexpr (N > 0)
            if (!skip && is_run(group, p)) return scatter_run<N, S, P>(v, p, block(group.first + p * W));
        if (!skip && is_beside(group, p)) {
            S* start = block(group.first + p * W);
            for (int k = 0; k < n; ++k) mbf::store(start + element_[k], v[k].part[p]);
            return;
        }
        S* rows[W];
        find_rows(rows, p, group);
        if (rows_) return scatter_rows<S, P>(v, p, rows, n, skip);
        for (int k = 0; k < n; ++k)
            for (int l = 0; l < W; ++l)
                if (!(skip >> l & 1)) rows[l][element_[k]] = v[k].part[p][l];
    }

    // Part p is W blocks, one after the other.
    bool is_run(Group group, int p) const { return rows_ && block_.inner == size_of<N>(n_) && is_even(group, p); }

    // Part p is W blocks side by side: an element of all of them is contiguous.
    bool is_beside(Group group, int p) const { return block_.inner == 1 && is_even(group, p); }

    // Part p is W active blocks at one stride.
    bool is_even(Group group, int p) const {
        return (p + 1) * W <= group.active &&
               remainder(group.first + p * W, block_.inner_count) + W <= block_.inner_count;
    }

    // a % b; most often a < b, and else both are small, which divides faster.
    static int64_t remainder(int64_t a, int64_t b) {
        if (a < b) return a;
        return (a | b) >> 32 ? a % b : static_cast<uint32_t>(a) % static_cast<uint32_t>(b);
    }

    void find_rows(S** rows, int p, Group group) const {
        const int64_t first = group.first + p * W;
        const int64_t run = first / block_.inner_count, at = first % block_.inner_count;
        if ((p + 1) * W <= group.active && at + W <= block_.inner_count) {
            S* start = base_ + run * block_.outer + at * block_.inner;
            for (int l = 0; l < W; ++l) rows[l] = start + l * block_.inner;
        } else {
            for (int l = 0; l < W; ++l) rows[l] = block(group.block(p * W + l));
        }
    }

    S* base_;
    Strides block_;
    int n_;
    bool rows_;
    int64_t element_[N > 0 ? N : MBF_MAX_SIZE];
};

// Asks for the memory of the pack that starts at block `first`, a share at a time between the stages of the present
// one, the rows of its F and the R x R tiles of its elimination: larger shares would exceed the misses that a core can
// track and stall it. Large blocks have arithmetic enough to hide what the processor fetches by itself.
template <int N, int R, class S, int P>
class Ahead {
public:
    using View = LaneView<N, S, P>;

    MBF_FN Ahead(const S* storage, const View& a, const View& b, const View& c, int n_, int64_t first)
        : triangle_(storage + block_offset(size_of<N>(n_), first)),
          views_{&a, &b, &c},
          starts_{a.block(first), b.block(first), c.block(first)},
          in_rows_(a.has_rows() && b.has_rows() && c.has_rows()),
          shares_(size_of<N>(n_)),
          left_(shares_.count) {}

    MBF_FN void fetch_share() {
        if (left_-- <= 0) return;
        const Shares shares = N > 0 ? Shares(N) : shares_;
        MBF_UNROLL
        for (int i = 0; i < shares.triangle; ++i) __builtin_prefetch(triangle_ + i * kLine, 1);
        triangle_ += shares.triangle * kLine;
        if (line_ >= shares.lines) return;
        for (int v = 0; v < 3; ++v)
            for (int i = line_; i < line_ + shares.vector; ++i)
                __builtin_prefetch(in_rows_ ? starts_[v] + i * kLine : views_[v]->line(starts_[v], i), 1);
        line_ += shares.vector;
    }

private:
    static constexpr int kStages = 8;  // after which every op asks, beside rows and tiles
    static constexpr int kLargest = 64;
    static constexpr int kLine = 64 / sizeof(S);

    struct Shares {
        int count;
        int lines;             // of a vector
        int triangle, vector;  // lines of each in a share

        MBF_FN constexpr explicit Shares(int n)
            : count(n > kLargest ? 0 : kStages + n + triangle_size(n / R)),
              lines(lines_of(n)),
              triangle(share_of(lines_of(is_tiled(n) ? triangle_size(n) : padded_triangle_size(n)))),
              vector(share_of(lines)) {}

        MBF_FN static constexpr int lines_of(int entries) { return (entries * P * kRegisterBytes + 63) / 64; }
        MBF_FN constexpr int share_of(int lines) const { return count ? (lines + count - 1) / count : 0; }
    };

    const S* triangle_;
    const View* const views_[3];
    const S* const starts_[3];
    const bool in_rows_;
    const Shares shares_;
    int left_, line_ = 0;
};

}  // namespace
}  // namespace mbf
