// Linear layers, above all for few rows of input: y[m][n] = x[m] . weight[n] + bias[n].
//
// With few rows the weights are all that costs: they are read once, in the order in which PyTorch keeps them
// ([out, in], nothing is packed), ROWS of them against INPUTS rows of x at a time, so that what is loaded is used often
// and every sum stays in a register. The hardware does not see far ahead in several rows at once, so the next ones are
// fetched by hand (measured on one core: 14 GB/s without, 28 with). Layers that share an input are one call.
// Sums are taken in an order that depends on the shape alone: neither threads nor other rows change a bit.
// Many rows of input are as fast as with oneDNN where bfloat16 is multiplied by vectors; where there are tiles for it
// (AMX), or in float32, it is faster, and linears.py leaves them to it. Our own product by tiles: tiled.h.

#pragma once
#include "scratch.h"
#include "vectors.h"

// A linear layer: weight [rows, columns], bias [rows] or null. With scales [rows] the weight is of int8, and a row of it
// counts that many times. Mirrored by kernels.py.
struct Matrix {
    const void *weight, *bias;
    const float *scales;
    int64_t rows, columns;
};

namespace {

constexpr int ROWS = W == 16 ? 4 : 2, INPUTS = W == 16 ? 6 : 4;  // as many sums as there are registers for
constexpr int64_t AHEAD = 2;                                     // groups of rows fetched ahead
constexpr int64_t SLAB = 192;                                    // rows of x that are used before the next ones
constexpr int64_t MATRIX_THREAD_BYTES = 256 << 10;  // of weights, below which waking a thread costs more than it brings

// How a piece of a row is multiplied with a piece of the input: in general, in floats.
template <class T> struct Dot {
    typedef float Input;
    static constexpr int STEP = W;
    INLINE Floats piece(const T *p) { return load(p); }
    INLINE Floats input(const Input *p) { return load(p); }
    INLINE Floats add(Floats sum, Floats a, Floats b) { return sum + a * b; }
};

#if defined(__AVX512BF16__)
template <> struct Dot<bf16> {
    typedef bf16 Input;
    static constexpr int STEP = 32;
    INLINE __m512bh piece(const bf16 *p) { return (__m512bh)_mm512_loadu_si512(p); }
    INLINE __m512bh input(const bf16 *p) { return (__m512bh)_mm512_loadu_si512(p); }
    INLINE Floats add(Floats sum, __m512bh a, __m512bh b) { return (Floats)_mm512_dpbf16_ps((__m512)sum, a, b); }
};
#endif

#if defined(__AVX512BF16__)
INLINE void keep(bf16 *to, Floats x) {
    const __m256bh s = _mm512_cvtneps_pbh((__m512)x);
    memcpy(to, &s, sizeof s);
}
#else
INLINE void keep(bf16 *to, Floats x) { store(to, x); }
#endif
INLINE void keep(float *to, Floats x) { store(to, x); }

INLINE void put(float *to, float x) { *to = x; }
INLINE void put(bf16 *to, float x) {
    uint32_t u;
    memcpy(&u, &x, 4);
    to->bits = x == x ? (uint16_t)((u + 0x7fff + ((u >> 16) & 1)) >> 16) : (uint16_t)((u >> 16) | 0x40);
}
INLINE float get(const float *from) { return *from; }
INLINE float get(const bf16 *from) {
    const uint32_t u = (uint32_t)from->bits << 16;
    float x;
    memcpy(&x, &u, 4);
    return x;
}

// R rows of the weight against M rows of the input.
template <class T, int R, int M>
INLINE void tile(const T *weight, const T *bias, const float *scales, const typename Dot<T>::Input *x, int64_t columns, const T *ahead, T *out,
                 int64_t out_stride) {
    typedef Dot<T> D;
    constexpr int NUM = (R * M + W - 1) / W * W;
    Floats sums[NUM] = {};
    for (int64_t k = 0; k < columns; k += D::STEP) {
        decltype(D::piece(weight)) pieces[R];
        UNROLL for (int r = 0; r < R; r++) {
            pieces[r] = D::piece(weight + r * columns + k);
            if (ahead) __builtin_prefetch(ahead + R * k + r * D::STEP, 0, 1);
        }
        UNROLL for (int m = 0; m < M; m++) {
            const auto input = D::input(x + m * columns + k);
            UNROLL for (int r = 0; r < R; r++) sums[m * R + r] = D::add(sums[m * R + r], pieces[r], input);
        }
    }
    T totals[NUM];
    Floats offset{};
    Floats factor = all(1.0f);
    if (bias) UNROLL for (int i = 0; i < W; i++) offset[i] = get(bias + i % R);
    if (scales) UNROLL for (int i = 0; i < W; i++) factor[i] = scales[i % R];
    UNROLL for (int i = 0; i < NUM; i += W) keep(totals + i, sums_of(sums + i) * factor + offset);
    UNROLL for (int m = 0; m < M; m++) memcpy(out + m * out_stride, totals + m * R, R * sizeof(T));
}

template <class T, int R>
INLINE void against_all(const T *weight, const T *bias, const float *scales, const typename Dot<T>::Input *x, int64_t num, int64_t columns,
                        bool fetch, T *out, int64_t out_stride) {
    const T *ahead = fetch ? weight + AHEAD * R * columns : nullptr;
    for (int64_t m = 0; m < num;) {
        const auto *rows = x + m * columns;
        T *to = out + m * out_stride;
        switch (num - m) {
        case 1: tile<T, R, 1>(weight, bias, scales, rows, columns, ahead, to, out_stride); m += 1; break;
        case 2: tile<T, R, 2>(weight, bias, scales, rows, columns, ahead, to, out_stride); m += 2; break;
        case 3: tile<T, R, 3>(weight, bias, scales, rows, columns, ahead, to, out_stride); m += 3; break;
        case 4: tile<T, R, 4>(weight, bias, scales, rows, columns, ahead, to, out_stride); m += 4; break;
        case 5: tile<T, R, INPUTS - 1>(weight, bias, scales, rows, columns, ahead, to, out_stride); m += INPUTS - 1; break;
        default: tile<T, R, INPUTS>(weight, bias, scales, rows, columns, ahead, to, out_stride); m += INPUTS;
        }
        ahead = nullptr;  // the rows are in the cache now, and so are those that come
    }
}

thread_local Scratch widened;

// W weights. By way of integers: compilers make nothing good of bytes turned to floats at once.
INLINE Floats wide(const int8_t *from) {
    typedef int8_t Bytes __attribute__((vector_size(W)));
    Bytes bytes;
    memcpy(&bytes, from, sizeof bytes);
#if defined(__AVX512F__)
    return (Floats)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32((__m128i)bytes));
#else
    return __builtin_convertvector(__builtin_convertvector(bytes, Ints), Floats);
#endif
}
INLINE void widen(const int8_t *from, float *to) { store(to, wide(from)); }
INLINE void widen(const int8_t *from, bf16 *to) { keep(to, wide(from)); }  // whole numbers up to 127 lose nothing

// Some rows of a layer as T: where they lie, or widened into `room`, where few of them stay in the first-level cache.
template <class T> INLINE const T *rows_of(const Matrix &a, int64_t n, int64_t rows, T *room) {
    if (!a.scales) return (const T *)a.weight + n * a.columns;
    const int8_t *from = (const int8_t *)a.weight + n * a.columns;
    for (int64_t i = 0; i < rows * a.columns; i += 64) {
        __builtin_prefetch(from + AHEAD * 2 * ROWS * a.columns + i, 0, 1);
        for (int64_t j = i; j < i + 64 && j < rows * a.columns; j += W) widen(from + j, room + j);
    }
    return room;
}

template <class T, int R>
INLINE void some_row(const Matrix &a, int64_t n, const typename Dot<T>::Input *x, int64_t num, T *room, bool fetch, T *out,
                     int64_t out_stride) {
    const T *bias = (const T *)a.bias;
    against_all<T, R>(rows_of(a, n, R, room), bias ? bias + n : nullptr, a.scales ? a.scales + n : nullptr, x, num,
                      a.columns, fetch && !a.scales, out + n, out_stride);
}

// Rows first .. end of a layer: out[m][n] for all m, as many of them at a time as the second-level cache holds.
template <class T>
bool some_rows(const Matrix &a, int64_t first, int64_t end, const typename Dot<T>::Input *x, int64_t num, T *out,
               int64_t out_stride) {
    if (a.scales && !widened.grow(ROWS * a.columns * (int64_t)sizeof(T))) return false;
    T *room = (T *)widened.data;
    for (int64_t m = 0; m < num; m += SLAB, x += SLAB * a.columns, out += SLAB * out_stride) {
        const int64_t slab = num - m < SLAB ? num - m : SLAB;
        int64_t n = first;
        for (; n + ROWS <= end; n += ROWS)
            some_row<T, ROWS>(a, n, x, slab, room, n + (AHEAD + 1) * ROWS <= a.rows, out, out_stride);
        for (; n < end; n++) some_row<T, 1>(a, n, x, slab, room, false, out, out_stride);
    }
    return true;
}

// What one thread takes at a time: long enough to stream, short enough to share out fairly.
INLINE int64_t rows_at_once(int64_t rows, int64_t multiple, int threads) {
    if (threads == 1) return rows;
    const int64_t share = (rows + 4 * threads - 1) / (4 * threads);
    return ((share < 16 ? 16 : share) + multiple - 1) / multiple * multiple;
}

// Rows of several layers in pieces, for one of the threads that share `next`: work(layer, first, end), until none is left.
template <class Work>
INLINE bool in_pieces(const Matrix *layers, int count, int64_t multiple, int threads, int64_t &next, Work work) {
    for (bool fine = true;;) {
        int64_t mine = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED);
        int i = 0;
        for (; i < count; i++) {
            const int64_t rows = layers[i].rows, step = rows_at_once(rows, multiple, threads), pieces = (rows + step - 1) / step;
            if (mine < pieces) {
                const int64_t first = mine * step;
                fine &= work(i, first, first + step < rows ? first + step : rows);
                break;
            }
            mine -= pieces;
        }
        if (i == count) return fine;
    }
}

}  // namespace
