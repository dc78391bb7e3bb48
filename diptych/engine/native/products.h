// The two products of attention over a run of tokens that lie one after the other: queries by keys, weights by values.
//
// `Products<T>` says how queries, weights and sums are kept for elements of type T. One general way in floats; for
// bfloat16 where the CPU multiplies it directly, another that works on pairs. Rows are (query, head) pairs that share
// a KV head, taken ROWS at a time so that what is loaded of K and V is used as often. Nothing beyond the n tokens is
// read. Not responsible for the softmax in between (decode.h).

#pragma once
#include "vectors.h"

constexpr int MAX_DIM = 256;
constexpr int TILE = 64;             // tokens whose scores are held at once
constexpr int STEP = 8;              // tokens between two fetches: seldom enough to cost nothing
constexpr int WIDTH = TILE + 16;     // of a row of scores: writing whole vectors may overshoot

template <class T> struct Products {
    typedef float Query;
    typedef float Weight;

    // scores[r][j] = q[r] . k[j] for j < n; up to W / ROWS - 1 more are written, with nothing meant by them.
    template <int ROWS, class A>
    INLINE void scores(float *out, const Query *q, int64_t q_stride, const T *k, int n, int dim, A &ahead) {
        constexpr int TOKENS = W / ROWS;
        for (int j = 0; j < n; j += TOKENS) {
            Floats acc[W] = {};
            const T *rows[TOKENS];
            UNROLL for (int t = 0; t < TOKENS; t++) rows[t] = k + (int64_t)(j + t < n ? j + t : n - 1) * dim;
            if (TOKENS >= STEP || j % STEP == 0) ahead((TOKENS > STEP ? TOKENS : STEP) * dim * sizeof(T));
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

    template <int ROWS, int C, bool FULL, class A>
    INLINE void add_chunk(float *acc, int64_t stride, const Weight *p, const T *v, int n, int dim, A &ahead) {
        Floats a[ROWS][C];
        UNROLL for (int r = 0; r < ROWS; r++)
            UNROLL for (int c = 0; c < C; c++) a[r][c] = load(acc + r * stride + c * W);
        for (int first = 0; first < n; first += STEP) {
            ahead(STEP * C * W * sizeof(T));
            for (int t = first; t < n && t < first + STEP; t++)
                UNROLL for (int c = 0; c < C; c++) {
                    const T *at = v + (int64_t)t * dim + c * W;
                    const Floats x = FULL ? load(at) : load_half(at);
                    UNROLL for (int r = 0; r < ROWS; r++) a[r][c] += p[r * WIDTH + t] * x;
                }
        }
        UNROLL for (int r = 0; r < ROWS; r++)
            UNROLL for (int c = 0; c < C; c++) store(acc + r * stride + c * W, a[r][c]);
    }

    // acc[r] += sum over j < n of p[r][j] * v[j]
    template <int ROWS, class A>
    INLINE void add(float *acc, int64_t stride, const Weight *p, const T *v, int n, int dim, A &ahead) {
        int d = 0;
        for (; d + CHUNK * W <= dim; d += CHUNK * W) add_chunk<ROWS, CHUNK, true>(acc + d, stride, p, v + d, n, dim, ahead);
        for (; d + W <= dim; d += W) add_chunk<ROWS, 1, true>(acc + d, stride, p, v + d, n, dim, ahead);
        if (d < dim) add_chunk<ROWS, 1, false>(acc + d, stride, p, v + d, n, dim, ahead);
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

template <bool B> struct Constant { static constexpr bool value = B; };

template <> struct Products<bf16> {
    typedef bf16 Query;
    typedef bf16 Weight;
    static constexpr int PAIRS = 32;  // elements of a vector of bfloat16

    INLINE __mmask32 lanes(int left) { return left >= PAIRS ? ~(__mmask32)0 : ((__mmask32)1 << left) - 1; }
    INLINE __m512i fetch(const bf16 *p, __mmask32 mask) { return _mm512_maskz_loadu_epi16(mask, p); }

    // Sixteen elements of one token beside those of another; or eight and zeros.
    template <bool FULL> INLINE __m512i beside(const bf16 *a, const bf16 *b) {
        if (FULL) {
            const __m256i x = _mm256_loadu_si256((const __m256i *)a), y = _mm256_loadu_si256((const __m256i *)b);
            return _mm512_inserti64x4(_mm512_castsi256_si512(x), y, 1);
        }
        const __m128i x = _mm_loadu_si128((const __m128i *)a), y = _mm_loadu_si128((const __m128i *)b);
        return _mm512_inserti64x4(_mm512_zextsi128_si512(x), _mm256_zextsi128_si256(y), 1);
    }

    // Each quarter becomes the four sums of that quarter of four vectors.
    INLINE __m512 quarter_sums(const __m512 *a) {
        const __m512d x = (__m512d)_mm512_add_ps(_mm512_unpacklo_ps(a[0], a[1]), _mm512_unpackhi_ps(a[0], a[1]));
        const __m512d y = (__m512d)_mm512_add_ps(_mm512_unpacklo_ps(a[2], a[3]), _mm512_unpackhi_ps(a[2], a[3]));
        return _mm512_add_ps((__m512)_mm512_unpacklo_pd(x, y), (__m512)_mm512_unpackhi_pd(x, y));
    }

    // Eight tokens at once, two to a vector, so that their sums end within its halves: that halves what it costs to
    // finish them, and one row of K meets four rows of queries from registers.
    template <int ROWS, class A>
    INLINE void scores(float *out, const Query *q, int64_t q_stride, const bf16 *k, int n, int dim, A &ahead) {
        constexpr int EIGHTS = ROWS == 1 ? 2 : 1, TOKENS = 8 * EIGHTS;
        alignas(64) bf16 few[TOKENS * MAX_DIM];  // in which what lies behind the n tokens may be read
        if (n < TOKENS) k = (const bf16 *)memcpy(few, k, (int64_t)n * dim * sizeof(bf16));
        for (int done = 0; done < n; done += TOKENS) {
            const int j = done + TOKENS <= n || n < TOKENS ? done : n - TOKENS;  // the last ones overlap those before
            const bf16 *from = k + (int64_t)j * dim;
            __m512 acc[ROWS * EIGHTS][4] = {};
            ahead(TOKENS * dim * sizeof(bf16));
            auto meet = [&](int d, auto full) __attribute__((always_inline)) {
                UNROLL for (int e = 0; e < EIGHTS; e++) {
                    __m512bh x[4];
                    UNROLL for (int i = 0; i < 4; i++)
                        x[i] = (__m512bh)beside<full.value>(from + (8 * e + i) * dim + d, from + (8 * e + i + 4) * dim + d);
                    UNROLL for (int r = 0; r < ROWS; r++) {
                        const __m256i both = _mm256_loadu_si256((const __m256i *)(q + r * q_stride + d));
                        const __m512bh y = (__m512bh)_mm512_broadcast_i64x4(both);
                        UNROLL for (int i = 0; i < 4; i++)
                            acc[r * EIGHTS + e][i] = _mm512_dpbf16_ps(acc[r * EIGHTS + e][i], x[i], y);
                    }
                }
            };
            int d = 0;
            for (; d + 16 <= dim; d += 16) meet(d, Constant<true>{});
            if (d < dim) meet(d, Constant<false>{});
            alignas(64) float sums[ROWS * TOKENS];
            UNROLL for (int i = 0; i < ROWS * EIGHTS; i += 2) {
                const __m512 x = quarter_sums(acc[i]), y = quarter_sums(acc[i + 1]);
                const __m512 low = _mm512_shuffle_f32x4(x, y, 0x88), high = _mm512_shuffle_f32x4(x, y, 0xdd);
                _mm512_store_ps(sums + 8 * i, _mm512_add_ps(low, high));
            }
            UNROLL for (int r = 0; r < ROWS; r++) memcpy(out + r * WIDTH + j, sums + r * TOKENS, TOKENS * sizeof(float));
        }
    }

    // Two tokens at once: their elements are interleaved, so sums come out in another order (see in_order).
    template <int ROWS, int C>
    INLINE void add_pair(__m512 (*acc)[C][2], const Weight *p, const bf16 *v, const bf16 *second, uint32_t kept,
                         __mmask32 mask) {
        UNROLL for (int c = 0; c < C; c++) {
            const __m512i x = fetch(v + c * PAIRS, mask), y = fetch(second + c * PAIRS, mask);
            const __m512bh low = (__m512bh)_mm512_unpacklo_epi16(x, y), high = (__m512bh)_mm512_unpackhi_epi16(x, y);
            UNROLL for (int r = 0; r < ROWS; r++) {
                uint32_t pair;
                memcpy(&pair, p + r * WIDTH, 4);
                const __m512bh w = (__m512bh)_mm512_set1_epi32((int)(pair & kept));
                acc[r][c][0] = _mm512_dpbf16_ps(acc[r][c][0], low, w);
                acc[r][c][1] = _mm512_dpbf16_ps(acc[r][c][1], high, w);
            }
        }
    }

    template <int ROWS, int C, class A>
    INLINE void add_chunk(float *acc, int64_t stride, const Weight *p, const bf16 *v, int n, int dim, __mmask32 mask,
                          A &ahead) {
        __m512 a[ROWS][C][2];
        UNROLL for (int r = 0; r < ROWS; r++)
            UNROLL for (int c = 0; c < 2 * C; c++) a[r][c / 2][c % 2] = _mm512_loadu_ps(acc + r * stride + c * W);
        int t = 0;
        for (; t + 1 < n; t += 2) {
            if (t % STEP == 0) ahead(STEP * C * PAIRS * sizeof(bf16));
            add_pair<ROWS, C>(a, p + t, v + (int64_t)t * dim, v + (int64_t)(t + 1) * dim, ~0u, mask);
        }
        if (t < n)  // without a second: with itself, at weight zero
            add_pair<ROWS, C>(a, p + t, v + (int64_t)t * dim, v + (int64_t)t * dim, 0xffff, mask);
        UNROLL for (int r = 0; r < ROWS; r++)
            UNROLL for (int c = 0; c < 2 * C; c++) _mm512_storeu_ps(acc + r * stride + c * W, a[r][c / 2][c % 2]);
    }

    template <int ROWS, class A>
    INLINE void add(float *acc, int64_t stride, const Weight *p, const bf16 *v, int n, int dim, A &ahead) {
        int d = 0;
        for (; d + 2 * PAIRS <= dim; d += 2 * PAIRS)
            add_chunk<ROWS, 2>(acc + d, stride, p, v + d, n, dim, lanes(PAIRS), ahead);
        for (; d < dim; d += PAIRS) add_chunk<ROWS, 1>(acc + d, stride, p, v + d, n, dim, lanes(dim - d), ahead);
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
