// The arithmetic of one mini-block: accumulate, damp, factor, solve, and the rest of an optimizer step.
//
// V is what one lane stands for: a scalar (the body of one CUDA thread) or a compiler vector (as many
// mini-blocks side by side on a CPU core). S is its scalar. N is the block size when it is compiled in,
// 0 when it is only known at run time (then the argument n holds it). Triangles are packed row-major.
//
// F, L and the inverses I are anything indexable: a V*, or a view of memory that holds one lane's entries some way
// apart.
//
// The includer defines first: MBF_FN (function qualifiers), MBF_RESTRICT, MBF_UNROLL (unrolls the next loop),
// MBF_UNROLL_IN_REGISTERS (likewise, where only arrays kept in registers need it), MBF_BOUND(needed, fixed) (the bound
// of a loop whose body asks by itself: the fixed one for a compiler that unrolls only what has the same trip count
// every time), `V square_root(V)` and `V select(mask, V yes, V no)`.
//
// Differences are written d - a*b for the compiler to contract into fused multiply-adds; every sum runs in index order,
// so a result depends on neither the lane, the number of lanes nor the tile shape.
//
// `info` follows LAPACK, kept in a V so that it stays in the lane: 0 is good, k > 0 says that k (from 1)
// is the first pivot that is not positive and finite, or else the first element that is not finite.

#pragma once

namespace mbf {
namespace {

template <int N>
MBF_FN constexpr int size_of(int n) {
    return N > 0 ? N : n;
}

MBF_FN constexpr int row(int i) {
    return i * (i + 1) / 2;
}

// info, or k where it was good and `good` is false.
template <class V, class Mask>
MBF_FN V flag(V info, Mask good, int k) {
    const V bad = select(good, V{}, V{} + static_cast<float>(k));
    return select(info == V{}, bad, info);
}

// info, or the first k for which x_k is not finite.
template <int N, class V>
MBF_FN V flag_nonfinite(V info, const V* x, int n_) {
    const int n = size_of<N>(n_);
    MBF_UNROLL_IN_REGISTERS
    for (int k = 0; k < n; ++k) info = flag(info, x[k] - x[k] == V{}, k + 1);
    return info;
}

// info, or the first k for which l_kk / l_kk is not 1: the pivot was zero, negative, infinite or NaN.
template <int N, class V, class L, class I>
MBF_FN V flag_pivots(V info, L l, I inverse, int n_) {
    const int n = size_of<N>(n_);
    MBF_UNROLL_IN_REGISTERS
    for (int k = 0; k < n; ++k) {
        const V one = l[row(k) + k] * inverse[k];
        info = flag(info, one == one, k + 1);
    }
    return info;
}

// The cheap first question, for which the common case needs no more: 0 if all x_k are finite, else NaN.
template <int N, class V>
MBF_FN V poison(const V* x, int n_) {
    const int n = size_of<N>(n_);
    V sum{};
    MBF_UNROLL
    for (int k = 0; k < n; ++k) sum = sum + (x[k] - x[k]);
    return sum;
}

// Likewise for the pivots of a factor: finite, else NaN.
template <int N, class V>
MBF_FN V poison_of_pivots(const V* l, const V* inverse, int n_) {
    const int n = size_of<N>(n_);
    V sum{};
    MBF_UNROLL
    for (int k = 0; k < n; ++k) sum = sum + l[row(k) + k] * inverse[k];
    return sum - sum;
}

// f_ij <- decay f_ij + u_i g_j with u = (1-decay) g.
template <class V, class S>
MBF_FN V accumulate_entry(V f, V u_i, V g_j, S decay) {
    return decay * f + u_i * g_j;
}

// F <- decay F + (1-decay) g g^T
template <int N, class F, class V, class S>
MBF_FN void accumulate(F f, const V* MBF_RESTRICT g, S decay, S weight, int n_) {
    const int n = size_of<N>(n_);
    MBF_UNROLL
    for (int i = 0; i < n; ++i) {
        const V u = weight * g[i];
        MBF_UNROLL
        for (int j = 0; j <= i; ++j) f[row(i) + j] = accumulate_entry(f[row(i) + j], u, g[j], decay);
    }
}

// 0 where the diagonal of F is finite, else NaN.
template <int N, class V, class F>
MBF_FN V poison_of_diagonal(F f, int n_) {
    const int n = size_of<N>(n_);
    V sum{};
    MBF_UNROLL
    for (int k = 0; k < n; ++k) sum = sum + (f[row(k) + k] - f[row(k) + k]);
    return sum;
}

template <int N, class V, class F>
MBF_FN V trace(F f, int n_) {
    const int n = size_of<N>(n_);
    V sum = f[0];
    MBF_UNROLL
    for (int k = 1; k < n; ++k) sum = sum + f[row(k) + k];
    return sum;
}

// Rows j0 .. j0+C of columns j0 .. j0+C of the factor, and the inverses of its diagonal.
template <int C, class V, class I, class F>
MBF_FN void factor_diagonal_tile(V* MBF_RESTRICT l, I inverse, F f, V lambda, int j0) {
    V acc[C][C];
    MBF_UNROLL
    for (int r = 0; r < C; ++r) {
        MBF_UNROLL
        for (int c = 0; c <= r; ++c) acc[r][c] = f[row(j0 + r) + j0 + c];
        acc[r][r] = acc[r][r] + lambda;
    }
    MBF_UNROLL_IN_REGISTERS
    for (int k = 0; k < j0; ++k) {
        MBF_UNROLL
        for (int r = 0; r < C; ++r) {
            MBF_UNROLL
            for (int c = 0; c <= r; ++c) acc[r][c] = acc[r][c] - l[row(j0 + r) + k] * l[row(j0 + c) + k];
        }
    }
    MBF_UNROLL
    for (int c = 0; c < C; ++c) {
        acc[c][c] = square_root(acc[c][c]);
        const V unit = 1 / acc[c][c];
        inverse[j0 + c] = unit;
        MBF_UNROLL
        for (int r = c + 1; r < C; ++r) {
            acc[r][c] = acc[r][c] * unit;
            MBF_UNROLL
            for (int p = c + 1; p <= r; ++p) acc[r][p] = acc[r][p] - acc[r][c] * acc[p][c];
        }
    }
    MBF_UNROLL
    for (int r = 0; r < C; ++r) {
        MBF_UNROLL
        for (int c = 0; c <= r; ++c) l[row(j0 + r) + j0 + c] = acc[r][c];
    }
}

// Rows i0 .. i0+R (below the diagonal tile) of columns j0 .. j0+C of the factor.
template <int R, int C, class V, class I, class F>
MBF_FN void factor_tile(V* MBF_RESTRICT l, I inverse, F f, int i0, int j0) {
    V acc[R][C];
    MBF_UNROLL
    for (int r = 0; r < R; ++r) {
        MBF_UNROLL
        for (int c = 0; c < C; ++c) acc[r][c] = f[row(i0 + r) + j0 + c];
    }
    MBF_UNROLL_IN_REGISTERS
    for (int k = 0; k < j0; ++k) {
        MBF_UNROLL
        for (int r = 0; r < R; ++r) {
            MBF_UNROLL
            for (int c = 0; c < C; ++c) acc[r][c] = acc[r][c] - l[row(i0 + r) + k] * l[row(j0 + c) + k];
        }
    }
    MBF_UNROLL
    for (int c = 0; c < C; ++c) {
        const V unit = inverse[j0 + c];
        MBF_UNROLL
        for (int r = 0; r < R; ++r) {
            acc[r][c] = acc[r][c] * unit;
            MBF_UNROLL
            for (int p = c + 1; p < C; ++p) acc[r][p] = acc[r][p] - acc[r][c] * l[row(j0 + p) + j0 + c];
        }
    }
    MBF_UNROLL
    for (int r = 0; r < R; ++r) {
        MBF_UNROLL
        for (int c = 0; c < C; ++c) l[row(i0 + r) + j0 + c] = acc[r][c];
    }
}

// Columns j0 .. j0+C of the factor, in tiles of R rows and then single rows.
template <int R, int C, class V, class I, class F>
MBF_FN void factor_columns(V* MBF_RESTRICT l, I inverse, F f, V lambda, int j0, int n) {
    factor_diagonal_tile<C>(l, inverse, f, lambda, j0);
    int i = j0 + C;
    MBF_UNROLL_IN_REGISTERS
    for (; i + R <= n; i += R) factor_tile<R, C>(l, inverse, f, i, j0);
    MBF_UNROLL_IN_REGISTERS
    for (; i < n; ++i) factor_tile<1, C>(l, inverse, f, i, j0);
}

// L with L L^T = F + lambda I (Cholesky, left-looking, in R x R tiles), inverse <- 1 / diag(L).
template <int N, int R, class V, class I, class F>
MBF_FN void factor(V* MBF_RESTRICT l, I inverse, F f, V lambda, int n_) {
    const int n = size_of<N>(n_);
    int j = 0;
    MBF_UNROLL_IN_REGISTERS
    for (; j + R <= n; j += R) factor_columns<R, R>(l, inverse, f, lambda, j, n);
    MBF_UNROLL_IN_REGISTERS
    for (; j < n; ++j) factor_columns<R, 1>(l, inverse, f, lambda, j, n);
}

// inverse <- 1 / diag(L). A failed factor is zero: its inverse is infinite and shows in poison_of_pivots.
template <int N, class L, class I>
MBF_FN void invert_diagonal(L l, I inverse, int n_) {
    const int n = size_of<N>(n_);
    MBF_UNROLL
    for (int k = 0; k < n; ++k) inverse[k] = 1 / l[row(k) + k];
}

// x <- (L L^T)^-1 x. The entries of L are V, or scalars when the lanes hold right-hand sides of one block.
template <int N, class V, class L, class I>
MBF_FN void solve(L l, I inverse, V* MBF_RESTRICT x, int n_) {
    const int n = size_of<N>(n_);
    MBF_UNROLL
    for (int k = 0; k < n; ++k) {
        x[k] = x[k] * inverse[k];
        MBF_UNROLL
        for (int i = MBF_BOUND(k + 1, 0); i < n; ++i)
            if (i > k) x[i] = x[i] - l[row(i) + k] * x[k];
    }
    MBF_UNROLL
    for (int k = n - 1; k >= 0; --k) {
        x[k] = x[k] * inverse[k];
        MBF_UNROLL
        for (int i = 0; i < MBF_BOUND(k, n); ++i)
            if (i < k) x[i] = x[i] - l[row(k) + i] * x[k];
    }
}

// The same bits, R columns at a time, so that each x is loaded and stored once for R of them: for sizes that are only
// known at run time, whose x does not stay in registers.
template <int R, class V, class L, class I>
MBF_FN void solve_in_tiles(L l, I inverse, V* MBF_RESTRICT x, int n) {
    const int tiles = n / R * R;
    for (int j = 0; j < tiles; j += R) {
        V t[R];
        MBF_UNROLL
        for (int c = 0; c < R; ++c) {
            t[c] = x[j + c];
            MBF_UNROLL
            for (int p = 0; p < c; ++p) t[c] = t[c] - l[row(j + c) + j + p] * t[p];
            t[c] = t[c] * inverse[j + c];
            x[j + c] = t[c];
        }
        for (int i = j + R; i < n; ++i) {
            V sum = x[i];
            MBF_UNROLL
            for (int c = 0; c < R; ++c) sum = sum - l[row(i) + j + c] * t[c];
            x[i] = sum;
        }
    }
    for (int k = tiles; k < n; ++k) {
        x[k] = x[k] * inverse[k];
        for (int i = k + 1; i < n; ++i) x[i] = x[i] - l[row(i) + k] * x[k];
    }
    for (int k = n - 1; k >= tiles; --k) {
        x[k] = x[k] * inverse[k];
        for (int i = 0; i < k; ++i) x[i] = x[i] - l[row(k) + i] * x[k];
    }
    for (int j = tiles - R; j >= 0; j -= R) {
        V t[R];
        MBF_UNROLL
        for (int c = R - 1; c >= 0; --c) {
            t[c] = x[j + c];
            MBF_UNROLL
            for (int p = R - 1; p > c; --p) t[c] = t[c] - l[row(j + p) + j + c] * t[p];
            t[c] = t[c] * inverse[j + c];
            x[j + c] = t[c];
        }
        for (int i = 0; i < j; ++i) {
            V sum = x[i];
            MBF_UNROLL
            for (int c = R - 1; c >= 0; --c) sum = sum - l[row(j + c) + i] * t[c];
            x[i] = sum;
        }
    }
}

// The square of an element of Adam's step u = mhat / (sqrt(vhat) + eps), with mhat = momentum_scale * D and
// vhat = fisher_scale * diag(F).
template <class V, class S>
MBF_FN V adam_square(V f_kk, V d_k, S momentum_scale, S fisher_scale, S eps) {
    const V u = momentum_scale * d_k / (square_root(fisher_scale * f_kk) + eps);
    return u * u;
}

template <class V>
MBF_FN V larger_magnitude(V peak, V p_k) {
    const V magnitude = select(p_k < V{}, -p_k, p_k);
    return select(magnitude > peak, magnitude, peak);
}

// 1 / peak. |P| is formed relative to its largest entry: squares of entries may leave the range of S.
template <class V>
MBF_FN V unit_of(V peak) {
    const V floor = V{} + 1e-30f;
    return 1 / select(peak > floor, peak, floor);
}

// |u| / |P| from |u|^2, the largest entry of P and the squared length of P relative to it; 0 where P = 0.
template <class V>
MBF_FN V length_ratio(V adam, V peak, V length) {
    const V scale = unit_of(peak) * square_root(adam) / square_root(length);
    return select(peak > V{}, scale, V{});
}

// |u| / |P|: gives P the length of Adam's step.
template <int N, class F, class V, class S>
MBF_FN V graft_scale(F f, const V* d, const V* p, S momentum_scale, S fisher_scale, S eps, int n_) {
    const int n = size_of<N>(n_);
    V peak{}, adam{};
    MBF_UNROLL
    for (int k = 0; k < n; ++k) {
        peak = larger_magnitude(peak, p[k]);
        adam = adam + adam_square(f[row(k) + k], d[k], momentum_scale, fisher_scale, eps);
    }
    const V unit = unit_of(peak);
    V length{};
    MBF_UNROLL
    for (int k = 0; k < n; ++k) length = length + (unit * p[k]) * (unit * p[k]);
    return length_ratio(adam, peak, length);
}

}  // namespace
}  // namespace mbf
