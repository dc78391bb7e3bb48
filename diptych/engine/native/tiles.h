// The instructions on tiles (AMX): eight registers of up to 16 rows of 64 bytes, and products of pairs of bfloat16.
//
// Each is one inline function, written twice: as the instruction, and in plain C++ with the same meaning
// (DIPTYCH_EMULATED_TILES), so that what is built on them is proven on CPUs without tiles. The instructions are spelled
// as assembly: GCC's macros for them want the number of a tile as a literal, and do not tell the compiler which memory
// is read. Source of the meaning: Intel's Software Developer's Manual, volume 2, at each instruction. A thread
// configures tiles before it uses them and releases them afterwards; a process asks Linux for them first (kernels.py).

#pragma once
#if defined(__AMX_BF16__) || defined(DIPTYCH_EMULATED_TILES)
#define DIPTYCH_TILES
#include "vectors.h"

namespace {

constexpr int NUM_TILES = 8, TILE_ROWS = 16, TILE_BYTES = 64;  // at most, of palette 1

// What `ldtilecfg` reads.
struct alignas(64) Palette {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};  // of each tile; those from the ninth on must stay zero
    uint8_t rows[16] = {};
};
static_assert(sizeof(Palette) == 64, "the manual's layout");

#if !defined(DIPTYCH_EMULATED_TILES)

INLINE void tile_config(const Palette &palette) { asm volatile("ldtilecfg %0" ::"m"(palette) : "memory"); }
INLINE void tile_release() { asm volatile("tilerelease" ::: "memory"); }
template <int TO> INLINE void tile_zero() { asm volatile("tilezero %%tmm%c0" ::"i"(TO)); }
template <int TO> INLINE void tile_load(const void *from, int64_t stride) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(TO) : "memory");
}
template <int FROM> INLINE void tile_store(void *to, int64_t stride) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride), "i"(FROM) : "memory");
}
// SUM[m][n] += A[m][2k] * B[k][2n] + A[m][2k + 1] * B[k][2n + 1], over all k.
template <int SUM, int A, int B> INLINE void tile_dpbf16ps() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(SUM), "i"(A), "i"(B));
}

#else

struct Register { uint8_t bytes[TILE_ROWS][TILE_BYTES]; };
thread_local Palette configured = {0};
thread_local Register tiles[NUM_TILES];

// Where the CPU would raise a fault.
INLINE void must(bool holds) {
    if (!holds) __builtin_trap();
}

inline void tile_config(const Palette &palette) {
    must(palette.palette == 1 && palette.start_row == 0);
    for (uint8_t byte : palette.reserved) must(byte == 0);
    for (int i = 0; i < 16; i++) {
        must(i < NUM_TILES || (palette.rows[i] == 0 && palette.row_bytes[i] == 0));
        must(palette.rows[i] <= TILE_ROWS && palette.row_bytes[i] <= TILE_BYTES);
        must((palette.rows[i] == 0) == (palette.row_bytes[i] == 0));
    }
    configured = palette;
    memset(tiles, 0, sizeof tiles);
}
inline void tile_release() {
    configured = Palette{0};
    memset(tiles, 0, sizeof tiles);
}
template <int TO> inline void tile_zero() {
    must(configured.rows[TO] > 0);
    memset(&tiles[TO], 0, sizeof(Register));
}
template <int TO> inline void tile_load(const void *from, int64_t stride) {
    tile_zero<TO>();
    for (int row = 0; row < configured.rows[TO]; row++)
        memcpy(tiles[TO].bytes[row], (const char *)from + row * stride, configured.row_bytes[TO]);
}
template <int FROM> inline void tile_store(void *to, int64_t stride) {
    must(configured.rows[FROM] > 0);
    for (int row = 0; row < configured.rows[FROM]; row++)
        memcpy((char *)to + row * stride, tiles[FROM].bytes[row], configured.row_bytes[FROM]);
}

// Numbers too small for a normal float are zero, where they are read and where they come out.
INLINE float flushed(float x) { return __builtin_fabsf(x) < __FLT_MIN__ ? __builtin_copysignf(0.0f, x) : x; }
INLINE float half_of(uint32_t pair, int which) {
    const uint32_t bits = which ? pair & 0xffff0000 : pair << 16;
    float x;
    memcpy(&x, &bits, 4);
    return flushed(x);
}

// The sums of even and of odd elements are kept apart, and put together at the end, as the manual has it.
template <int SUM, int A, int B> inline void tile_dpbf16ps() {
    const Palette &p = configured;
    must(p.rows[SUM] > 0 && p.rows[A] == p.rows[SUM] && p.row_bytes[B] == p.row_bytes[SUM]);
    must(p.row_bytes[A] % 4 == 0 && p.row_bytes[B] % 4 == 0 && p.row_bytes[A] / 4 == p.rows[B]);
    for (int m = 0; m < p.rows[SUM]; m++) {
        float even[16] = {}, odd[16] = {}, sums[16];
        for (int k = 0; k < p.rows[B]; k++) {
            uint32_t a, b[16];
            memcpy(&a, tiles[A].bytes[m] + 4 * k, 4);
            memcpy(b, tiles[B].bytes[k], sizeof b);
            for (int n = 0; n < 16; n++) {
                even[n] = flushed(__builtin_fmaf(half_of(a, 0), half_of(b[n], 0), even[n]));
                odd[n] = flushed(__builtin_fmaf(half_of(a, 1), half_of(b[n], 1), odd[n]));
            }
        }
        memcpy(sums, tiles[SUM].bytes[m], sizeof sums);
        for (int n = 0; n < 16; n++) sums[n] = flushed(flushed(sums[n]) + flushed(even[n] + odd[n]));
        memcpy(tiles[SUM].bytes[m], sums, p.row_bytes[SUM]);
    }
}

#endif

}  // namespace

#endif
