// What a lane is on a CPU: one element of a compiler vector as wide as the instruction set this file is
// compiled for. Includes nothing that could emit a symbol shared between instruction sets.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

namespace mbf {
namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
constexpr int kFactorTile = 4;  // 16 accumulators and their operands fit 32 registers
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
constexpr int kFactorTile = 3;  // 9 accumulators and their operands fit 16 registers
#else
constexpr int kVectorBytes = 16;
constexpr int kFactorTile = 3;
#endif

template <class S>
struct LanesOf {
    typedef S Type __attribute__((vector_size(kVectorBytes)));
    static constexpr int kCount = kVectorBytes / sizeof(S);
};
template <class S>
using Lanes = typename LanesOf<S>::Type;

inline float square_root(float x) { return sqrtf(x); }
inline double square_root(double x) { return sqrt(x); }

// The compiler turns the loop into one packed instruction (-fno-math-errno).
template <class V>
inline V square_root(V x) {
    for (unsigned l = 0; l < sizeof(V) / sizeof(x[0]); ++l) x[l] = square_root(x[l]);
    return x;
}

template <class V>
inline V load(const void* p) {
    V v;
    memcpy(&v, p, sizeof v);
    return v;
}

template <class V>
inline void store(void* p, V v) {
    memcpy(p, &v, sizeof v);
}

}  // namespace
}  // namespace mbf

#define MBF_FN inline
#define MBF_UNROLL _Pragma("GCC unroll 4")
