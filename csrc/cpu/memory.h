// Moves mini-blocks between memory and lanes: triangles in the two storages of layout.h, and vectors
// through any BlockView. Lane l of a group is block first + l; lanes past `active` repeat the first block
// when read and are never written.
#pragma once

#include "../layout.h"
#include "../types.h"
#include "lanes.h"

#include "../numerics.h"

namespace mbf {
namespace {

struct Group {
    int64_t first;
    int active;
};

// W x W transpose in registers: log2(W) rounds, each swapping halves of shrinking pairs of rows. Rounds whose
// results the caller drops are dropped by the compiler.
template <class S>
inline void transpose(Lanes<S> (&m)[LanesOf<S>::kCount]) {
    using V = Lanes<S>;
    constexpr int W = LanesOf<S>::kCount;
    using Index = decltype(V{} < V{});
#pragma GCC unroll 8
    for (int half = W / 2; half > 0; half /= 2) {
        Index low{}, high{};
#pragma GCC unroll 16
        for (int l = 0; l < W; ++l) {
            low[l] = l & half ? W + l - half : l;
            high[l] = l & half ? W + l : l + half;
        }
#pragma GCC unroll 16
        for (int r = 0; r < W; ++r) {
            if (r & half) continue;
            const V a = m[r], b = m[r + half];
            m[r] = __builtin_shuffle(a, b, low);
            m[r + half] = __builtin_shuffle(a, b, high);
        }
    }
}

// v[k][l] <- rows[l][k] for k < length.
template <class S>
inline __attribute__((always_inline)) void gather_rows(Lanes<S>* v, const S* const* rows, int length) {
    using V = Lanes<S>;
    constexpr int W = LanesOf<S>::kCount;
    for (int k = 0; k < length; k += W) {
        const int width = length - k < W ? length - k : W;
        V m[W];
#pragma GCC unroll 16
        for (int l = 0; l < W; ++l) m[l] = width == W ? load<V>(rows[l] + k) : load_part<V>(rows[l] + k, width);
        transpose<S>(m);
#pragma GCC unroll 16
        for (int r = 0; r < W; ++r)
            if (r < width) v[k + r] = m[r];
    }
}

// rows[l][k] <- v[k][l] for k < length and those l < active where keep[l] is zero.
template <class S>
inline __attribute__((always_inline)) void scatter_rows(const Lanes<S>* v, S* const* rows, int length,
                                                        int active, Lanes<S> keep) {
    using V = Lanes<S>;
    constexpr int W = LanesOf<S>::kCount;
    for (int l = active; l < W; ++l) keep[l] = 1;
    const bool all = !any(keep != 0);
    for (int k = 0; k < length; k += W) {
        const int width = length - k < W ? length - k : W;
        V m[W];
#pragma GCC unroll 16
        for (int r = 0; r < W; ++r) m[r] = r < width ? v[k + r] : V{};
        transpose<S>(m);
        if (all) {
#pragma GCC unroll 16
            for (int l = 0; l < W; ++l) store_part(rows[l] + k, m[l], width);
        } else {
            for (int l = 0; l < W; ++l)
                if (keep[l] == 0) store_part(rows[l] + k, m[l], width);
        }
    }
}

// The same for W blocks of n scalars that follow each other: whole vectors to and from memory, whose partial
// accesses are slow, and rows to and from a buffer.
template <int N, class S>
inline __attribute__((always_inline)) void gather_run(Lanes<S>* v, const S* run, int n_) {
    using V = Lanes<S>;
    constexpr int W = LanesOf<S>::kCount;
    const int n = size_of<N>(n_);
    S buffer[(N + 1) * W];
    for (int k = 0; k < n; ++k) store(buffer + k * W, load<V>(run + k * W));
    for (int k = 0; k < n; k += W) {
        V m[W];
#pragma GCC unroll 16
        for (int l = 0; l < W; ++l) m[l] = load<V>(buffer + l * n + k);
        transpose<S>(m);
#pragma GCC unroll 16
        for (int r = 0; r < W; ++r)
            if (k + r < n) v[k + r] = m[r];
    }
}

template <int N, class S>
inline __attribute__((always_inline)) void scatter_run(const Lanes<S>* v, S* run, int n_) {
    using V = Lanes<S>;
    constexpr int W = LanesOf<S>::kCount;
    const int n = size_of<N>(n_);
    S buffer[(N + 1) * W];
    for (int k = (n - 1) / W * W; k >= 0; k -= W) {  // backwards: the last columns overrun into the next row's first
        V m[W];
#pragma GCC unroll 16
        for (int r = 0; r < W; ++r) m[r] = k + r < n ? v[k + r] : V{};
        transpose<S>(m);
#pragma GCC unroll 16
        for (int l = 0; l < W; ++l) store(buffer + l * n + k, m[l]);
    }
    for (int k = 0; k < n; ++k) store(run + k * W, load<V>(buffer + k * W));
}

template <class S>
inline void block_rows(S** rows, S* base, int n, Group group) {
    for (int l = 0; l < LanesOf<S>::kCount; ++l)
        rows[l] = base + block_offset(n, group.first + (l < group.active ? l : 0));
}

template <int N, class S>
inline void load_triangle(Lanes<S>* f, const S* storage, int n_, Group group) {
    const int n = size_of<N>(n_);
    if (is_tiled(n)) {
        const S* tile = storage + block_offset(n, group.first);
        for (int t = 0; t < triangle_size(n); ++t) f[t] = load<Lanes<S>>(tile + t * kTileBlocks);
        return;
    }
    const S* rows[LanesOf<S>::kCount];
    block_rows(rows, storage, n, group);
    gather_rows<S>(f, rows, triangle_size(n));
}

// Writes the active blocks whose lane of `keep` is zero; the others, padding included, keep their bits.
template <int N, class S>
inline void store_triangle(const Lanes<S>* f, S* storage, int n_, Group group, Lanes<S> keep) {
    const int n = size_of<N>(n_);
    if (!is_tiled(n)) {
        S* rows[LanesOf<S>::kCount];
        block_rows(rows, storage, n, group);
        return scatter_rows<S>(f, rows, triangle_size(n), group.active, keep);
    }
    for (int l = group.active; l < LanesOf<S>::kCount; ++l) keep[l] = 1;
    S* tile = storage + block_offset(n, group.first);
    if (!any(keep != 0)) {
        for (int t = 0; t < triangle_size(n); ++t) store(tile + t * kTileBlocks, f[t]);
        return;
    }
    for (int t = 0; t < triangle_size(n); ++t) {
        S* entry = tile + t * kTileBlocks;
        const Lanes<S> old = load<Lanes<S>>(entry);
        store(entry, keep != 0 ? old : f[t]);
    }
}

// A tensor seen as blocks of n scalars. The three ways its groups can lie, fastest first: the elements of a
// block contiguous, the blocks of a group contiguous, neither.
template <int N, class S>
class LaneView {
public:
    using V = Lanes<S>;
    static constexpr int W = LanesOf<S>::kCount;

    LaneView(const BlockView& view, int n)
        : base_(static_cast<S*>(view.base)), block_(view.block), n_(n),
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

    // Element k of block b is at block(b)[element(k)].
    S* block(int64_t b) const { return base_ + (b < block_.inner_count ? b * block_.inner : offset(block_, b)); }
    int64_t element(int k) const { return element_[k]; }

    void load(V* v, Group group) const {
        const int n = size_of<N>(n_);
        if (N > 0 && is_run(group)) return gather_run<N, S>(v, block(group.first), n);
        S* rows[W];
        find_rows(rows, group);
        if (rows_) return gather_rows<S>(v, rows, n);
        if (contiguous_lanes(rows, group)) {
            for (int k = 0; k < n; ++k) v[k] = mbf::load<V>(rows[0] + element_[k]);
            return;
        }
        for (int k = 0; k < n; ++k) {
            S entry[W];
            for (int l = 0; l < W; ++l) entry[l] = rows[l][element_[k]];
            v[k] = mbf::load<V>(entry);
        }
    }

    // Writes the active blocks whose lane of `keep` is zero.
    void store(const V* v, Group group, V keep) const {
        const int n = size_of<N>(n_);
        if (N > 0 && is_run(group) && !any(keep != 0)) return scatter_run<N, S>(v, block(group.first), n);
        S* rows[W];
        find_rows(rows, group);
        if (rows_) return scatter_rows<S>(v, rows, n, group.active, keep);
        if (contiguous_lanes(rows, group) && !any(keep != 0)) {
            for (int k = 0; k < n; ++k) mbf::store(rows[0] + element_[k], v[k]);
            return;
        }
        for (int k = 0; k < n; ++k)
            for (int l = 0; l < group.active; ++l)
                if (keep[l] == 0) rows[l][element_[k]] = v[k][l];
    }

    // Asks for the memory of a group before it is needed.
    void prefetch(int64_t first) const {
        const int n = size_of<N>(n_);
        const S* start = block(first);
        if (rows_)
            for (int k = 0; k < n; ++k) __builtin_prefetch(start + k * W);
        else
            for (int k = 0; k < n; ++k) __builtin_prefetch(start + element_[k]);
    }

private:
    void find_rows(S** rows, Group group) const {
        if (group.active == W && group.first + W <= block_.inner_count) {  // one run, no wrap
            for (int l = 0; l < W; ++l) rows[l] = base_ + (group.first + l) * block_.inner;
            return;
        }
        for (int l = 0; l < W; ++l) rows[l] = block(group.first + (l < group.active ? l : 0));
    }

    // W contiguous blocks, one after the other.
    bool is_run(Group group) const {
        return rows_ && block_.inner == size_of<N>(n_) && group.active == W && group.first + W <= block_.inner_count;
    }

    bool contiguous_lanes(S* const* rows, Group group) const {
        return group.active == W && block_.inner == 1 && rows[W - 1] == rows[0] + W - 1;
    }

    S* base_;
    Strides block_;
    int n_;
    bool rows_;
    int64_t element_[N > 0 ? N : MBF_MAX_SIZE];
};

}  // namespace
}  // namespace mbf
