// What the driver's cases share: how they fail, random numbers, and the storage of triangles.
#pragma once

#include <stdio.h>

#include <limits>

#include "../../csrc/layout.h"
#include "buffer.h"
#include "reference.h"

constexpr int kMaxFailures = 10;
constexpr double kLearningRate = 0.25, kDamping = 0.5, kMomentumWeight = 0.625, kSecondWeight = 0.4375;
const Numbers kNumbers = {kLearningRate, kDamping, kMomentumWeight, kSecondWeight};

inline std::string current_case;
inline int failures = 0;
inline int64_t cases = 0;

inline void fail(const std::string& what) {
    fprintf(stderr, "FAILED %s: %s\n", current_case.c_str(), what.c_str());
    if (++failures == kMaxFailures) exit(1);
}

inline double random_number() {  // in [-1, 1), from a generator that is the same everywhere
    static uint32_t state = 1;
    state = state * 1664525u + 1013904223u;
    return static_cast<int32_t>(state) * 0x1p-31;
}

inline Vector random_vector(int n) {
    Vector x(n);
    for (double& x_k : x) x_k = random_number();
    return x;
}

template <class Visitor>
void for_triangle(int n, Visitor visitor) {
    for (int i = 0; i < n; ++i)
        for (int j = 0; j <= i; ++j) visitor(i, j);
}

// Eigenvalues between 1 and 2 + sqrt(n), or an indefinite matrix.
inline Matrix random_matrix(int n, bool indefinite) {
    Matrix f(n, Vector(n));
    const Vector u = random_vector(n);
    for_triangle(n,
                 [&](int i, int j) { f[i][j] = u[i] * u[j] / sqrt(n) + (i == j ? 1.5 + 0.5 * random_number() : 0); });
    if (indefinite) f[n - 1][n - 1] = -1000;
    return f;
}

inline int64_t entry(int n, int64_t b, int i, int j) {
    return mbf::block_offset(n, b) + (mbf::triangle_size(i) + j) * mbf::entry_stride(n);
}

// Storage of 16-byte alignment and no more, its padding zero.
template <class S>
Buffer<S> triangles(int n, int64_t count) {
    const int64_t tile = mbf::is_tiled(n) ? mbf::kTileBlocks : 1;
    const int64_t size = mbf::block_offset(n, (count + tile - 1) / tile * tile);
    Buffer<S> storage(size, 16);
    for (int64_t i = 0; i < size; ++i) storage.initial(i) = 0;
    for (int64_t b = 0; b < count; ++b)
        for_triangle(n, [&](int i, int j) { storage.initial(entry(n, b, i, j)) = NAN; });
    return storage;
}

// Well-conditioned blocks: rounding errors grow no faster than n. What goes in is of order 1.
template <class S>
double margin(int n, double scale) {
    return 64 * (n + 4) * scale * std::numeric_limits<S>::epsilon();
}

// Puts a matrix into storage, rounds it likewise, and what has to be there afterwards.
template <class S>
void fill_triangle(Buffer<S>& buffer, int64_t b, Matrix& values) {
    const int n = values.size();
    for_triangle(n, [&](int i, int j) { values[i][j] = buffer.initial(entry(n, b, i, j)) = values[i][j]; });
}

template <class S>
void expect_triangle(Buffer<S>& buffer, int64_t b, const Matrix& values) {
    const int n = values.size();
    double scale = 1;
    for_triangle(n, [&](int i, int j) { scale = std::max(scale, fabs(values[i][j])); });
    for_triangle(n, [&](int i, int j) { buffer.expect(entry(n, b, i, j), values[i][j], margin<S>(n, scale)); });
}
