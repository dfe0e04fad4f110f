// The arithmetic of one mini-block: accumulate, damp, factor, solve, and the rest of an optimizer step.
//
// V is what one lane stands for: a scalar (the body of one CUDA thread) or a compiler vector (as many
// mini-blocks side by side on a CPU core). S is its scalar. N is the block size when it is compiled in,
// 0 when it is only known at run time (then the argument n holds it). Triangles are packed row-major.
//
// The includer defines first: MBF_FN (function qualifiers), MBF_UNROLL (unrolls the next loop) and
// `V square_root(V)`. Differences are written d - a*b for the compiler to contract into fused
// multiply-adds; every sum runs in index order, so a result depends on neither the lane, the number of
// lanes nor the tile shape.
//
// `info` follows LAPACK, kept in a V so that it stays in the lane: 0 is good, k > 0 says that k (from 1)
// is the first pivot that is not positive and finite, or else the first element that is not finite.

namespace mbf {
namespace {

template <int N>
MBF_FN constexpr int size_of(int n) {
    return N > 0 ? N : n;
}

MBF_FN constexpr int row(int i) { return i * (i + 1) / 2; }

// info, or k where it was good and `good` is false.
template <class V, class Mask>
MBF_FN V flag(V info, Mask good, int k) {
    const V bad = good ? V{} : V{} + static_cast<float>(k);
    return info == V{} ? bad : info;
}

// info, or the first k for which x_k is not finite.
template <int N, class V>
MBF_FN V flag_nonfinite(V info, const V* x, int n_) {
    const int n = size_of<N>(n_);
    MBF_UNROLL
    for (int k = 0; k < n; ++k) info = flag(info, x[k] - x[k] == V{}, k + 1);
    return info;
}

// F <- decay F + (1-decay) g g^T
template <int N, class V, class S>
MBF_FN void accumulate(V* f, const V* g, S decay, S weight, int n_) {
    const int n = size_of<N>(n_);
    MBF_UNROLL
    for (int i = 0; i < n; ++i) {
        const V u = weight * g[i];
        MBF_UNROLL
        for (int j = 0; j <= i; ++j) f[row(i) + j] = decay * f[row(i) + j] + u * g[j];
    }
}

// info, or the first k for which F_kk is not finite.
template <int N, class V>
MBF_FN V flag_nonfinite_diagonal(V info, const V* f, int n_) {
    const int n = size_of<N>(n_);
    MBF_UNROLL
    for (int k = 0; k < n; ++k) {
        const V d = f[row(k) + k];
        info = flag(info, d - d == V{}, k + 1);
    }
    return info;
}

template <int N, class V>
MBF_FN V trace(const V* f, int n_) {
    const int n = size_of<N>(n_);
    V sum = f[0];
    MBF_UNROLL
    for (int k = 1; k < n; ++k) sum = sum + f[row(k) + k];
    return sum;
}

// A <- F + lambda I
template <int N, class V>
MBF_FN void damp(V* a, const V* f, V lambda, int n_) {
    const int n = size_of<N>(n_);
    MBF_UNROLL
    for (int i = 0; i < n; ++i) {
        MBF_UNROLL
        for (int j = 0; j < i; ++j) a[row(i) + j] = f[row(i) + j];
        a[row(i) + i] = f[row(i) + i] + lambda;
    }
}

// Rows j0 .. j0+C of columns j0 .. j0+C of the factor, and the inverses of its diagonal.
template <int C, class V>
MBF_FN V factor_diagonal_tile(V* a, V* inverse, V info, int j0) {
    V acc[C][C];
    MBF_UNROLL
    for (int r = 0; r < C; ++r) {
        MBF_UNROLL
        for (int c = 0; c <= r; ++c) acc[r][c] = a[row(j0 + r) + j0 + c];
    }
    for (int k = 0; k < j0; ++k) {
        MBF_UNROLL
        for (int r = 0; r < C; ++r) {
            MBF_UNROLL
            for (int c = 0; c <= r; ++c) acc[r][c] = acc[r][c] - a[row(j0 + r) + k] * a[row(j0 + c) + k];
        }
    }
    MBF_UNROLL
    for (int c = 0; c < C; ++c) {
        const V pivot = acc[c][c];
        info = flag(info, (pivot > V{}) & (pivot - pivot == V{}), j0 + c + 1);
        acc[c][c] = square_root(pivot);
        inverse[j0 + c] = 1 / acc[c][c];
        MBF_UNROLL
        for (int r = c + 1; r < C; ++r) {
            acc[r][c] = acc[r][c] * inverse[j0 + c];
            MBF_UNROLL
            for (int p = c + 1; p <= r; ++p) acc[r][p] = acc[r][p] - acc[r][c] * acc[p][c];
        }
    }
    MBF_UNROLL
    for (int r = 0; r < C; ++r) {
        MBF_UNROLL
        for (int c = 0; c <= r; ++c) a[row(j0 + r) + j0 + c] = acc[r][c];
    }
    return info;
}

// Rows i0 .. i0+R (below the diagonal tile) of columns j0 .. j0+C of the factor.
template <int R, int C, class V>
MBF_FN void factor_tile(V* a, const V* inverse, int i0, int j0) {
    V acc[R][C];
    MBF_UNROLL
    for (int r = 0; r < R; ++r) {
        MBF_UNROLL
        for (int c = 0; c < C; ++c) acc[r][c] = a[row(i0 + r) + j0 + c];
    }
    for (int k = 0; k < j0; ++k) {
        MBF_UNROLL
        for (int r = 0; r < R; ++r) {
            MBF_UNROLL
            for (int c = 0; c < C; ++c) acc[r][c] = acc[r][c] - a[row(i0 + r) + k] * a[row(j0 + c) + k];
        }
    }
    MBF_UNROLL
    for (int c = 0; c < C; ++c) {
        MBF_UNROLL
        for (int r = 0; r < R; ++r) {
            acc[r][c] = acc[r][c] * inverse[j0 + c];
            MBF_UNROLL
            for (int p = c + 1; p < C; ++p) acc[r][p] = acc[r][p] - acc[r][c] * a[row(j0 + p) + j0 + c];
        }
    }
    MBF_UNROLL
    for (int r = 0; r < R; ++r) {
        MBF_UNROLL
        for (int c = 0; c < C; ++c) a[row(i0 + r) + j0 + c] = acc[r][c];
    }
}

// Columns j0 .. j0+C of the factor, in tiles of R rows and then single rows.
template <int R, int C, class V>
MBF_FN V factor_columns(V* a, V* inverse, V info, int j0, int n) {
    info = factor_diagonal_tile<C>(a, inverse, info, j0);
    int i = j0 + C;
    for (; i + R <= n; i += R) factor_tile<R, C>(a, inverse, i, j0);
    for (; i < n; ++i) factor_tile<1, C>(a, inverse, i, j0);
    return info;
}

// A <- L with A = L L^T (Cholesky, left-looking, R x R tiles), inverse <- 1 / diag(L); returns info.
template <int N, int R, class V>
MBF_FN V factor(V* a, V* inverse, int n_) {
    const int n = size_of<N>(n_);
    V info{};
    int j = 0;
    for (; j + R <= n; j += R) info = factor_columns<R, R>(a, inverse, info, j, n);
    for (; j < n; ++j) info = factor_columns<R, 1>(a, inverse, info, j, n);
    return info;
}

// inverse <- 1 / diag(L); returns info. A failed factor is zero and shows here.
template <int N, class E, class V>
MBF_FN V invert_diagonal(const E* l, V* inverse, int n_) {
    const int n = size_of<N>(n_);
    V info{};
    MBF_UNROLL
    for (int k = 0; k < n; ++k) {
        const V d = l[row(k) + k];
        info = flag(info, (d > V{}) & (d - d == V{}), k + 1);
        inverse[k] = 1 / d;
    }
    return info;
}

// x <- (L L^T)^-1 x. The entries E of L are V, or scalars when the lanes hold right-hand sides of one block.
template <int N, class E, class V>
MBF_FN void solve(const E* l, const E* inverse, V* x, int n_) {
    const int n = size_of<N>(n_);
    MBF_UNROLL
    for (int k = 0; k < n; ++k) {
        x[k] = x[k] * inverse[k];
        MBF_UNROLL
        for (int i = k + 1; i < n; ++i) x[i] = x[i] - l[row(i) + k] * x[k];
    }
    MBF_UNROLL
    for (int k = n - 1; k >= 0; --k) {
        x[k] = x[k] * inverse[k];
        MBF_UNROLL
        for (int i = 0; i < k; ++i) x[i] = x[i] - l[row(k) + i] * x[k];
    }
}

// |u| / |P|, and 0 where P = 0: gives P the length of Adam's step u = mhat / (sqrt(vhat) + eps), with
// mhat = momentum_scale * D and vhat = fisher_scale * diag(F).
template <int N, class V, class S>
MBF_FN V graft_scale(const V* diagonal, const V* d, const V* p, S momentum_scale, S fisher_scale, S eps, int n_) {
    const int n = size_of<N>(n_);
    V peak{};  // |P| is formed relative to its largest entry: squares of entries may leave the range of S
    V adam{};
    MBF_UNROLL
    for (int k = 0; k < n; ++k) {
        const V magnitude = p[k] < V{} ? -p[k] : p[k];
        peak = magnitude > peak ? magnitude : peak;
        const V u = momentum_scale * d[k] / (square_root(fisher_scale * diagonal[k]) + eps);
        adam = adam + u * u;
    }
    const V floor = V{} + static_cast<S>(1e-30);
    const V unit = 1 / (peak > floor ? peak : floor);
    V length{};
    MBF_UNROLL
    for (int k = 0; k < n; ++k) {
        const V q = unit * p[k];
        length = length + q * q;
    }
    const V scale = unit * square_root(adam) / square_root(length);
    return peak > V{} ? scale : V{};
}

}  // namespace
}  // namespace mbf
