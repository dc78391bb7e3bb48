// The two products of attention over a run of tokens that lie one after the other: queries by keys, weights by values.
//
// `Products<T>` says how queries, weights and sums are kept for elements of type T. One general way in floats; for
// bfloat16 where the CPU multiplies it directly, another that works on pairs. Rows are (query, head) pairs that share
// a KV head, taken ROWS at a time so that what is loaded of K and V is used as often. Nothing beyond the n tokens is
// read. Not responsible for the softmax in between (attention.cpp).

#pragma once
#include "vectors.h"

constexpr int MAX_DIM = 256;
constexpr int TILE = 64;             // tokens whose scores are held at once
constexpr int WIDTH = TILE + 16;     // of a row of scores: writing whole vectors may overshoot

template <class T> struct Products {
    typedef float Query;
    typedef float Weight;

    // scores[r][j] = q[r] . k[j] for j < n; up to W / ROWS - 1 more are written, with nothing meant by them.
    template <int ROWS> INLINE void scores(float *out, const Query *q, int64_t q_stride, const T *k, int n, int dim) {
        constexpr int TOKENS = W / ROWS;
        for (int j = 0; j < n; j += TOKENS) {
            Floats acc[W] = {};
            const T *rows[TOKENS];
            UNROLL for (int t = 0; t < TOKENS; t++) rows[t] = k + (int64_t)(j + t < n ? j + t : n - 1) * dim;
            int d = 0;
            for (; d + W <= dim; d += W)
                UNROLL for (int t = 0; t < TOKENS; t++) {
                    const Floats x = load(rows[t] + d);
                    UNROLL for (int r = 0; r < ROWS; r++) acc[r * TOKENS + t] += x * load(q + r * q_stride + d);
                }
            if (d < dim)
                UNROLL for (int t = 0; t < TOKENS; t++) {
                    const Floats x = load_half(rows[t] + d);
                    UNROLL for (int r = 0; r < ROWS; r++) acc[r * TOKENS + t] += x * load(q + r * q_stride + d);
                }
            const Floats sums = sums_of(acc);
            UNROLL for (int r = 0; r < ROWS; r++) memcpy(out + r * WIDTH + j, (const float *)&sums + r * TOKENS, TOKENS * 4);
        }
    }

    template <int ROWS, int C, bool FULL>
    INLINE void add_chunk(float *acc, int64_t stride, const Weight *p, const T *v, int n, int dim) {
        Floats a[ROWS][C];
        UNROLL for (int r = 0; r < ROWS; r++)
            UNROLL for (int c = 0; c < C; c++) a[r][c] = load(acc + r * stride + c * W);
        for (int t = 0; t < n; t++)
            UNROLL for (int c = 0; c < C; c++) {
                const T *at = v + (int64_t)t * dim + c * W;
                const Floats x = FULL ? load(at) : load_half(at);
                UNROLL for (int r = 0; r < ROWS; r++) a[r][c] += p[r * WIDTH + t] * x;
            }
        UNROLL for (int r = 0; r < ROWS; r++)
            UNROLL for (int c = 0; c < C; c++) store(acc + r * stride + c * W, a[r][c]);
    }

    // acc[r] += sum over j < n of p[r][j] * v[j]
    template <int ROWS> INLINE void add(float *acc, int64_t stride, const Weight *p, const T *v, int n, int dim) {
        int d = 0;
        for (; d + CHUNK * W <= dim; d += CHUNK * W) add_chunk<ROWS, CHUNK, true>(acc + d, stride, p, v + d, n, dim);
        for (; d + W <= dim; d += W) add_chunk<ROWS, 1, true>(acc + d, stride, p, v + d, n, dim);
        if (d < dim) add_chunk<ROWS, 1, false>(acc + d, stride, p, v + d, n, dim);
    }

    INLINE void keep_query(Query *to, const T *from, int dim) {
        for (int d = 0; d < dim; d += HALF) {
            const Floats x = load_half(from + d);
            memcpy(to + d, &x, HALF * 4);
        }
    }
    INLINE void keep_weights(Weight *to, Floats p) { store(to, p); }
    INLINE void in_order(float *, const float *, int) {}
    static constexpr bool PERMUTES = false;
};

#if defined(__AVX512BF16__)

template <> struct Products<bf16> {
    typedef bf16 Query;
    typedef bf16 Weight;
    static constexpr int PAIRS = 32;  // elements of a vector of bfloat16

    INLINE __mmask32 lanes(int left) { return left >= PAIRS ? ~(__mmask32)0 : ((__mmask32)1 << left) - 1; }
    INLINE __m512i fetch(const bf16 *p, __mmask32 mask) { return _mm512_maskz_loadu_epi16(mask, p); }

    template <int ROWS> INLINE void scores(float *out, const Query *q, int64_t q_stride, const bf16 *k, int n, int dim) {
        constexpr int TOKENS = W / ROWS;
        for (int j = 0; j < n; j += TOKENS) {
            Floats acc[W] = {};
            const bf16 *rows[TOKENS];
            UNROLL for (int t = 0; t < TOKENS; t++) rows[t] = k + (int64_t)(j + t < n ? j + t : n - 1) * dim;
            for (int d = 0; d < dim; d += PAIRS) {
                const __mmask32 mask = lanes(dim - d);
                UNROLL for (int t = 0; t < TOKENS; t++) {
                    const __m512bh x = (__m512bh)fetch(rows[t] + d, mask);
                    UNROLL for (int r = 0; r < ROWS; r++) {
                        const __m512bh y = (__m512bh)_mm512_loadu_si512(q + r * q_stride + d);
                        acc[r * TOKENS + t] = (Floats)_mm512_dpbf16_ps((__m512)acc[r * TOKENS + t], x, y);
                    }
                }
            }
            const Floats sums = sums_of(acc);
            UNROLL for (int r = 0; r < ROWS; r++) memcpy(out + r * WIDTH + j, (const float *)&sums + r * TOKENS, TOKENS * 4);
        }
    }

    // Two tokens at once: their elements are interleaved, so sums come out in another order (see in_order).
    template <int ROWS, int C>
    INLINE void add_chunk(float *acc, int64_t stride, const Weight *p, const bf16 *v, int n, int dim, __mmask32 mask) {
        __m512 a[ROWS][C][2];
        UNROLL for (int r = 0; r < ROWS; r++)
            UNROLL for (int c = 0; c < 2 * C; c++) a[r][c / 2][c % 2] = _mm512_loadu_ps(acc + r * stride + c * W);
        for (int t = 0; t < n; t += 2) {
            const int two = t + 1 < n;  // a token without a second is paired with itself, at weight zero
            UNROLL for (int c = 0; c < C; c++) {
                const bf16 *at = v + (int64_t)t * dim + c * PAIRS;
                const __m512i x = fetch(at, mask), y = fetch(at + two * dim, mask);
                const __m512bh low = (__m512bh)_mm512_unpacklo_epi16(x, y), high = (__m512bh)_mm512_unpackhi_epi16(x, y);
                UNROLL for (int r = 0; r < ROWS; r++) {
                    uint32_t pair;
                    memcpy(&pair, p + r * WIDTH + t, 4);
                    const __m512bh w = (__m512bh)_mm512_set1_epi32((int)(two ? pair : pair & 0xffff));
                    a[r][c][0] = _mm512_dpbf16_ps(a[r][c][0], low, w);
                    a[r][c][1] = _mm512_dpbf16_ps(a[r][c][1], high, w);
                }
            }
        }
        UNROLL for (int r = 0; r < ROWS; r++)
            UNROLL for (int c = 0; c < 2 * C; c++) _mm512_storeu_ps(acc + r * stride + c * W, a[r][c / 2][c % 2]);
    }

    template <int ROWS> INLINE void add(float *acc, int64_t stride, const Weight *p, const bf16 *v, int n, int dim) {
        int d = 0;
        for (; d + 2 * PAIRS <= dim; d += 2 * PAIRS) add_chunk<ROWS, 2>(acc + d, stride, p, v + d, n, dim, lanes(PAIRS));
        for (; d < dim; d += PAIRS) add_chunk<ROWS, 1>(acc + d, stride, p, v + d, n, dim, lanes(dim - d));
    }

    INLINE void keep_query(Query *to, const bf16 *from, int dim) { memcpy(to, from, dim * sizeof(bf16)); }
    INLINE void keep_weights(Weight *to, Floats p) {
        const __m256bh s = _mm512_cvtneps_pbh((__m512)p);
        memcpy(to, &s, sizeof s);
    }
    // Each quarter of the two vectors of 32 sums holds four neighbours: put them side by side.
    INLINE void in_order(float *to, const float *acc, int dim) {
        for (int d = 0; d < dim; d += PAIRS)
            for (int quarter = 0; quarter < 4; quarter++)
                for (int half = 0; half < 2; half++)
                    memcpy(to + d + quarter * 8 + half * 4, acc + d + half * 16 + quarter * 4, 16);
    }
    static constexpr bool PERMUTES = true;
};

#endif
