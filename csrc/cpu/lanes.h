// What a lane is on a CPU: one element of a compiler vector as wide as the instruction set this file is
// compiled for. Includes nothing that could emit a symbol shared between instruction sets.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

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

// The first `count` elements at p, the rest zero; and their store. Memory past them is not touched.
template <class V>
inline V load_part(const void* p, int count) {
    V v{};
    memcpy(&v, p, count * sizeof(v[0]));
    return v;
}

template <class V>
inline void store_part(void* p, V v, int count) {
    memcpy(p, &v, count * sizeof(v[0]));
}

#if defined(__AVX512F__)
template <>
inline Lanes<float> load_part(const void* p, int count) {
    return (Lanes<float>)_mm512_maskz_loadu_ps((1u << count) - 1, p);
}
template <>
inline Lanes<double> load_part(const void* p, int count) {
    return (Lanes<double>)_mm512_maskz_loadu_pd((1u << count) - 1, p);
}
template <>
inline void store_part(void* p, Lanes<float> v, int count) {
    _mm512_mask_storeu_ps(p, (1u << count) - 1, (__m512)v);
}
template <>
inline void store_part(void* p, Lanes<double> v, int count) {
    _mm512_mask_storeu_pd(p, (1u << count) - 1, (__m512d)v);
}
#elif defined(__AVX2__)
inline __m256i first_words(int count) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(count), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
template <>
inline Lanes<float> load_part(const void* p, int count) {
    return (Lanes<float>)_mm256_maskload_ps(static_cast<const float*>(p), first_words(count));
}
template <>
inline Lanes<double> load_part(const void* p, int count) {
    return (Lanes<double>)_mm256_maskload_pd(static_cast<const double*>(p), first_words(2 * count));
}
template <>
inline void store_part(void* p, Lanes<float> v, int count) {
    _mm256_maskstore_ps(static_cast<float*>(p), first_words(count), (__m256)v);
}
template <>
inline void store_part(void* p, Lanes<double> v, int count) {
    _mm256_maskstore_pd(static_cast<double*>(p), first_words(2 * count), (__m256d)v);
}
#endif

// Whether a comparison of two V holds in any lane.
template <class Mask>
inline bool any(Mask mask) {
#if defined(__AVX512F__)
    return _mm512_test_epi64_mask((__m512i)mask, (__m512i)mask);
#elif defined(__AVX2__)
    return !_mm256_testz_si256((__m256i)mask, (__m256i)mask);
#else
    bool found = false;
    for (unsigned l = 0; l < sizeof(Mask) / sizeof(mask[0]); ++l) found |= mask[l] != 0;
    return found;
#endif
}

}  // namespace
}  // namespace mbf

#define MBF_FN inline
#define MBF_RESTRICT __restrict
#define MBF_UNROLL _Pragma("GCC unroll 20")
