// Moves mini-blocks between memory and lanes: triangles in the two storages of layout.h, and vectors
// through any BlockView. Lane l of a group is block first + l; lanes past `active` repeat the first block
// when read and are never written.
#pragma once

#include "../layout.h"
#include "../types.h"
#include "lanes.h"

namespace mbf {
namespace {

struct Group {
    int64_t first;
    int active;
};

// W x W transpose in registers: log2(W) rounds, each swapping halves of growing pairs of rows.
template <class S>
inline void transpose(Lanes<S> (&m)[LanesOf<S>::kCount]) {
    using V = Lanes<S>;
    constexpr int W = LanesOf<S>::kCount;
    using Index = decltype(V{} < V{});
#pragma GCC unroll 8
    for (int half = 1; half < W; half *= 2) {
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
inline void gather_rows(Lanes<S>* v, const S* const* rows, int length) {
    constexpr int W = LanesOf<S>::kCount;
    int k = 0;
    for (; k + W <= length; k += W) {
        Lanes<S> m[W];
#pragma GCC unroll 16
        for (int l = 0; l < W; ++l) m[l] = load<Lanes<S>>(rows[l] + k);
        transpose<S>(m);
#pragma GCC unroll 16
        for (int r = 0; r < W; ++r) v[k + r] = m[r];
    }
    for (; k < length; ++k) {
        S entry[W];
        for (int l = 0; l < W; ++l) entry[l] = rows[l][k];
        v[k] = load<Lanes<S>>(entry);
    }
}

// rows[l][k] <- v[k][l] for k < length and those l < active where keep[l] is zero.
template <class S>
inline void scatter_rows(const Lanes<S>* v, S* const* rows, int length, int active, Lanes<S> keep) {
    constexpr int W = LanesOf<S>::kCount;
    int k = 0;
    for (; k + W <= length; k += W) {
        Lanes<S> m[W];
#pragma GCC unroll 16
        for (int r = 0; r < W; ++r) m[r] = v[k + r];
        transpose<S>(m);
        for (int l = 0; l < active; ++l)
            if (keep[l] == 0) store(rows[l] + k, m[l]);
    }
    for (; k < length; ++k)
        for (int l = 0; l < active; ++l)
            if (keep[l] == 0) rows[l][k] = v[k][l];
}

template <class V>
inline bool any(V x) {
    bool found = false;
    for (unsigned l = 0; l < sizeof(V) / sizeof(x[0]); ++l) found |= x[l] != 0;
    return found;
}

template <class S>
inline void block_rows(S** rows, S* base, int n, Group group) {
    for (int l = 0; l < LanesOf<S>::kCount; ++l)
        rows[l] = base + block_offset(n, group.first + (l < group.active ? l : 0));
}

template <class S>
inline void load_triangle(Lanes<S>* f, const void* storage, int n, Group group) {
    const S* base = static_cast<const S*>(storage);
    if (is_tiled(n)) {
        const S* tile = base + block_offset(n, group.first);
        for (int t = 0; t < triangle_size(n); ++t) f[t] = load<Lanes<S>>(tile + t * kTileBlocks);
        return;
    }
    const S* rows[LanesOf<S>::kCount];
    block_rows<const S>(rows, base, n, group);
    gather_rows(f, rows, triangle_size(n));
}

// Writes the active blocks whose lane of `keep` is zero; the others, padding included, keep their bits.
template <class S>
inline void store_triangle(const Lanes<S>* f, void* storage, int n, Group group, Lanes<S> keep) {
    S* base = static_cast<S*>(storage);
    if (!is_tiled(n)) {
        S* rows[LanesOf<S>::kCount];
        block_rows<S>(rows, base, n, group);
        return scatter_rows(f, rows, triangle_size(n), group.active, keep);
    }
    for (int l = group.active; l < LanesOf<S>::kCount; ++l) keep[l] = 1;
    S* tile = base + block_offset(n, group.first);
    if (!any(keep)) {
        for (int t = 0; t < triangle_size(n); ++t) store(tile + t * kTileBlocks, f[t]);
        return;
    }
    for (int t = 0; t < triangle_size(n); ++t) {
        S* entry = tile + t * kTileBlocks;
        const Lanes<S> old = load<Lanes<S>>(entry);
        store(entry, keep != 0 ? old : f[t]);
    }
}

// How the blocks of a group lie in a BlockView.
enum class Access { kRows, kLanes, kScattered };

template <int W>
inline Access access(const BlockView& view, Group group, int n) {
    if (view.element.inner == 1 && view.element.inner_count >= n) return Access::kRows;
    const bool one_run = group.first % view.block.inner_count + W <= view.block.inner_count;
    if (view.block.inner == 1 && one_run && group.active == W) return Access::kLanes;
    return Access::kScattered;
}

template <class S>
inline void view_rows(S** rows, const BlockView& view, Group group) {
    S* base = static_cast<S*>(view.base);
    for (int l = 0; l < LanesOf<S>::kCount; ++l)
        rows[l] = base + offset(view.block, group.first + (l < group.active ? l : 0));
}

template <class S>
inline void load_vector(Lanes<S>* v, const BlockView& view, int n, Group group) {
    constexpr int W = LanesOf<S>::kCount;
    const Access how = access<W>(view, group, n);
    if (how == Access::kLanes) {
        const S* first = static_cast<const S*>(view.base) + offset(view.block, group.first);
        for (int k = 0; k < n; ++k) v[k] = load<Lanes<S>>(first + offset(view.element, k));
        return;
    }
    S* rows[W];
    view_rows<S>(rows, view, group);
    if (how == Access::kRows) return gather_rows(v, rows, n);
    for (int k = 0; k < n; ++k) {
        const int64_t shift = offset(view.element, k);
        S entry[W];
        for (int l = 0; l < W; ++l) entry[l] = rows[l][shift];
        v[k] = load<Lanes<S>>(entry);
    }
}

// Writes the active blocks whose lane of `keep` is zero.
template <class S>
inline void store_vector(const Lanes<S>* v, const BlockView& view, int n, Group group, Lanes<S> keep) {
    constexpr int W = LanesOf<S>::kCount;
    const Access how = access<W>(view, group, n);
    if (how == Access::kLanes && !any(keep)) {
        S* first = static_cast<S*>(view.base) + offset(view.block, group.first);
        for (int k = 0; k < n; ++k) store(first + offset(view.element, k), v[k]);
        return;
    }
    S* rows[W];
    view_rows<S>(rows, view, group);
    if (how == Access::kRows) return scatter_rows(v, rows, n, group.active, keep);
    for (int k = 0; k < n; ++k) {
        const int64_t shift = offset(view.element, k);
        for (int l = 0; l < group.active; ++l)
            if (keep[l] == 0) rows[l][shift] = v[k][l];
    }
}

}  // namespace
}  // namespace mbf
