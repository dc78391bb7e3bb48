// Attention over the paged pool [block, layer, K/V, head, token, dim], of few queries a sequence (decodes, verification),
// and the storing of a step's new keys and values: one call for each layer and step, with the GIL released.
//
// Work is cut into (sequence, KV head, part): a part is a stretch of the sequence's tokens, and where it is cut depends
// on the sequence alone. Threads take parts as they come; whoever finishes the last part of a head joins them, in
// order. So neither the batch around a sequence nor the number of threads changes one bit of its result.
// Within a part, a running softmax (Milakov and Gimelshein, 2018) in float over tiles of tokens, the next tile being
// fetched meanwhile.
//
// Not responsible for checking anything: kernels.py checks ids and shapes.

#pragma once
#include "prompt.h"

namespace {

constexpr int64_t PART = 256;     // tokens of a part, at least
constexpr int64_t MAX_PARTS = 16;  // of a sequence, so that what is kept between parts is bounded
constexpr int MAX_ROWS = 64;      // (query, head) pairs worked on at once
constexpr int64_t THREAD_BYTES = 192 << 10;  // of K and V, below which waking a thread costs more than it brings
constexpr int64_t FEW = 8;        // queries of a sequence; more of them are a piece of prompt (kernels.py: MAX_QUERIES)

struct Item {
    int32_t sequence, head, part, num_parts;
    int64_t states, counter;  // of this (sequence, head): its first state, and which counter counts its parts
};

thread_local Scratch partial_results;

INLINE int64_t padded(const Step &s) { return (s.dim + 31) / 32 * 32; }
INLINE int64_t state_size(const Step &s) { return padded(s) + 2 * 16; }  // sums; then the maximum and the total

INLINE int64_t part_size(const Step &s, Span span) {
    const int64_t size = most(PART, (span.end - span.first + MAX_PARTS - 1) / MAX_PARTS);
    return (size + s.block_size - 1) / s.block_size * s.block_size;
}

INLINE Span whole(const Step &s, int64_t sequence) {
    const int64_t first = seen(s, sequence, 0).first;
    return {first / s.block_size * s.block_size, s.lengths[sequence]};
}

template <class T> struct Work {
    typedef Products<T> P;

    const Step &s;
    const int64_t stride, group, layer_size;
    alignas(64) typename P::Query queries[(MAX_ROWS + 3) * MAX_DIM];
    alignas(64) float sums[(MAX_ROWS + 3) * MAX_DIM];
    alignas(64) float scores[4 * WIDTH];
    alignas(64) typename P::Weight weights[4 * WIDTH];
    Floats totals[MAX_ROWS + 3];
    float maxima[MAX_ROWS + 3];
    Span limits[MAX_ROWS + 3];

    struct Run { const T *keys, *values; int num_tokens; };
    struct Tile { Run runs[TILE]; int num_runs, num_tokens; int64_t first; };

    explicit Work(const Step &step)
        : s(step), stride(padded(step)), group(step.num_heads / step.num_kv_heads),
          layer_size(2 * step.num_kv_heads * step.block_size * step.dim) {
        memset(weights, 0, sizeof weights);
    }

    void find(Tile &tile, const Item &item, int64_t first, int64_t end) const {
        tile.first = first;
        tile.num_runs = tile.num_tokens = 0;
        const int32_t *table = s.tables + s.first_block[item.sequence];
        const int64_t head_size = s.block_size * s.dim;
        while (first < end && tile.num_tokens < TILE) {
            const int64_t inside = first % s.block_size;
            const int n = (int)least(least(s.block_size - inside, end - first), TILE - tile.num_tokens);
            const T *keys = (const T *)s.pages + (table[first / s.block_size] * s.num_layers + s.layer) * layer_size +
                            item.head * head_size + inside * s.dim;
            tile.runs[tile.num_runs++] = {keys, keys + s.num_kv_heads * head_size, n};
            tile.num_tokens += n;
            first += n;
        }
    }

    // Into the second-level cache: a whole tile ahead is too much for the first (measured: a quarter slower there).
    static void fetch(const T *rows, int64_t num_bytes) {
        for (int64_t at = 0; at < num_bytes; at += 64) __builtin_prefetch((const char *)rows + at, 0, 2);
    }

    // Weights of one row over a tile, and the row's sums scaled to its new maximum.
    void softmax(int row, int slot, const Tile &tile) {
        float *score = scores + slot * WIDTH;
        const int first = (int)most(0, limits[row].first - tile.first);
        const int end = (int)least(tile.num_tokens, limits[row].end - tile.first);
        Ints lane;
        for (int i = 0; i < W; i++) lane[i] = i;
        Floats best = all(maxima[row]);
        for (int j = 0; j < tile.num_tokens; j += W) {
            Floats x = load(score + j) * s.scale;
            if (s.softcap > 0) x = s.softcap * tanh_of(x / s.softcap);
            const Ints visible = (lane + j >= first) & (lane + j < end);
            x = visible ? x : all(HIDDEN);
            store(score + j, x);
            best = larger(best, x);
        }
        const float old = maxima[row], now = max_of(best);
        if (now > old) {
            const float shrink = exponential(old - now);
            maxima[row] = now;
            totals[row] *= shrink;
            for (int64_t d = 0; d < stride; d += W) store(sums + row * stride + d, load(sums + row * stride + d) * shrink);
        }
        for (int j = 0; j < tile.num_tokens; j += W) {
            const Floats p = exponential(load(score + j) - now);
            totals[row] += p;
            P::keep_weights(weights + slot * WIDTH + j, p);
        }
    }

    template <int ROWS> void rows_of_tile(int row, int num_rows, const Tile &tile, const Tile *next) {
        int at = 0;
        for (int i = 0; i < tile.num_runs; at += tile.runs[i++].num_tokens) {
            const Run &run = tile.runs[i];
            constexpr int TOKENS = W / ROWS > 8 ? W / ROWS : 8;
            const bool more = next && i < next->num_runs;
            for (int j = 0; j < run.num_tokens; j += TOKENS) {
                const int n = (int)least(TOKENS, run.num_tokens - j);
                if (more && j < next->runs[i].num_tokens) {
                    const int64_t bytes = least(n, next->runs[i].num_tokens - j) * s.dim * (int64_t)sizeof(T);
                    fetch(next->runs[i].keys + j * s.dim, bytes);
                    fetch(next->runs[i].values + j * s.dim, bytes);
                }
                P::template scores<ROWS>(scores + at + j, queries + row * stride, stride, run.keys + j * s.dim, n, (int)s.dim);
            }
        }
        for (int r = 0; r < ROWS && row + r < num_rows; r++) softmax(row + r, r, tile);
        at = 0;
        for (int i = 0; i < tile.num_runs; at += tile.runs[i++].num_tokens)
            P::template add<ROWS>(sums + row * stride, stride, weights + at, tile.runs[i].values,
                                  tile.runs[i].num_tokens, (int)s.dim);
    }

    void start(const Item &item, int64_t first_row, int num_rows) {
        const T *query = (const T *)s.query + s.first_token[item.sequence] * s.query_token;
        memset(queries, 0, (num_rows + 3) * stride * sizeof queries[0]);
        memset(sums, 0, (num_rows + 3) * stride * sizeof(float));
        for (int r = 0; r < num_rows; r++) {
            const int64_t number = (first_row + r) / group, head = item.head * group + (first_row + r) % group;
            P::keep_query(queries + r * stride, query + number * s.query_token + head * s.query_head, (int)s.dim);
            limits[r] = seen(s, item.sequence, number);
            maxima[r] = NOTHING;
            totals[r] = Floats{};
        }
    }

    // The sums, maxima and totals of some rows over one part.
    void over(const Item &item, int64_t first_row, int num_rows) {
        start(item, first_row, num_rows);
        const Span span = whole(s, item.sequence);
        const int64_t size = part_size(s, span);
        int64_t first = most(span.first + item.part * size, limits[0].first);
        const int64_t end = least(span.first + (item.part + 1) * size, span.end);
        Tile tiles[2];
        find(tiles[0], item, first, end);
        for (int now = 0; tiles[now].num_tokens; now ^= 1) {
            first += tiles[now].num_tokens;
            find(tiles[now ^ 1], item, first, end);
            for (int row = 0; row < num_rows;) {
                const Tile *next = row == 0 ? &tiles[now ^ 1] : nullptr;
                switch (num_rows - row) {
                case 1: rows_of_tile<1>(row, num_rows, tiles[now], next); row += 1; break;
                case 2: rows_of_tile<2>(row, num_rows, tiles[now], next); row += 2; break;
                default: rows_of_tile<4>(row, num_rows, tiles[now], next); row += 4;
                }
            }
        }
    }

    void write(const Item &item, int64_t row, const float *sum, float best, float total) {
        const int64_t head = item.head * group + row % group;
        float factor = 1;
        if (s.sinks) {
            const float now = best > s.sinks[head] ? best : s.sinks[head];
            factor = exponential(best - now);
            total = total * factor + exponential(s.sinks[head] - now);
        }
        alignas(64) float ordered[MAX_DIM];
        if (P::PERMUTES) {
            P::in_order(ordered, sum, (int)s.dim);
            sum = ordered;
        }
        T *out = (T *)s.out + ((s.first_token[item.sequence] + row / group) * s.num_heads + head) * s.dim;
        int64_t d = 0;
        for (; d + W <= s.dim; d += W) store(out + d, load(sum + d) * (factor / total));
        if (d < s.dim) {
            T last[W];
            store(last, load(sum + d) * (factor / total));
            memcpy(out + d, last, HALF * sizeof(T));
        }
    }

    // Joins the parts of one row, in their order, into the first.
    void join(const Item &item, int64_t row, int64_t num_rows, float *states) {
        const int64_t size = state_size(s);
        float *into = states + row * size, best = NOTHING, total = 0;
        for (int part = 0; part < item.num_parts; part++)
            best = largest(best, states[(part * num_rows + row) * size + stride]);
        for (int part = 0; part < item.num_parts; part++) {
            const float *from = states + (part * num_rows + row) * size;
            const float factor = exponential(from[stride] - best);
            total += from[stride + 16] * factor;
            for (int64_t d = 0; d < stride; d += W)
                store(into + d, part ? load(into + d) + load(from + d) * factor : load(from + d) * factor);
        }
        write(item, row, into, best, total);
    }

    static float largest(float a, float b) { return a > b ? a : b; }

    void take(const Item &item, float *states, int32_t *counters) {
        const int64_t num_rows = s.num_queries[item.sequence] * group, size = state_size(s);
        states += item.states * size;
        for (int64_t first = 0; first < num_rows; first += MAX_ROWS) {
            const int rows = (int)least(MAX_ROWS, num_rows - first);
            over(item, first, rows);
            for (int r = 0; r < rows; r++) {
                const float total = sum_of(totals[r]);
                if (item.num_parts == 1) {
                    write(item, first + r, sums + r * stride, maxima[r], total);
                    continue;
                }
                float *state = states + (item.part * num_rows + first + r) * size;
                memcpy(state, sums + r * stride, stride * sizeof(float));
                state[stride] = maxima[r];
                state[stride + 16] = total;
            }
        }
        if (item.num_parts > 1 && __atomic_sub_fetch(counters + item.counter, 1, __ATOMIC_ACQ_REL) == 0)
            for (int64_t row = 0; row < num_rows; row++) join(item, row, num_rows, states);
    }
};

INLINE int64_t num_parts(const Step &s, int64_t sequence) {
    const Span span = whole(s, sequence);
    const int64_t size = part_size(s, span);
    return (span.end - span.first + size - 1) / size;
}

thread_local Scratch prompt_buffers;

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

template <class T> int64_t attend(const Step &s) {
    const int64_t group = s.num_heads / s.num_kv_heads;
    const int64_t at_once = Prompt<T>::queries_at_once(s);
    int64_t num_items = 0, num_blocks = 0, num_states = 0, num_tokens = 0;
    for (int64_t i = 0; i < s.num_sequences; i++) {
        if (s.num_queries[i] > FEW) {
            num_blocks += (s.num_queries[i] + at_once - 1) / at_once * s.num_kv_heads;
            num_tokens += THREAD_BYTES;  // there is always enough to do
            continue;
        }
        const int64_t parts = num_parts(s, i);
        num_items += parts * s.num_kv_heads;
        if (parts > 1) num_states += parts * s.num_kv_heads * s.num_queries[i] * group;
        num_tokens += whole(s, i).end - whole(s, i).first;
    }
    const int64_t state_bytes = num_states * state_size(s) * (int64_t)sizeof(float);
    const int64_t item_bytes = (num_items * (int64_t)sizeof(Item) + 63) / 64 * 64;
    if (!partial_results.grow(state_bytes + item_bytes + s.num_sequences * s.num_kv_heads * 4)) return -1;
    float *states = (float *)partial_results.data;
    Item *items = (Item *)(partial_results.data + state_bytes);
    int32_t *counters = (int32_t *)(partial_results.data + state_bytes + item_bytes);
    int64_t made = 0, state = 0;
    for (int64_t i = 0; i < s.num_sequences; i++)
        for (int64_t head = 0; head < s.num_kv_heads && s.num_queries[i] <= FEW; head++) {
            const int32_t parts = (int32_t)num_parts(s, i);
            const int64_t counter = i * s.num_kv_heads + head;
            counters[counter] = parts;
            for (int32_t p = 0; p < parts; p++) items[made++] = {(int32_t)i, (int32_t)head, p, parts, state, counter};
            if (parts > 1) state += parts * s.num_queries[i] * group;
        }
    const int64_t bytes = num_tokens * 2 * s.num_kv_heads * s.dim * (int64_t)sizeof(T);
    const int threads = (int)most(1, least(least(s.num_threads, num_items + num_blocks), bytes / THREAD_BYTES));
    int64_t next = 0, next_block = 0, lacking = 0;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        if (num_blocks && !prompts<T>(s, at_once, next_block)) __atomic_store_n(&lacking, 1, __ATOMIC_RELAXED);
        if (num_items) {
            Work<T> work(s);
            for (int64_t i; (i = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED)) < num_items;)
                work.take(items[i], states, counters);
        }
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
