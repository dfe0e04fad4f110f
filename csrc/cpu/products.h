// Products of small row-major matrices whose rows are padded to whole registers, and the inverse of one SPD block.
// Here a lane is a column of one block, where numerics.h makes it a block of many.
#pragma once

#include "lanes.h"

namespace mbf {
namespace {

// A product is computed in tiles of kTileRows x kTileColumns registers: accumulators for all but a few.
constexpr int kTileRows = 6;
constexpr int kTileColumns = kRegisters > 16 ? 4 : 2;

// Scalars in a row of n, padding included, and rows of a product with n rows, of which whole tiles are written.
template <class T>
MBF_FN constexpr int padded_row(int n) {
    return (n + RegisterOf<T>::kLanes - 1) / RegisterOf<T>::kLanes * RegisterOf<T>::kLanes;
}
MBF_FN constexpr int padded_rows(int n) {
    return (n + kTileRows - 1) / kTileRows * kTileRows;
}

// c_ij (+)= sum_k a[i * a_row + k * a_step] b[k * ld + j] for one tile of C registers' width.
template <int C, class T>
MBF_FN void multiply_tile(T* MBF_RESTRICT c, int ld, bool add, const T* a, int a_row, int a_step, const T* b,
                          int depth) {
    using V = Register<T>;
    constexpr int W = RegisterOf<T>::kLanes;
    V sum[kTileRows][C] = {};
    for (int k = 0; k < depth; ++k) {
        V row[C];
        MBF_UNROLL
        for (int j = 0; j < C; ++j) row[j] = load<V>(b + k * ld + j * W);
        MBF_UNROLL
        for (int i = 0; i < kTileRows; ++i) {
            const V scale = a[i * a_row + k * a_step] - V{};  // a broadcast
            MBF_UNROLL
            for (int j = 0; j < C; ++j) sum[i][j] += scale * row[j];
        }
    }
    MBF_UNROLL
    for (int i = 0; i < kTileRows; ++i) {
        MBF_UNROLL
        for (int j = 0; j < C; ++j) {
            T* to = c + i * ld + j * W;
            store(to, add ? load<V>(to) + sum[i][j] : sum[i][j]);
        }
    }
}

// The tile of `columns` registers' width, at most C.
template <int C, class T>
MBF_FN void multiply_tile(int columns, T* c, int ld, bool add, const T* a, int a_row, int a_step, const T* b,
                          int depth) {
    if (columns == C) return multiply_tile<C>(c, ld, add, a, a_row, a_step, b, depth);
    if constexpr (C > 1) multiply_tile<C - 1>(columns, c, ld, add, a, a_row, a_step, b, depth);
}

// kTileRows rows of C (+)= A B, `width` columns (whole registers) of them.
template <class T>
MBF_SHARED void multiply_rows(T* c, int width, int ld, bool add, const T* a, int a_row, int a_step, const T* b,
                              int depth) {
    constexpr int W = RegisterOf<T>::kLanes;
    for (int j = 0; j < width; j += kTileColumns * W) {
        const int columns = (width - j) / W < kTileColumns ? (width - j) / W : kTileColumns;
        multiply_tile<kTileColumns>(columns, c + j, ld, add, a, a_row, a_step, b + j, depth);
    }
}

// The lower triangle of C (+)= R^T R for `count` rows R; parts of the upper one are written too. C has padded_rows(n)
// rows; R may be read a tile's height past its end.
template <class T>
MBF_FN void gram(T* c, bool add, const T* rows, int count, int n) {
    const int ld = padded_row<T>(n);
    for (int i = 0; i < n; i += kTileRows) {
        const int last = i + kTileRows < n ? i + kTileRows : n;
        multiply_rows(c + i * ld, padded_row<T>(last), ld, add, rows + i, 1, ld, rows, count);
    }
}

// With A = L L^T, in the upper triangle of `u`: u <- L^T and y <- L^-1 (lower, zero above; its rows zero before).
// Row operations on (A, I), so that lanes are columns and no pivot waits for a sum. Returns 0, or k > 0 where the k-th
// pivot is the first that is not positive and finite. With `factored` u is L^T from the start.
MBF_SHARED int eliminate(double* MBF_RESTRICT u, double* MBF_RESTRICT y, int n, bool factored) {
    using V = Register<double>;
    constexpr int W = RegisterOf<double>::kLanes;
    const int ld = padded_row<double>(n);
    const auto subtract = [&](double* to, const double* from, double scale, int first, int last) {
        for (int j = first / W * W; j < last; j += W) store(to + j, load<V>(to + j) - scale * load<V>(from + j));
    };
    for (int k = 0; k < n; ++k) {
        double *u_k = u + k * ld, *y_k = y + k * ld;
        const double pivot = u_k[k];
        if (!(pivot > 0 && pivot - pivot == 0)) return k + 1;
        const double unit = factored ? 1 / pivot : 1 / square_root(pivot);
        for (int j = 0; j < k; ++j) y_k[j] *= unit;
        y_k[k] = unit;
        if (!factored)
            for (int j = k; j < n; ++j) u_k[j] *= unit;
        for (int i = k + 1; i < n; ++i) {
            if (!factored) subtract(u + i * ld, u_k, u_k[i], i, n);
            subtract(y + i * ld, y_k, u_k[i], 0, k + 1);
        }
    }
    return 0;
}

}  // namespace
}  // namespace mbf
