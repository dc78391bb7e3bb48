// Copies KV blocks and computes their checksums: one call per plan, no Python object touched, so the GIL is free.
//
// The checksum is a keyed sum over 64-bit words in eight independent lanes, in the manner of NH and XXH3: of each word
// w at row r of a lane, with key k(r), add lo32(w ^ k) * hi32(w ^ k) to one accumulator and w to another, then mix the
// sixteen accumulators and the length. Sums make lanes vectorise and let numpy do the same (native/fallback.py, which
// must agree bit for bit); keys that differ by position make swapped words show; the plain sums make any single
// changed word show for certain. It guards against stale, torn and misplaced bytes, not against an adversary.
//
// Not responsible for checking anything: native/__init__.py checks every id before it calls.

#include <stdint.h>
#include <string.h>

#define ALWAYS_INLINE static inline __attribute__((always_inline))

namespace {

constexpr int LANES = 8;
constexpr int64_t ROW_BYTES = LANES * 8;
constexpr uint64_t P1 = 0x9E3779B185EBCA87ull, P2 = 0xC2B2AE3D27D4EB4Full, P3 = 0x165667B19E3779F9ull;
constexpr uint64_t P4 = 0x85EBCA77C2B2AE63ull, P5 = 0x27D4EB2F165667C5ull;

// The lanes of a row lie in vectors of the width the CPU has: compilers split wider ones into scalars.
template <int WIDTH> struct Sum {
    typedef uint64_t Vector __attribute__((vector_size(WIDTH)));
    static constexpr int PARTS = ROW_BYTES / WIDTH, PER = WIDTH / 8;
    Vector products[PARTS], sums[PARTS], keys[PARTS];

    ALWAYS_INLINE void begin(Sum &s) {
        for (int lane = 0; lane < LANES; lane++) {
            s.products[lane / PER][lane % PER] = s.sums[lane / PER][lane % PER] = 0;
            s.keys[lane / PER][lane % PER] = P4 * (uint64_t)(2 * lane + 1);
        }
    }

    // Reads each word once, so what is summed is exactly what is stored, even if the source changes meanwhile.
    template <bool STORE> ALWAYS_INLINE void row(Sum &s, uint8_t *target, const uint8_t *source) {
        for (int part = 0; part < PARTS; part++) {
            Vector word;
            memcpy(&word, source + part * WIDTH, WIDTH);
            if (STORE) memcpy(target + part * WIDTH, &word, WIDTH);
            const Vector x = word ^ s.keys[part];
            s.products[part] += (x & 0xFFFFFFFFull) * (x >> 32);
            s.sums[part] += word;
            s.keys[part] += P2;
        }
    }

    ALWAYS_INLINE uint64_t fold(const Sum &s, int64_t num_bytes) {
        uint64_t h = (uint64_t)num_bytes * P1 + P5;
        for (int i = 0; i < 2 * LANES; i++) {
            const int lane = i % LANES;
            h ^= (i < LANES ? s.products : s.sums)[lane / PER][lane % PER] * P2;
            h = ((h << 31) | (h >> 33)) * P1;
        }
        h = (h ^ (h >> 33)) * P2;
        h = (h ^ (h >> 29)) * P3;
        return h ^ (h >> 32);
    }
};

template <bool STORE, int WIDTH> ALWAYS_INLINE uint64_t pass(uint8_t *target, const uint8_t *source, int64_t num_bytes) {
    Sum<WIDTH> s;
    Sum<WIDTH>::begin(s);
    int64_t at = 0;
    for (; at + ROW_BYTES <= num_bytes; at += ROW_BYTES)
        Sum<WIDTH>::template row<STORE>(s, STORE ? target + at : nullptr, source + at);
    if (at < num_bytes) {  // the last row, filled up with zeros
        uint8_t last[ROW_BYTES] = {};
        memcpy(last, source + at, num_bytes - at);
        if (STORE) memcpy(target + at, last, num_bytes - at);
        Sum<WIDTH>::template row<false>(s, nullptr, last);
    }
    return Sum<WIDTH>::fold(s, num_bytes);
}

// One binary for every CPU of an architecture; plain run-time dispatch, so any libc will do. DIPTYCH_PORTABLE is for
// tool chains whose linker cannot find the CPU's description; DIPTYCH_WIDEST lets a test take the narrower ways.
#ifndef DIPTYCH_WIDEST
#define DIPTYCH_WIDEST 64
#endif
#if defined(__x86_64__) && !defined(DIPTYCH_PORTABLE)
#define DISPATCH 1
#else
#define DISPATCH 0
#endif

#define VARIANT(name, width, ...)                                                                     \
    __VA_ARGS__ uint64_t copy_##name(uint8_t *target, const uint8_t *source, int64_t num_bytes) {     \
        return pass<true, width>(target, source, num_bytes);                                          \
    }                                                                                                 \
    __VA_ARGS__ uint64_t sum_##name(uint8_t *, const uint8_t *source, int64_t num_bytes) {            \
        return pass<false, width>(nullptr, source, num_bytes);                                        \
    }

typedef uint64_t Pass(uint8_t *, const uint8_t *, int64_t);
struct Passes { Pass *copy, *sum; };

VARIANT(baseline, 16)
#if DISPATCH
VARIANT(avx2, 32, __attribute__((target("avx2"))))
VARIANT(avx512, 64, __attribute__((target("avx512f,avx512dq"))))
#endif

Passes best() {
#if DISPATCH
    __builtin_cpu_init();
    const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq");
    if (DIPTYCH_WIDEST >= 64 && avx512) return {copy_avx512, sum_avx512};
    if (DIPTYCH_WIDEST >= 32 && __builtin_cpu_supports("avx2")) return {copy_avx2, sum_avx2};
#endif
    return {copy_baseline, sum_baseline};
}

const Passes passes = best();

bool asked_to_stop(const int32_t *cancel) { return cancel && __atomic_load_n(cancel, __ATOMIC_RELAXED); }

}  // namespace

extern "C" {

// Whole blocks. `sums` (uint64 [n]) and `cancel` may be null. Returns the number of blocks copied.
int64_t diptych_copy_blocks(uint8_t *target, const uint8_t *source, const int32_t *target_ids, const int32_t *source_ids,
                            int64_t n, int64_t block_bytes, uint64_t *sums, const int32_t *cancel) {
    for (int64_t i = 0; i < n; i++) {
        if (asked_to_stop(cancel)) return i;
        uint8_t *to = target + target_ids[i] * block_bytes;
        const uint8_t *from = source + source_ids[i] * block_bytes;
        if (sums) sums[i] = passes.copy(to, from, block_bytes);
        else memcpy(to, from, block_bytes);
    }
    return n;
}

// The same pieces (offset and length in bytes) of every block. Returns the number of blocks copied.
int64_t diptych_copy_pieces(uint8_t *target, const uint8_t *source, const int32_t *target_ids, const int32_t *source_ids,
                            int64_t n, int64_t block_bytes, const int64_t *offsets, const int64_t *lengths,
                            int64_t num_pieces, const int32_t *cancel) {
    for (int64_t i = 0; i < n; i++) {
        if (asked_to_stop(cancel)) return i;
        uint8_t *to = target + target_ids[i] * block_bytes;
        const uint8_t *from = source + source_ids[i] * block_bytes;
        for (int64_t p = 0; p < num_pieces; p++) memcpy(to + offsets[p], from + offsets[p], lengths[p]);
    }
    return n;
}

void diptych_checksum_blocks(const uint8_t *blocks, const int32_t *ids, int64_t n, int64_t block_bytes, uint64_t *sums) {
    for (int64_t i = 0; i < n; i++) sums[i] = passes.sum(nullptr, blocks + ids[i] * block_bytes, block_bytes);
}

}  // extern "C"

#include "sockets.h"  // one library: what lands from a socket is summed by the same routine
#include "codec.h"
