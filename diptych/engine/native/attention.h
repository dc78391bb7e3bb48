// Attention over the paged pool [block, layer, K/V, head, token, dim], of few queries a sequence (decodes, verification)
// or of pieces of prompt, and the storing of a step's new keys and values: one call for each layer and step, with the
// GIL released.
//
// For few queries, work is cut into (sequence, part): a part is a stretch of the sequence's tokens, and where it is cut
// depends on the sequence alone. Threads take parts as they come; whoever finishes the last part of a sequence joins
// them, in order. So neither the batch around a sequence nor the number of threads changes one bit of its result.
//
// Not responsible for checking anything: kernels.py checks ids and shapes.

#pragma once
#include "decode.h"
#include "prompt.h"

namespace {

constexpr int64_t PART_BYTES = 256 << 10;    // of K and V in a part, at least
constexpr int64_t MAX_PARTS = 32;            // of a sequence, so that what is kept between parts is bounded
constexpr int64_t THREAD_BYTES = 192 << 10;  // of K and V, below which waking a thread costs more than it brings

thread_local Scratch partial_results, prompt_buffers;

// A sequence's parts: the tokens first .. end, so many at a time.
struct Parts { int64_t first, end, size, num; };

template <class T> Parts parts_of(const Step &s, int64_t sequence) {
    const int64_t token_bytes = 2 * s.num_kv_heads * s.dim * (int64_t)sizeof(T);
    const int64_t first = seen(s, sequence, 0).first / s.block_size * s.block_size, end = s.lengths[sequence];
    const int64_t least_size = most((PART_BYTES + token_bytes - 1) / token_bytes, (end - first + MAX_PARTS - 1) / MAX_PARTS);
    const int64_t size = (least_size + s.block_size - 1) / s.block_size * s.block_size;
    return {first, end, size, (end - first + size - 1) / size};
}

// Blocks of queries of pieces of prompt, last ones first (they see most), until none is left.
template <class T> bool prompts(const Step &s, int64_t at_once, int64_t &next) {
    Prompt<T> prompt(s, prompt_buffers);
    if (!prompt.prepare()) return false;
    for (;;) {
        int64_t mine = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED), i = 0, blocks = 0;
        for (; i < s.num_sequences; i++) {
            blocks = s.num_queries[i] > FEW ? (s.num_queries[i] + at_once - 1) / at_once : 0;
            if (mine < blocks * s.num_kv_heads) break;
            mine -= blocks * s.num_kv_heads;
        }
        if (i == s.num_sequences) return true;
        const int64_t first = (blocks - 1 - mine / s.num_kv_heads) * at_once;
        prompt.take(i, mine % s.num_kv_heads, first, least(at_once, s.num_queries[i] - first));
    }
}

template <class T>
bool decodes(const Step &s, const Item *items, int64_t num, int64_t &next, float *states, int32_t *counters) {
    Decode<T> decode(s);
    if (!decode.prepare()) return false;
    decode.run({s, items, num, next}, states, counters);
    return true;
}

template <class T> int64_t attend(const Step &s) {
    const int64_t at_once = Prompt<T>::queries_at_once(s);
    int64_t num_items = 0, num_blocks = 0, num_states = 0, num_tokens = 0;
    for (int64_t i = 0; i < s.num_sequences; i++) {
        if (s.num_queries[i] > FEW) {
            num_blocks += (s.num_queries[i] + at_once - 1) / at_once * s.num_kv_heads;
            num_tokens += THREAD_BYTES;  // there is always enough to do
            continue;
        }
        const Parts parts = parts_of<T>(s, i);
        num_items += parts.num;
        if (parts.num > 1) num_states += parts.num * s.num_heads * s.num_queries[i];
        num_tokens += parts.end - parts.first;
    }
    const int64_t state_bytes = num_states * state_size(s) * (int64_t)sizeof(float);
    const int64_t item_bytes = (num_items * (int64_t)sizeof(Item) + 63) / 64 * 64;
    if (!partial_results.grow(state_bytes + item_bytes + s.num_sequences * (int64_t)sizeof(int32_t))) return -1;
    float *states = (float *)partial_results.data;
    Item *items = (Item *)(partial_results.data + state_bytes), *item = items;
    int32_t *counters = (int32_t *)(partial_results.data + state_bytes + item_bytes);
    int64_t state = 0;
    for (int64_t i = 0; i < s.num_sequences; i++) {
        if (s.num_queries[i] > FEW) continue;
        const Parts parts = parts_of<T>(s, i);
        counters[i] = (int32_t)parts.num;
        for (int64_t p = 0; p < parts.num; p++) {
            const int64_t first = parts.first + p * parts.size;
            *item++ = {(int32_t)i, (int32_t)p, (int32_t)parts.num, first, least(first + parts.size, parts.end), state};
        }
        if (parts.num > 1) state += parts.num * s.num_heads * s.num_queries[i] * state_size(s);
    }
    const int64_t bytes = num_tokens * 2 * s.num_kv_heads * s.dim * (int64_t)sizeof(T);
    const int threads = (int)most(1, least(least(s.num_threads, num_items + num_blocks), bytes / THREAD_BYTES));
    int64_t next = 0, next_block = 0, lacking = 0;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        const bool done = (!num_blocks || prompts<T>(s, at_once, next_block)) &&
                          (!num_items || decodes<T>(s, items, num_items, next, states, counters));
        if (!done) __atomic_store_n(&lacking, 1, __ATOMIC_RELAXED);
    }
    return lacking ? -1 : 0;
}

template <class T> void keep(const Step &s) {
    const int64_t head_size = s.block_size * s.dim, row = s.dim * (int64_t)sizeof(T);
    T *layer = (T *)s.pages + s.layer * 2 * s.num_kv_heads * head_size;
    const T *key = (const T *)s.key, *value = (const T *)s.value;
    for (int64_t token = 0; token < s.num_tokens; token++)
        for (int64_t head = 0; head < s.num_kv_heads; head++) {
            T *to = layer + s.slots[token] + head * head_size;
            memcpy(to, key + head * s.key_head + token * s.key_token, row);
            memcpy(to + s.num_kv_heads * head_size, value + head * s.value_head + token * s.value_token, row);
        }
}

template <class T> int64_t keep_and_attend(const Step &s) {
    keep<T>(s);
    return s.num_sequences ? attend<T>(s) : 0;
}

}  // namespace
