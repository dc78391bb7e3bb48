// Attention of many queries of one sequence (a piece of prompt) over its pages, in blocks that stay in the caches.
//
// Keys and values of TILE tokens at a time are laid out for products in which one word of a row (a float, or a pair of
// bfloat16) meets a whole vector of the other side, and all rows of a block of queries are taken through them: scores,
// running softmax (Milakov and Gimelshein, 2018; Dao et al., 2022), weighted sums. Nothing is gathered, no mask is made.
// Not responsible for few queries (attention.h): there laying out would cost more than it brings.

#pragma once
#include "products.h"
#include "step.h"

namespace {

constexpr int TALL = W == 16 ? 6 : 4, WIDE = W == 16 ? 4 : 2;  // rows and vectors of sums that registers hold
constexpr int BLOCK_ROWS = 192;                                // (query, head) pairs that a tile is laid out for, at least
constexpr int LEAST_QUERIES = 16;

// How T is laid out for products: in general as floats, one to a word.
template <class T> struct Panels {
    typedef float Word;
    static constexpr int PAIR = 1;
    INLINE Floats add(Floats sum, const Word *a, const Word *b) { return sum + *a * load(b); }
    INLINE void keys(Word *to, const T *from, int n, int dim) {  // to[element][token]
        for (int t = 0; t < n; t++)
            for (int d = 0; d < dim; d++) to[d * TILE + t] = element(from + (int64_t)t * dim + d);
    }
    INLINE void values(Word *to, const T *from, int first, int n, int dim, int64_t stride) {  // to[token][element]
        for (int t = 0; t < n; t++)
            for (int d = 0; d < dim; d++) to[(first + t) * stride + d] = element(from + (int64_t)t * dim + d);
    }
    INLINE void query(Word *to, const T *from, int dim) {
        for (int d = 0; d < dim; d++) to[d] = element(from + d);
    }
    INLINE void weights(Word *to, Floats p) { store(to, p); }
    INLINE float element(const float *p) { return *p; }
    INLINE float element(const bf16 *p) {
        const uint32_t bits = (uint32_t)p->bits << 16;
        float x;
        memcpy(&x, &bits, 4);
        return x;
    }
};

#if defined(__AVX512BF16__)
template <> struct Panels<bf16> {
    typedef uint32_t Word;  // two elements, or those of two tokens
    static constexpr int PAIR = 2;
    INLINE Floats add(Floats sum, const Word *a, const Word *b) {
        return (Floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32((int)*a), (__m512bh)_mm512_loadu_si512(b));
    }
    INLINE void keys(Word *to, const bf16 *from, int n, int dim) {
        const Word *words = (const Word *)from;
        const int num = dim / 2;
        for (int d = 0; d < num; d++)
            for (int t = 0; t < n; t++) to[d * TILE + t] = words[(int64_t)t * num + d];
    }
    INLINE void values(Word *to, const bf16 *from, int first, int n, int dim, int64_t stride) {
        for (int t = 0; t < n; t++) {
            const int half = (first + t) % 2;
            uint16_t *row = (uint16_t *)(to + (first + t) / 2 * stride) + half;
            for (int d = 0; d < dim; d++) row[2 * d] = from[(int64_t)t * dim + d].bits;
        }
    }
    INLINE void query(Word *to, const bf16 *from, int dim) { memcpy(to, from, dim * sizeof(bf16)); }
    INLINE void weights(Word *to, Floats p) {
        const __m256bh s = _mm512_cvtneps_pbh((__m512)p);
        memcpy(to, &s, sizeof s);
    }
};
#endif

// sums[r][c] += a[r][k] * b[k][c] for R rows and V vectors of columns.
template <class T, int R, int V>
INLINE void sum_up(float *sums, int64_t stride, const typename Panels<T>::Word *a, int64_t a_stride,
                   const typename Panels<T>::Word *b, int64_t b_stride, int num) {
    Floats acc[R][V];
    UNROLL for (int r = 0; r < R; r++)
        UNROLL for (int v = 0; v < V; v++) acc[r][v] = load(sums + r * stride + v * W);
    for (int k = 0; k < num; k++)
        UNROLL for (int r = 0; r < R; r++)
            UNROLL for (int v = 0; v < V; v++)
                acc[r][v] = Panels<T>::add(acc[r][v], a + r * a_stride + k, b + k * b_stride + v * W);
    UNROLL for (int r = 0; r < R; r++)
        UNROLL for (int v = 0; v < V; v++) store(sums + r * stride + v * W, acc[r][v]);
}

template <class T, int R>
INLINE void rows_by(float *sums, int64_t stride, const typename Panels<T>::Word *a, int64_t a_stride,
                    const typename Panels<T>::Word *b, int64_t b_stride, int num, int64_t columns) {
    int64_t c = 0;
    for (; c + WIDE * W <= columns; c += WIDE * W) sum_up<T, R, WIDE>(sums + c, stride, a, a_stride, b + c, b_stride, num);
    for (; c < columns; c += W) sum_up<T, R, 1>(sums + c, stride, a, a_stride, b + c, b_stride, num);
}

// One block of queries of one (sequence, KV head).
template <class T> struct Prompt {
    typedef Panels<T> P;
    typedef typename P::Word Word;

    const Step &s;
    const int64_t group, width, words;  // width: floats of a row of sums; words: of a row of queries
    Scratch &memory;
    Word *queries, *keys, *values, *weights;
    float *sums, *scores, *maxima, *totals;
    Span *limits;

    Prompt(const Step &step, Scratch &room)
        : s(step), group(step.num_heads / step.num_kv_heads), width((step.dim + W - 1) / W * W),
          words(step.dim / P::PAIR), memory(room) {}

    static int64_t queries_at_once(const Step &s) {
        const int64_t group = s.num_heads / s.num_kv_heads;
        return most(LEAST_QUERIES, (BLOCK_ROWS + group - 1) / group);
    }

    bool prepare() {
        const int64_t rows = queries_at_once(s) * group + TALL;
        const int64_t sizes[] = {rows * words, words * TILE, TILE / P::PAIR * width, rows * TILE / P::PAIR,
                                 rows * width, rows * TILE, rows, rows, rows * (int64_t)(sizeof(Span) / 4)};
        int64_t total = 0;
        for (int64_t size : sizes) total += (size * 4 + 63) / 64 * 64;
        if (!memory.grow(total)) return false;
        char *at = memory.data;
        int i = 0;
        auto next = [&] { char *now = at; at += (sizes[i++] * 4 + 63) / 64 * 64; return (void *)now; };
        queries = (Word *)next(), keys = (Word *)next(), values = (Word *)next(), weights = (Word *)next();
        sums = (float *)next(), scores = (float *)next(), maxima = (float *)next(), totals = (float *)next();
        limits = (Span *)next();
        return true;
    }

    // Tokens first .. first + n of a sequence, n <= TILE.
    void lay_out(int64_t sequence, int64_t head, int64_t first, int n) {
        const int32_t *table = s.tables + s.first_block[sequence];
        const int64_t head_size = s.block_size * s.dim, layer_size = 2 * s.num_kv_heads * head_size;
        if (n < TILE) {  // what is not there counts for nothing, but must be a number
            memset(keys, 0, words * TILE * sizeof(Word));
            memset(values, 0, TILE / P::PAIR * width * sizeof(Word));
        }
        for (int done = 0; done < n;) {
            const int64_t token = first + done, inside = token % s.block_size;
            const int run = (int)least(s.block_size - inside, n - done);
            const T *from = (const T *)s.pages + (table[token / s.block_size] * s.num_layers + s.layer) * layer_size +
                            head * head_size + inside * s.dim;
            P::keys(keys + done, from, run, (int)s.dim);
            P::values(values, from + s.num_kv_heads * head_size, done, run, (int)s.dim, width);
            done += run;
        }
    }

    void softmax(int64_t row, int64_t first_token) {
        float *score = scores + row * TILE;
        const int first = (int)most(0, limits[row].first - first_token);
        const int end = (int)most(0, least(TILE, limits[row].end - first_token));
        Ints lane;
        for (int i = 0; i < W; i++) lane[i] = i;
        Floats best = all(maxima[row]);
        for (int j = 0; j < TILE; j += W) {
            Floats x = load(score + j) * s.scale;
            if (s.softcap > 0) x = s.softcap * tanh_of(x / s.softcap);
            if (first > 0 || end < TILE) {
                const Ints visible = (lane + j >= first) & (lane + j < end);
                x = visible ? x : all(HIDDEN);
            }
            store(score + j, x);
            best = larger(best, x);
        }
        const float old = maxima[row], now = max_of(best);
        if (now > old) {
            const float shrink = exponential(old - now);
            maxima[row] = now;
            totals[row] *= shrink;
            for (int64_t d = 0; d < width; d += W) store(sums + row * width + d, load(sums + row * width + d) * shrink);
        }
        Floats total{};
        for (int j = 0; j < TILE; j += W) {
            const Floats p = exponential(load(score + j) - maxima[row]);
            total += p;
            P::weights(weights + (row * TILE + j) / P::PAIR, p);
        }
        totals[row] += sum_of(total);
    }

    // All rows over one tile that is laid out.
    void over(int64_t rows, int64_t first_token) {
        memset(scores, 0, rows * TILE * sizeof(float));
        for (int64_t row = 0; row < rows; row += TALL)
            rows_by<T, TALL>(scores + row * TILE, TILE, queries + row * words, words, keys, TILE, (int)words, TILE);
        for (int64_t row = 0; row < rows; row++) softmax(row, first_token);
        for (int64_t row = 0; row < rows; row += TALL)
            rows_by<T, TALL>(sums + row * width, width, weights + row * TILE / P::PAIR, TILE / P::PAIR, values, width,
                             TILE / P::PAIR, width);
    }

    void take(int64_t sequence, int64_t head, int64_t first_query, int64_t num) {
        const int64_t rows = num * group, padded = (rows + TALL - 1) / TALL * TALL;
        const T *query = (const T *)s.query + s.first_token[sequence] * s.query_token;
        memset(queries, 0, padded * words * sizeof(Word));
        memset(weights, 0, padded * TILE / P::PAIR * sizeof(Word));
        memset(sums, 0, padded * width * sizeof(float));
        for (int64_t row = 0; row < padded; row++) {
            const int64_t number = first_query + least(row, rows - 1) / group;
            if (row < rows)
                P::query(queries + row * words, query + number * s.query_token + (head * group + row % group) * s.query_head, (int)s.dim);
            limits[row] = seen(s, sequence, number);
            maxima[row] = NOTHING, totals[row] = 0;
        }
        const int64_t begin = limits[0].first / TILE * TILE, end = limits[rows - 1].end;
        for (int64_t token = begin; token < end; token += TILE) {
            lay_out(sequence, head, token, (int)least(TILE, s.lengths[sequence] - token));
            over(padded, token);
        }
        for (int64_t row = 0; row < rows; row++) write(sequence, head, first_query + row / group, row);
    }

    void write(int64_t sequence, int64_t kv_head, int64_t number, int64_t row) {
        const int64_t head = kv_head * group + row % group;
        float factor = 1, total = totals[row];
        if (s.sinks) {
            const float now = maxima[row] > s.sinks[head] ? maxima[row] : s.sinks[head];
            factor = exponential(maxima[row] - now);
            total = total * factor + exponential(s.sinks[head] - now);
        }
        T *out = (T *)s.out + ((s.first_token[sequence] + number) * s.num_heads + head) * s.dim;
        for (int64_t d = 0; d < s.dim; d += HALF) {
            T eight[W];
            store(eight, load(sums + row * width + d) * (factor / total));  // width is padded, so reading on is in bounds
            memcpy(out + d, eight, HALF * sizeof(T));
        }
    }
};

}  // namespace
