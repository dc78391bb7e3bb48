// Linear layers of bfloat16 by tiles, for more than a few rows of input: y[m][n] = x[m] . weight[n] + bias[n].
//
// One side of a product of tiles is read as it lies, the other in pairs: word m of its row j is word j of row m. Here
// the weights are the former, [out, in] as PyTorch keeps them, so only the input is laid out anew, once for all layers
// that share it and by all threads; what comes out, [n][m], is turned around while bias and factors are applied. The
// other way round every step would lay the weights out anew, or every weight would be held twice. Two tiles of each
// side and four of sums are all eight: each tile that is loaded is used twice. A width is a multiple of 32 (linears.py),
// which is a tile's; rows that do not fill a tile of weights are multiplied with smaller ones, those of the input are
// padded with zeros. Sums are taken in an order that depends on the width alone.
//
// This has never run on a CPU with tiles. The tests run it with its instructions emulated (tiles.h), which proves what
// it computes and says nothing of its speed; every number below is reasoned, none was measured.

#pragma once
#include "linear.h"
#include "tiles.h"

#if defined(DIPTYCH_TILES)

namespace {

// Rows of input that are left to vectors. A row is one FLOP for each byte of weights; vectors do 8 in the time in which
// memory delivers a byte, tiles 80 (docs/engine.md). Up to 8 rows both would wait for memory.
constexpr int64_t STREAMED = 8;
constexpr int64_t GROUP = 2 * TILE_ROWS;                     // rows of the weight, and of input, that are taken at once
constexpr int64_t DEPTH = TILE_BYTES / sizeof(bf16);         // elements of a row that one product of tiles sums up
constexpr int64_t PANEL_BYTES = 1 << 20;                     // of input used before the rest: half a second-level cache

// Tiles 0 to 3 are sums, 4 and 5 rows of the weight, 6 and 7 the input.
INLINE void configure(int64_t rows) {
    Palette palette;
    for (int i = 0; i < NUM_TILES; i++) palette.rows[i] = i < 6 ? rows : TILE_ROWS, palette.row_bytes[i] = TILE_BYTES;
    tile_config(palette);
}

// Word i of vector j goes to word j of vector i: each of four perfect shuffles turns the eight bits of (j, i) by one.
INLINE void transpose(__m512i *a) {
    const __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
    UNROLL for (int round = 0; round < 4; round++) {
        __m512i b[16];
        UNROLL for (int i = 0; i < 8; i++) {
            b[2 * i] = _mm512_permutex2var_epi32(a[i], low, a[i + 8]);
            b[2 * i + 1] = _mm512_permutex2var_epi32(a[i], high, a[i + 8]);
        }
        UNROLL for (int i = 0; i < 16; i++) a[i] = b[i];
    }
}

// A block of 16 rows of input, `num` of which are there, as one tile for each 32 columns.
INLINE void pack(const bf16 *x, int64_t num, int64_t columns, bf16 *to) {
    for (int64_t k = 0; k < columns; k += DEPTH, to += TILE_ROWS * DEPTH) {
        __m512i words[16];
        UNROLL for (int m = 0; m < 16; m++)
            words[m] = m < num ? _mm512_loadu_si512(x + m * columns + k) : _mm512_setzero_si512();
        transpose(words);
        UNROLL for (int j = 0; j < 16; j++) _mm512_storeu_si512(to + j * DEPTH, words[j]);
    }
}

typedef float Sums[TILE_ROWS * 16];  // [n][m]

// N tiles of the weight's rows against M blocks of input.
template <int N, int M>
INLINE void product(const bf16 *weight, const bf16 *ahead, const bf16 *blocks, int64_t columns, Sums *sums) {
    const int64_t stride = columns * (int64_t)sizeof(bf16), block = TILE_ROWS * columns;
    tile_zero<0>();
    if constexpr (M > 1) tile_zero<1>();
    if constexpr (N > 1) tile_zero<2>();
    if constexpr (N > 1 && M > 1) tile_zero<3>();
    for (int64_t k = 0; k < columns; k += DEPTH) {
        if (ahead) UNROLL for (int r = 0; r < N * TILE_ROWS; r++) __builtin_prefetch(ahead + N * TILE_ROWS * k + r * DEPTH, 0, 1);
        tile_load<6>(blocks + k * TILE_ROWS, TILE_BYTES);
        tile_load<4>(weight + k, stride);
        tile_dpbf16ps<0, 4, 6>();
        if constexpr (M > 1) tile_load<7>(blocks + block + k * TILE_ROWS, TILE_BYTES);
        if constexpr (M > 1) tile_dpbf16ps<1, 4, 7>();
        if constexpr (N > 1) tile_load<5>(weight + block + k, stride);
        if constexpr (N > 1) tile_dpbf16ps<2, 5, 6>();
        if constexpr (N > 1 && M > 1) tile_dpbf16ps<3, 5, 7>();
    }
    tile_store<0>(sums[0], TILE_BYTES);
    if constexpr (M > 1) tile_store<1>(sums[1], TILE_BYTES);
    if constexpr (N > 1) tile_store<2>(sums[2], TILE_BYTES);
    if constexpr (N > 1 && M > 1) tile_store<3>(sums[3], TILE_BYTES);
}

// out[m][n .. n + rows] for m < num, of one tile of sums.
INLINE void finish(const Sums &sums, const Matrix &a, int64_t n, int64_t rows, int64_t num, bf16 *out) {
    const __mmask16 mask = (__mmask16)((1u << rows) - 1);
    __m512i words[16];
    UNROLL for (int i = 0; i < 16; i++) words[i] = _mm512_loadu_si512(sums + i * 16);
    transpose(words);
    __m512 factor = _mm512_set1_ps(1.0f), offset = _mm512_setzero_ps();
    if (a.scales) factor = _mm512_maskz_loadu_ps(mask, a.scales + n);
    if (a.bias) {
        const __m256i bias = _mm256_maskz_loadu_epi16(mask, (const bf16 *)a.bias + n);
        offset = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bias), 16));
    }
    UNROLL for (int m = 0; m < 16; m++)
        if (m < num) {
            const __m512 y = _mm512_fmadd_ps(_mm512_castsi512_ps(words[m]), factor, offset);
            _mm256_mask_storeu_epi16(out + m * a.rows + n, mask, (__m256i)_mm512_cvtneps_pbh(y));
        }
}

// N tiles of `rows` rows of a layer, from row n on, against all of a panel.
template <int N>
INLINE void against_panel(const Matrix &a, int64_t n, int64_t rows, const bf16 *weight, const bf16 *ahead,
                          const bf16 *panel, int64_t num, bf16 *out) {
    alignas(64) Sums sums[4] = {};
    for (int64_t m = 0; m < num; m += GROUP, ahead = nullptr) {  // the rows are in the cache then, and so are those that come
        const bf16 *blocks = panel + m * a.columns;
        if (num - m > TILE_ROWS) product<N, 2>(weight, ahead, blocks, a.columns, sums);
        else product<N, 1>(weight, ahead, blocks, a.columns, sums);
        for (int i = 0; i < N; i++)
            for (int64_t j = 0; j < 2 && m + j * TILE_ROWS < num; j++) {
                const int64_t left = num - m - j * TILE_ROWS;
                finish(sums[2 * i + j], a, n + i * TILE_ROWS, rows, left, out + (m + j * TILE_ROWS) * a.rows);
            }
    }
}

// Rows first .. end of a layer: out[m][n] for all m.
inline bool tiled_rows(const Matrix &a, int64_t first, int64_t end, const bf16 *panel, int64_t num, bf16 *out) {
    if (a.scales && !widened.grow(GROUP * a.columns * (int64_t)sizeof(bf16))) return false;
    bf16 *room = (bf16 *)widened.data;
    const int64_t fitting = PANEL_BYTES / (GROUP * a.columns * (int64_t)sizeof(bf16)), slab = GROUP * (fitting < 1 ? 1 : fitting);
    for (int64_t m = 0; m < num; m += slab, panel += slab * a.columns, out += slab * a.rows) {
        const int64_t used = num - m < slab ? num - m : slab;
        int64_t n = first;
        for (; n + GROUP <= end; n += GROUP) {
            const bf16 *weight = rows_of(a, n, GROUP, room);
            const bf16 *ahead = !a.scales && n + 2 * GROUP <= a.rows ? weight + GROUP * a.columns : nullptr;
            against_panel<2>(a, n, TILE_ROWS, weight, ahead, panel, used, out);
        }
        if (n + TILE_ROWS <= end) {
            against_panel<1>(a, n, TILE_ROWS, rows_of(a, n, TILE_ROWS, room), nullptr, panel, used, out);
            n += TILE_ROWS;
        }
        if (n == end) continue;
        configure(end - n);
        against_panel<1>(a, n, end - n, rows_of(a, n, end - n, room), nullptr, panel, used, out);
        configure(TILE_ROWS);
    }
    return true;
}

thread_local Scratch packed;

// Several layers of one input: outs[i] is [num, rows of layer i].
inline bool tiled(const Matrix *layers, bf16 *const *outs, int count, const bf16 *x, int64_t num, int threads) {
    const int64_t columns = layers[0].columns, num_blocks = (num + TILE_ROWS - 1) / TILE_ROWS, block = TILE_ROWS * columns;
    if (!packed.grow(num_blocks * block * (int64_t)sizeof(bf16))) return false;
    bf16 *panel = (bf16 *)packed.data;  // of the thread that calls; the others see it too
    int64_t next = 0, lacking = 0;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
#pragma omp for schedule(static)
        for (int64_t i = 0; i < num_blocks; i++) pack(x + i * block, num - i * TILE_ROWS, columns, panel + i * block);
        configure(TILE_ROWS);
        if (!in_pieces(layers, count, GROUP, threads, next, [&](int i, int64_t first, int64_t end) {
                return tiled_rows(layers[i], first, end, panel, num, outs[i]);
            }))
            __atomic_store_n(&lacking, 1, __ATOMIC_RELAXED);
        tile_release();  // with nothing in them, Linux has nothing to save
    }
    return !lacking;
}

}  // namespace

#endif
