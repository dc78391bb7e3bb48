// Vectors of floats as wide as the instruction set that this file is compiled for, and the few functions on them.
//
// GCC's and Clang's vector extensions wherever they suffice, so that one text serves every width; intrinsics for what
// they cannot say (transposing sums, dot products of bfloat16). Not responsible for attention (decode.h, prompt.h).

#pragma once
#include <stdint.h>
#include <string.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define INLINE static inline __attribute__((always_inline))
#define INLINE_MEMBER inline __attribute__((always_inline))
// Before loops over a few vectors, which must end up in registers.
#if defined(__clang__)
#define UNROLL _Pragma("clang loop unroll(full)")
#else
#define UNROLL _Pragma("GCC unroll 16")
#endif

#if defined(__AVX512F__)
constexpr int W = 16, CHUNK = 4;  // lanes; vectors of a row that are accumulated at once (registers allow no more)
#elif defined(__AVX2__)
constexpr int W = 8, CHUNK = 2;
#else
constexpr int W = 4, CHUNK = 2;
#endif
constexpr int HALF = W < 8 ? W : 8;  // dims come in eights, so what does not fill a vector is eight lanes of sixteen

typedef float Floats __attribute__((vector_size(W * 4)));
typedef int32_t Ints __attribute__((vector_size(W * 4)));
typedef uint32_t Words __attribute__((vector_size(W * 4)));
typedef uint16_t Shorts __attribute__((vector_size(W * 2)));
struct bf16 { uint16_t bits; };

INLINE Floats all(float x) { return x - Floats{}; }

INLINE Floats load(const float *p) {
    Floats v;
    memcpy(&v, p, sizeof v);
    return v;
}

INLINE Floats load(const bf16 *p) {
    Shorts s;
    memcpy(&s, p, sizeof s);
    return (Floats)(__builtin_convertvector(s, Words) << 16);
}

// Eight elements, the other lanes zero: never reads past the end of a row.
template <class T> INLINE Floats load_half(const T *p) {
    T padded[W] = {};
    memcpy(padded, p, HALF * sizeof(T));
    return load(padded);
}

INLINE void store(float *p, Floats v) { memcpy(p, &v, sizeof v); }

INLINE Shorts rounded(Floats v) {  // to nearest, ties to even; NaN stays NaN
    const Words u = (Words)v;
    const Words even = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
    return __builtin_convertvector(v == v ? even : (u >> 16) | 0x40, Shorts);
}

INLINE void store(bf16 *p, Floats v) {
    const Shorts s = rounded(v);
    memcpy(p, &s, sizeof s);
}

INLINE Floats larger(Floats a, Floats b) { return a > b ? a : b; }  // b, where one of them is NaN
INLINE Floats smaller(Floats a, Floats b) { return a < b ? a : b; }

// e^x within 2 units in the last place for -87 < x < 88 (coefficients: Cephes, expf); 0 far below. NaN stays NaN.
#if defined(__AVX512F__)
INLINE Floats exponential(Floats v) {
    const __m512 x = _mm512_min_ps(_mm512_set1_ps(88), _mm512_max_ps(_mm512_set1_ps(-110), (__m512)v));
    const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504088896341f)), 8);
    const __m512 r = _mm512_fmadd_ps(n, _mm512_set1_ps(2.12194440e-4f), _mm512_fmadd_ps(n, _mm512_set1_ps(-0.693359375f), x));
    const float factors[] = {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f, 1.0f, 1.0f};
    __m512 p = _mm512_set1_ps(1.9875691500e-4f);
    UNROLL for (int i = 0; i < 7; i++) p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(factors[i]));
    return (Floats)_mm512_scalef_ps(p, n);
}
#else
INLINE Floats exponential(Floats x) {
    const Ints tiny = x < -87.0f;
    const Floats magic = all(12582912.0f);  // adding 1.5 * 2^23 rounds to an integer
    const Floats y = smaller(all(88.0f), larger(all(-87.0f), x));
    const Floats n = (y * 1.44269504088896341f + magic) - magic;
    const Floats r = (y - n * 0.693359375f) + n * 2.12194440e-4f;
    Floats p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    const Ints power = (__builtin_convertvector(n, Ints) + 127) << 23;
    return (Floats)((Ints)(p * (Floats)power) & ~tiny);
}
#endif

INLINE float exponential(float x) { return exponential(all(x))[0]; }

INLINE Floats tanh_of(Floats x) {
    const Floats twice = smaller(larger(x + x, all(-30.0f)), all(30.0f));
    return 1.0f - 2.0f / (exponential(twice) + 1.0f);
}

#if defined(__AVX512F__)

INLINE float max_of(Floats v) { return _mm512_reduce_max_ps((__m512)v); }
INLINE float sum_of(Floats v) { return _mm512_reduce_add_ps((__m512)v); }
INLINE bool exceeds(Floats v, float x) { return _mm512_cmp_ps_mask((__m512)v, (__m512)all(x), _CMP_GT_OQ); }

// Lane i becomes the sum of a[i]: four rounds of adding neighbours while transposing.
INLINE Floats sums_of(const Floats *a) {
    __m512 b[8], c[4], d[2];
    UNROLL for (int i = 0; i < 8; i++) {
        const __m512 x = (__m512)a[2 * i], y = (__m512)a[2 * i + 1];
        b[i] = _mm512_add_ps(_mm512_unpacklo_ps(x, y), _mm512_unpackhi_ps(x, y));
    }
    UNROLL for (int i = 0; i < 4; i++) {
        const __m512d x = _mm512_castps_pd(b[2 * i]), y = _mm512_castps_pd(b[2 * i + 1]);
        c[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(x, y)), _mm512_castpd_ps(_mm512_unpackhi_pd(x, y)));
    }
    UNROLL for (int i = 0; i < 2; i++)
        d[i] = _mm512_add_ps(_mm512_shuffle_f32x4(c[2 * i], c[2 * i + 1], 0x88),
                             _mm512_shuffle_f32x4(c[2 * i], c[2 * i + 1], 0xdd));
    return (Floats)_mm512_add_ps(_mm512_shuffle_f32x4(d[0], d[1], 0x88), _mm512_shuffle_f32x4(d[0], d[1], 0xdd));
}

#elif defined(__AVX2__)

INLINE float max_of(Floats v) {
    __m128 x = _mm_max_ps(_mm256_castps256_ps128((__m256)v), _mm256_extractf128_ps((__m256)v, 1));
    x = _mm_max_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_max_ss(x, _mm_movehdup_ps(x)));
}

INLINE Floats sums_of(const Floats *a) {
    __m256 b[4], c[2];
    UNROLL for (int i = 0; i < 4; i++) {
        const __m256 x = (__m256)a[2 * i], y = (__m256)a[2 * i + 1];
        b[i] = _mm256_add_ps(_mm256_unpacklo_ps(x, y), _mm256_unpackhi_ps(x, y));
    }
    UNROLL for (int i = 0; i < 2; i++) {
        const __m256d x = _mm256_castps_pd(b[2 * i]), y = _mm256_castps_pd(b[2 * i + 1]);
        c[i] = _mm256_add_ps(_mm256_castpd_ps(_mm256_unpacklo_pd(x, y)), _mm256_castpd_ps(_mm256_unpackhi_pd(x, y)));
    }
    return (Floats)_mm256_add_ps(_mm256_permute2f128_ps(c[0], c[1], 0x20), _mm256_permute2f128_ps(c[0], c[1], 0x31));
}

#else

INLINE float max_of(Floats v) {
    const float x = v[0] > v[1] ? v[0] : v[1], y = v[2] > v[3] ? v[2] : v[3];
    return x > y ? x : y;
}

INLINE Floats sums_of(const Floats *a) {
    Floats out;
    for (int i = 0; i < W; i++) out[i] = (a[i][0] + a[i][1]) + (a[i][2] + a[i][3]);
    return out;
}

#endif

#if !defined(__AVX512F__)
INLINE float sum_of(Floats v) {
    float total = 0;
    for (int i = 0; i < W; i++) total += v[i];
    return total;
}

INLINE bool exceeds(Floats v, float x) { return max_of(v) > x; }
#endif
