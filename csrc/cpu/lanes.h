// What a lane is on a CPU: one element of a pack of compiler vectors, each as wide as the instruction set this
// file is compiled for. Includes nothing that could emit a symbol shared between instruction sets.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#include <type_traits>
#include <utility>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#define MBF_FN inline __attribute__((always_inline))
#define MBF_INLINE __attribute__((always_inline))  // of a lambda
#define MBF_SHARED __attribute__((noinline))       // one copy for all ops of a size: half the code, the same speed
#define MBF_RESTRICT __restrict
#define MBF_UNROLL _Pragma("GCC unroll 20")
#define MBF_UNROLL_IN_REGISTERS
#define MBF_BOUND(needed, fixed) (needed)

namespace mbf {
namespace {

#if defined(__AVX512F__)
constexpr int kRegisterBytes = 64;
constexpr int kRegisters = 32;
#elif defined(__AVX2__)
constexpr int kRegisterBytes = 32;
constexpr int kRegisters = 16;
#else
constexpr int kRegisterBytes = 16;
constexpr int kRegisters = 16;
#endif

template <class S>
struct RegisterOf {
    typedef S Type __attribute__((vector_size(kRegisterBytes)));
    static constexpr int kLanes = kRegisterBytes / sizeof(S);
};
template <class S>
using Register = typename RegisterOf<S>::Type;

// P registers that go through the arithmetic side by side: while one waits for a square root or a quotient, the
// others work. R is the register type; a comparison of packs is a pack of integer registers.
template <class R, int P>
struct Pack {
    using S = std::remove_reference_t<decltype(R{}[0])>;

    R part[P];

    Pack() = default;
    MBF_FN Pack(S s) {
        MBF_UNROLL
        for (int p = 0; p < P; ++p) part[p] = s - R{};  // + would not be a mere broadcast: -0 + 0 is 0
    }

    // Lane l of the pack.
    MBF_FN S& operator[](int l) { return reinterpret_cast<S*>(part)[l]; }
    MBF_FN S operator[](int l) const { return reinterpret_cast<const S*>(part)[l]; }

    MBF_FN Pack operator-() const {
        Pack r;
        MBF_UNROLL
        for (int p = 0; p < P; ++p) r.part[p] = -part[p];
        return r;
    }

#define MBF_OPERATOR(op)                                                \
    friend MBF_FN auto operator op(const Pack& a, const Pack& b) {      \
        Pack<decltype(R {} op R{}), P> r;                               \
        MBF_UNROLL                                                      \
        for (int p = 0; p < P; ++p) r.part[p] = a.part[p] op b.part[p]; \
        return r;                                                       \
    }
    MBF_OPERATOR(+)
    MBF_OPERATOR(-)
    MBF_OPERATOR(*)
    MBF_OPERATOR(/)
    MBF_OPERATOR(<)
    MBF_OPERATOR(>)
    MBF_OPERATOR(==)
    MBF_OPERATOR(!=)
#undef MBF_OPERATOR
};

template <class S, int P>
using Lanes = Pack<Register<S>, P>;

MBF_FN float square_root(float x) {
    return sqrtf(x);
}
MBF_FN double square_root(double x) {
    return sqrt(x);
}

// The compiler turns the inner loop into one packed instruction (-fno-math-errno).
template <class R, int P>
MBF_FN Pack<R, P> square_root(Pack<R, P> x) {
    MBF_UNROLL
    for (int p = 0; p < P; ++p)
        for (unsigned l = 0; l < sizeof(R) / sizeof(x.part[p][0]); ++l) x.part[p][l] = square_root(x.part[p][l]);
    return x;
}

template <class S>
MBF_FN S select(bool mask, S yes, S no) {
    return mask ? yes : no;
}

template <class M, class R, int P>
MBF_FN Pack<R, P> select(Pack<M, P> mask, Pack<R, P> yes, Pack<R, P> no) {
    MBF_UNROLL
    for (int p = 0; p < P; ++p) no.part[p] = mask.part[p] ? yes.part[p] : no.part[p];
    return no;
}

// Whether a comparison holds in any lane.
template <class M, int P>
MBF_FN bool any(Pack<M, P> mask) {
    M all = mask.part[0];
    MBF_UNROLL
    for (int p = 1; p < P; ++p) all |= mask.part[p];
#if defined(__AVX512F__)
    return _mm512_test_epi64_mask((__m512i)all, (__m512i)all);
#elif defined(__AVX2__)
    return !_mm256_testz_si256((__m256i)all, (__m256i)all);
#else
    bool found = false;
    for (unsigned l = 0; l < sizeof(M) / sizeof(all[0]); ++l) found |= all[l] != 0;
    return found;
#endif
}

template <class R>
MBF_FN R load(const void* p) {
    R r;
    memcpy(&r, p, sizeof r);
    return r;
}

template <class R>
MBF_FN void store(void* p, const R& r) {
    memcpy(p, &r, sizeof r);
}

// The lanes of a pack, one after the other at p.
template <class S, int P>
MBF_FN Lanes<S, P> load_pack(const S* p) {
    Lanes<S, P> v;
    MBF_UNROLL
    for (int i = 0; i < P; ++i) v.part[i] = load<Register<S>>(p + i * RegisterOf<S>::kLanes);
    return v;
}

template <class S, int P>
MBF_FN void store_pack(S* p, const Lanes<S, P>& v) {
    MBF_UNROLL
    for (int i = 0; i < P; ++i) store(p + i * RegisterOf<S>::kLanes, v.part[i]);
}

// The first `count` elements at p, the rest zero; and their store. Memory past them is not touched.
template <class R>
MBF_FN R load_part(const void* p, int count) {
    R r{};
    memcpy(&r, p, count * sizeof(r[0]));
    return r;
}

template <class R>
MBF_FN void store_part(void* p, R r, int count) {
    memcpy(p, &r, count * sizeof(r[0]));
}

#if defined(__AVX512F__)
template <>
MBF_FN Register<float> load_part(const void* p, int count) {
    return (Register<float>)_mm512_maskz_loadu_ps((1u << count) - 1, p);
}
template <>
MBF_FN Register<double> load_part(const void* p, int count) {
    return (Register<double>)_mm512_maskz_loadu_pd((1u << count) - 1, p);
}
template <>
MBF_FN void store_part(void* p, Register<float> r, int count) {
    _mm512_mask_storeu_ps(p, (1u << count) - 1, (__m512)r);
}
template <>
MBF_FN void store_part(void* p, Register<double> r, int count) {
    _mm512_mask_storeu_pd(p, (1u << count) - 1, (__m512d)r);
}
#elif defined(__AVX2__)
MBF_FN __m256i first_words(int count) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(count), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
template <>
MBF_FN Register<float> load_part(const void* p, int count) {
    return (Register<float>)_mm256_maskload_ps(static_cast<const float*>(p), first_words(count));
}
template <>
MBF_FN Register<double> load_part(const void* p, int count) {
    return (Register<double>)_mm256_maskload_pd(static_cast<const double*>(p), first_words(2 * count));
}
template <>
MBF_FN void store_part(void* p, Register<float> r, int count) {
    _mm256_maskstore_ps(static_cast<float*>(p), first_words(count), (__m256)r);
}
template <>
MBF_FN void store_part(void* p, Register<double> r, int count) {
    _mm256_maskstore_pd(static_cast<double*>(p), first_words(2 * count), (__m256d)r);
}
#endif

}  // namespace
}  // namespace mbf
