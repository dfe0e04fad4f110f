// x = (F + lambda I)^-1 d in one sweep and without square roots: L D L^T, with d carried along as one more row of the
// triangle, so that its forward substitution fills the time in which the pivots wait for their quotients. For a factor
// that nobody keeps; one that is kept is Cholesky's (numerics.h).
//
// Row n of the packed triangles holds the right-hand side in f and the solution in l. Row by row, l holds L D until the
// row's own diagonal tile is done and the unit triangle L afterwards. `inverse` receives 1 / D.
#pragma once

#include "lanes.h"

#include "../numerics.h"

namespace mbf {
namespace {

// body(i) for i = first, first + step, .. below last. Small blocks have all their tiles unrolled: every address is a
// constant then, and more of the next pack fits into what the core looks ahead. For large ones that is too much code.
template <int N, class Body>
MBF_FN void for_each(int first, int last, int step, Body body) {
    if constexpr (N > 0 && N <= 9) {
        MBF_UNROLL
        for (int i = first; i < last; i += step) body(i);
    } else {
#pragma GCC unroll 3
        for (int i = first; i < last; i += step) body(i);
    }
}

// Rows and columns j0 .. j0+C: the rows' entries before j0 become L, and the tile is eliminated.
template <int N, int C, class V, class F>
MBF_FN void eliminate_diagonal_tile(V* MBF_RESTRICT l, V* MBF_RESTRICT inverse, F f, V lambda, int j0) {
    V acc[C][C];
    MBF_UNROLL
    for (int r = 0; r < C; ++r) {
        MBF_UNROLL
        for (int c = 0; c <= r; ++c) acc[r][c] = f[row(j0 + r) + j0 + c];
        acc[r][r] = acc[r][r] + lambda;
    }
    for_each<N>(0, j0, 1, [&](int k) MBF_INLINE {
        V unit_row[C];
        MBF_UNROLL
        for (int r = 0; r < C; ++r) {
            V& entry = l[row(j0 + r) + k];
            unit_row[r] = entry * inverse[k];
            MBF_UNROLL
            for (int c = 0; c <= r; ++c) acc[r][c] = acc[r][c] - entry * unit_row[c];
            entry = unit_row[r];
        }
    });
    MBF_UNROLL
    for (int c = 0; c < C; ++c) {
        inverse[j0 + c] = 1 / acc[c][c];
        V unit_column[C];
        MBF_UNROLL
        for (int r = c + 1; r < C; ++r) {
            unit_column[r] = acc[r][c] * inverse[j0 + c];
            l[row(j0 + r) + j0 + c] = unit_column[r];
            MBF_UNROLL
            for (int p = c + 1; p <= r; ++p) acc[r][p] = acc[r][p] - acc[r][c] * unit_column[p];
        }
    }
}

// Rows i0 .. i0+R (below the diagonal tile) of columns j0 .. j0+C, of L D.
template <int N, int R, int C, class V, class F>
MBF_FN void eliminate_tile(V* MBF_RESTRICT l, F f, int i0, int j0) {
    V acc[R][C];
    MBF_UNROLL
    for (int r = 0; r < R; ++r) {
        MBF_UNROLL
        for (int c = 0; c < C; ++c) acc[r][c] = f[row(i0 + r) + j0 + c];
    }
    for_each<N>(0, j0, 1, [&](int k) MBF_INLINE {
        MBF_UNROLL
        for (int r = 0; r < R; ++r) {
            MBF_UNROLL
            for (int c = 0; c < C; ++c) acc[r][c] = acc[r][c] - l[row(i0 + r) + k] * l[row(j0 + c) + k];
        }
    });
    MBF_UNROLL
    for (int r = 0; r < R; ++r) {
        MBF_UNROLL
        for (int c = 0; c < C; ++c) {
            MBF_UNROLL
            for (int p = c + 1; p < C; ++p) acc[r][p] = acc[r][p] - acc[r][c] * l[row(j0 + p) + j0 + c];
            l[row(i0 + r) + j0 + c] = acc[r][c];
        }
    }
}

struct Nothing {
    MBF_FN void operator()() const {}
};

// Columns j0 .. j0+C, in tiles of R rows and then single rows, of which the right-hand side is the last.
template <int N, int R, int C, class V, class F, class Between>
MBF_FN void eliminate_columns(V* MBF_RESTRICT l, V* MBF_RESTRICT inverse, F f, V lambda, int j0, int n,
                              Between between) {
    between();
    eliminate_diagonal_tile<N, C>(l, inverse, f, lambda, j0);
    const int below = j0 + C, end = n + 1, rest = below + (end - below) / R * R;
    for_each<N>(below, rest, R, [&](int i) MBF_INLINE {
        between();
        eliminate_tile<N, R, C>(l, f, i, j0);
    });
    for_each<N>(rest, end, 1, [&](int i) MBF_INLINE { eliminate_tile<N, 1, C>(l, f, i, j0); });
}

// Row n of l <- (F + lambda I)^-1 row n of f. `between` is called between the tiles.
template <int N, int R, class V, class F, class Between>
MBF_FN void eliminate(V* MBF_RESTRICT l, V* MBF_RESTRICT inverse, F f, V lambda, int n_, Between between) {
    const int n = size_of<N>(n_), rest = n / R * R;
    for_each<N>(0, rest, R,
                [&](int j) MBF_INLINE { eliminate_columns<N, R, R>(l, inverse, f, lambda, j, n, between); });
    for_each<N>(rest, n, 1,
                [&](int j) MBF_INLINE { eliminate_columns<N, R, 1>(l, inverse, f, lambda, j, n, Nothing{}); });
    V* x = l + row(n);
    MBF_UNROLL
    for (int k = 0; k < n; ++k) x[k] = x[k] * inverse[k];
    MBF_UNROLL
    for (int k = n - 1; k > 0; --k) {
        MBF_UNROLL
        for (int i = 0; i < k; ++i) x[i] = x[i] - l[row(k) + i] * x[k];
    }
}

// 0 where every pivot is positive and finite and so is x, else another number or NaN. A pivot that is zero or NaN, or
// so small that its inverse overflows, shows in x.
template <int N, class V>
MBF_FN V doubt_of(const V* inverse, const V* x, int n_) {
    const int n = size_of<N>(n_);
    V least = inverse[0];
    MBF_UNROLL_IN_REGISTERS
    for (int k = 1; k < n; ++k) least = select(inverse[k] < least, inverse[k], least);
    return select(least > V{}, poison<N>(x, n), V{} + 1);
}

}  // namespace
}  // namespace mbf
