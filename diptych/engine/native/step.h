// What a call to attention is told, and which tokens a query sees.

#pragma once
#include "scratch.h"
#include "vectors.h"

// Mirrored by kernels.py; all counts and strides are of elements.
struct Step {
    void *pages;
    int64_t is_bf16, num_layers, num_kv_heads, block_size, dim, num_heads;
    const void *key, *value;  // [KV head, token, dim]
    int64_t key_head, key_token, value_head, value_token, num_tokens;
    const int64_t *slots;  // of each token: where its key's first head of layer 0 lies
    const void *query;     // [head, token, dim]
    int64_t query_head, query_token;
    void *out;  // [token, head, dim]
    int64_t num_sequences;
    const int64_t *first_token, *num_queries, *lengths, *first_block;  // of each sequence
    const int32_t *tables;
    const float *sinks;  // [head], or null
    int64_t layer, window, num_threads;
    float scale, softcap;
};

namespace {

constexpr int64_t FEW = 8;  // queries of a sequence; more of them are a piece of prompt (kernels.py: MAX_QUERIES)
constexpr float HIDDEN = -3e38f, NOTHING = -1e30f;  // a masked score; the maximum of no scores (above it)

struct Span { int64_t first, end; };

INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }
// Tokens that a query sees, by its number within the sequence's queries.
INLINE Span seen(const Step &s, int64_t sequence, int64_t query) {
    const int64_t end = s.lengths[sequence] - s.num_queries[sequence] + 1 + query;
    return {s.window > 0 ? most(0, end - s.window) : 0, end};
}

}  // namespace
