// Blocks of floats as int8 and back: a scale for each row (one token of one head of keys or of values in one layer).
//
// An encoded block is, in bytes: the checksum of all that follows it (8), the checksum of the block as it was (8), a
// float32 scale for each row, an int8 for each element, and zeros up to a multiple of 8. A row's scale is its largest
// magnitude / 127, so an element is off by at most half a scale. Rounding is to nearest, ties to even; the numpy way in
// native/int8.py must agree bit for bit. Part of copy.cpp, whose checksum it takes.
//
// Not responsible for checking ids or sizes (native/int8.py does).

namespace {

constexpr int64_t SUMS_BYTES = 16;
constexpr float MAGIC = 12582912.0f;  // 1.5 * 2^23: adding it rounds to a whole number, in the low bits
constexpr int32_t MAGIC_BITS = 0x4B400000;

ALWAYS_INLINE float as_float(uint32_t bits) { float f; memcpy(&f, &bits, 4); return f; }
ALWAYS_INLINE uint32_t as_bits(float f) { uint32_t bits; memcpy(&bits, &f, 4); return bits; }

// One of two, without a branch: loops of it become vectors.
ALWAYS_INLINE uint32_t pick(bool which, uint32_t yes, uint32_t no) {
    const uint32_t mask = 0u - (uint32_t)which;
    return (yes & mask) | (no & ~mask);
}

struct Float32 {
    typedef uint32_t Item;
    ALWAYS_INLINE uint32_t widen(Item item) { return item; }
    ALWAYS_INLINE Item narrow(uint32_t bits) { return bits; }
};

struct BFloat16 {
    typedef uint16_t Item;
    ALWAYS_INLINE uint32_t widen(Item item) { return (uint32_t)item << 16; }
    ALWAYS_INLINE Item narrow(uint32_t bits) { return (Item)((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16); }
};

struct Float16 {
    typedef uint16_t Item;
    ALWAYS_INLINE uint32_t widen(Item item) {
        const int32_t magnitude = ((int32_t)item & 0x7FFF) << 13;
        const uint32_t finite = as_bits(as_float(magnitude) * as_float(0x77800000));  // times 2^112; subnormals too
        return pick(magnitude >= 0x0F800000, magnitude | 0x7F800000, finite) | ((uint32_t)item & 0x8000) << 16;
    }
    ALWAYS_INLINE Item narrow(uint32_t bits) {
        const int32_t magnitude = (int32_t)(bits & 0x7FFFFFFF);
        const uint32_t normal = (magnitude - 0x38000000 + 0xFFF + ((magnitude >> 13) & 1)) >> 13;
        const uint32_t tiny = as_bits(as_float(magnitude) + 0.5f) - 0x3F000000;
        uint32_t half = pick(magnitude < 0x38800000, tiny, normal);
        half = pick(magnitude >= 0x477FF000, 0x7C00, half);
        half = pick(magnitude > 0x7F800000, 0x7E00, half);
        return (Item)(half | (bits >> 16 & 0x8000));
    }
};

template <class T> ALWAYS_INLINE void encode_rows(uint8_t *out, const uint8_t *block, int64_t rows, int64_t dim) {
    typedef typename T::Item Item;
    float *scales = (float *)(out + SUMS_BYTES);
    int8_t *values = (int8_t *)(scales + rows);
    for (int64_t r = 0; r < rows; r++, values += dim) {
        const Item *__restrict row = (const Item *)block + r * dim;
        int8_t *__restrict to = values;
        int32_t most = 0;  // magnitudes of floats are in the order of their bits
        for (int64_t i = 0; i < dim; i++) {
            const int32_t magnitude = (int32_t)(T::widen(row[i]) & 0x7FFFFFFF);
            most = magnitude > most ? magnitude : most;
        }
        const float peak = as_float((uint32_t)most);
        scales[r] = peak / 127.0f;
        const float factor = peak > 0 ? 127.0f / peak : 0.0f;
        for (int64_t i = 0; i < dim; i++)
            to[i] = (int8_t)((int32_t)as_bits(as_float(T::widen(row[i])) * factor + MAGIC) - MAGIC_BITS);
    }
}

template <class T> ALWAYS_INLINE void decode_rows(uint8_t *block, const uint8_t *in, int64_t rows, int64_t dim) {
    typedef typename T::Item Item;
    const float *scales = (const float *)(in + SUMS_BYTES);
    const int8_t *values = (const int8_t *)(scales + rows);
    for (int64_t r = 0; r < rows; r++, values += dim) {
        Item *__restrict row = (Item *)block + r * dim;
        const int8_t *__restrict from = values;
        const float scale = scales[r];
        for (int64_t i = 0; i < dim; i++) row[i] = T::narrow(as_bits((float)from[i] * scale));
    }
}

ALWAYS_INLINE void encode(int dtype, uint8_t *out, const uint8_t *block, int64_t rows, int64_t dim) {
    if (dtype == 0) encode_rows<Float32>(out, block, rows, dim);
    else if (dtype == 1) encode_rows<BFloat16>(out, block, rows, dim);
    else encode_rows<Float16>(out, block, rows, dim);
}

ALWAYS_INLINE void decode(int dtype, uint8_t *block, const uint8_t *in, int64_t rows, int64_t dim) {
    if (dtype == 0) decode_rows<Float32>(block, in, rows, dim);
    else if (dtype == 1) decode_rows<BFloat16>(block, in, rows, dim);
    else decode_rows<Float16>(block, in, rows, dim);
}

typedef void Coding(int, uint8_t *, const uint8_t *, int64_t, int64_t);
struct Codings { Coding *encode, *decode; };

#define CODING(name, ...)                                                                                       \
    __VA_ARGS__ void encode_##name(int dtype, uint8_t *out, const uint8_t *in, int64_t rows, int64_t dim) {     \
        encode(dtype, out, in, rows, dim);                                                                      \
    }                                                                                                           \
    __VA_ARGS__ void decode_##name(int dtype, uint8_t *out, const uint8_t *in, int64_t rows, int64_t dim) {     \
        decode(dtype, out, in, rows, dim);                                                                      \
    }

CODING(baseline)
#if DISPATCH
CODING(avx2, __attribute__((target("avx2"))))
CODING(avx512, __attribute__((target("avx512f,avx512dq,avx512bw,avx512vl"))))
#endif

Codings best_codings() {
#if DISPATCH
    __builtin_cpu_init();
    const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                        __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
    if (DIPTYCH_WIDEST >= 64 && avx512) return {encode_avx512, decode_avx512};
    if (DIPTYCH_WIDEST >= 32 && __builtin_cpu_supports("avx2")) return {encode_avx2, decode_avx2};
#endif
    return {encode_baseline, decode_baseline};
}

const Codings codings = best_codings();

}  // namespace

extern "C" {

// Encode blocks by id, one after the other, `out_bytes` each. dtype: 0 float32, 1 bfloat16, 2 float16.
void diptych_encode_int8(uint8_t *out, int64_t out_bytes, const uint8_t *blocks, const int32_t *ids, int64_t n,
                         int64_t block_bytes, int dtype, int64_t rows, int64_t dim) {
    const int64_t used = SUMS_BYTES + rows * (4 + dim);
    for (int64_t i = 0; i < n; i++, out += out_bytes) {
        const uint8_t *block = blocks + ids[i] * block_bytes;
        codings.encode(dtype, out, block, rows, dim);
        // Summed after it is encoded: whoever writes into it before or meanwhile changes the sum that was promised.
        uint64_t sum = passes.sum(nullptr, block, block_bytes);
        memcpy(out + 8, &sum, 8);
        memset(out + used, 0, out_bytes - used);
        sum = passes.sum(nullptr, out + 8, out_bytes - 8);
        memcpy(out, &sum, 8);
    }
}

// Decode into blocks by id, each if its checksum is right; stops at one that is not, and where `cancel` is set.
// `sums` (uint64 [n], or null) gets the checksums of the blocks as they were. Returns the number of blocks done.
int64_t diptych_decode_int8(const uint8_t *in, int64_t in_bytes, uint8_t *blocks, const int32_t *ids, int64_t n,
                            int64_t block_bytes, int dtype, int64_t rows, int64_t dim, uint64_t *sums,
                            const int32_t *cancel) {
    for (int64_t i = 0; i < n; i++, in += in_bytes) {
        uint64_t promised;
        memcpy(&promised, in, 8);
        if (asked_to_stop(cancel) || passes.sum(nullptr, in + 8, in_bytes - 8) != promised) return i;
        if (sums) memcpy(sums + i, in + 8, 8);
        codings.decode(dtype, blocks + ids[i] * block_bytes, in, rows, dim);
    }
    return n;
}

}  // extern "C"
