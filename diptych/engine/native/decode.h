// Attention of few queries a sequence (decodes, verification) over the tiles that a thread takes.
//
// Tile by tile, and head by head within one: scores, running softmax (Milakov and Gimelshein, 2018) in float, weighted
// sums; the next tile is fetched meanwhile. All (query, head) pairs of a KV head share what is loaded of it.
// Not responsible for which tiles a thread takes (walk.h), nor for how the parts of a sequence are cut (attention.h).

#pragma once
#include "walk.h"

namespace {

// By how much scores may exceed what weights are relative to, before sums are scaled anew: weights stay far from
// overflow, and after a row's first tile it is so seldom that nothing waits for a maximum across a vector.
constexpr float SLACK = 8;

thread_local Scratch decode_buffers;

INLINE int64_t padded(const Step &s) { return (s.dim + 31) / 32 * 32; }
// What is known of a (query, head) pair over a part: sums; what they are relative to; the total.
INLINE int64_t state_size(const Step &s) { return padded(s) + 2 * 16; }

template <class T> struct Decode {
    typedef Products<T> P;
    typedef typename P::Query Query;

    const Step &s;
    const int64_t stride, group;
    int64_t num_rows = 0, rows_kept = 0;  // of a KV head: (query, head) pairs, and as many as are worked on
    Query *queries = nullptr;
    float *sums = nullptr, *maxima = nullptr;
    Floats *totals = nullptr;
    alignas(64) float scores[4 * WIDTH];
    alignas(64) typename P::Weight weights[4 * WIDTH];

    explicit Decode(const Step &step) : s(step), stride(padded(step)), group(step.num_heads / step.num_kv_heads) {
        memset(weights, 0, sizeof weights);
    }

    // Rows are taken by fours and twos: three are four, the last of which means nothing.
    static int64_t kept(int64_t num_rows) { return num_rows + (num_rows % 4 == 3); }

    bool prepare() {
        int64_t most_rows = 0;
        for (int64_t i = 0; i < s.num_sequences; i++)
            if (s.num_queries[i] <= FEW) most_rows = most(most_rows, kept(s.num_queries[i] * group));
        const int64_t rows = (most_rows * s.num_kv_heads + 15) / 16 * 16;
        const int64_t row_bytes = stride * (int64_t)(sizeof(float) + sizeof(Query)) + (int64_t)(sizeof(float) + sizeof(Floats));
        if (!decode_buffers.grow(rows * row_bytes)) return false;
        totals = (Floats *)decode_buffers.data;
        sums = (float *)(totals + rows);
        maxima = sums + rows * stride;
        queries = (Query *)(maxima + rows);
        return true;
    }

    void start(const Item &item) {
        num_rows = s.num_queries[item.sequence] * group;
        rows_kept = kept(num_rows);
        const int64_t rows = rows_kept * s.num_kv_heads;
        const T *query = (const T *)s.query + s.first_token[item.sequence] * s.query_token;
        memset(queries, 0, rows * stride * sizeof(Query));
        memset(sums, 0, rows * stride * sizeof(float));
        for (int64_t row = 0; row < rows; row++) maxima[row] = NOTHING, totals[row] = Floats{};
        for (int64_t head = 0; head < s.num_kv_heads; head++)
            for (int64_t r = 0; r < num_rows; r++)
                P::keep_query(queries + (head * rows_kept + r) * stride,
                              query + r / group * s.query_token + (head * group + r % group) * s.query_head, (int)s.dim);
    }

    // Weights of one row over a tile, relative to about its maximum; its sums are scaled where that changes.
    void softmax(int64_t row, int slot, const Tile<T> &tile, Span limits) {
        float *score = scores + slot * WIDTH;
        const int first = (int)most(0, limits.first - tile.first);
        const int end = (int)least(tile.num_tokens, limits.end - tile.first);
        Ints lane;
        for (int i = 0; i < W; i++) lane[i] = i;
        Floats x[TILE / W], best = all(maxima[row]);
        for (int j = 0; j < TILE; j += W) {
            Floats y = load(score + j) * s.scale;
            if (s.softcap > 0) y = s.softcap * tanh_of(y / s.softcap);
            if (j < first || j + W > end) {
                const Ints visible = (lane + j >= first) & (lane + j < end);
                y = visible ? y : all(HIDDEN);
            }
            x[j / W] = y;
            best = larger(best, y);
        }
        if (exceeds(best, maxima[row] + SLACK)) {
            const float old = maxima[row], shrink = exponential(old - (maxima[row] = max_of(best)));
            totals[row] *= shrink;
            for (int64_t d = 0; d < stride; d += W) store(sums + row * stride + d, load(sums + row * stride + d) * shrink);
        }
        Floats total = totals[row];
        for (int j = 0; j < TILE; j += W) {
            const Floats p = exponential(x[j / W] - maxima[row]);
            total += p;
            P::keep_weights(weights + slot * WIDTH + j, p);
        }
        totals[row] = total;
    }

    // Some rows of one head, from the r-th of them on.
    template <int ROWS> void rows_of_tile(int64_t head, int64_t r, const Tile<T> &tile, Ahead<T> &ahead) {
        const int64_t row = head * rows_kept + r, head_size = s.block_size * s.dim;
        int at = 0;
        for (int i = 0; i < tile.num_runs; at += tile.runs[i++].num_tokens)
            P::template scores<ROWS>(scores + at, queries + row * stride, stride, tile.runs[i].keys + head * head_size,
                                     tile.runs[i].num_tokens, (int)s.dim, ahead);
        for (int slot = 0; slot < ROWS && r + slot < num_rows; slot++)
            softmax(row + slot, slot, tile, seen(s, tile.item->sequence, (r + slot) / group));
        at = 0;
        for (int i = 0; i < tile.num_runs; at += tile.runs[i++].num_tokens)
            P::template add<ROWS>(sums + row * stride, stride, weights + at,
                                  tile.runs[i].keys + (s.num_kv_heads + head) * head_size, tile.runs[i].num_tokens,
                                  (int)s.dim, ahead);
    }

    void over(const Tile<T> &tile, const Tile<T> &next) {
        Ahead<T> ahead{s, &next, 64 * Ahead<T>::LINES * ((num_rows + 3) / 4)};
        for (int64_t head = 0; head < s.num_kv_heads; head++)
            for (int64_t r = 0; r < num_rows;) {
                switch (num_rows - r) {
                case 1: rows_of_tile<1>(head, r, tile, ahead); r += 1; break;
                case 2: rows_of_tile<2>(head, r, tile, ahead); r += 2; break;
                default: rows_of_tile<4>(head, r, tile, ahead); r += 4;
                }
            }
    }

    // row: as results are numbered, without those that mean nothing.
    void write(const Item &item, int64_t row, const float *sum, float best, float total) {
        const int64_t r = row % num_rows, head = row / num_rows * group + r % group;
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
        T *out = (T *)s.out + ((s.first_token[item.sequence] + r / group) * s.num_heads + head) * s.dim;
        int64_t d = 0;
        for (; d + W <= s.dim; d += W) store(out + d, load(sum + d) * (factor / total));
        if (d < s.dim) {
            T last[W];
            store(last, load(sum + d) * (factor / total));
            memcpy(out + d, last, HALF * sizeof(T));
        }
    }

    // Joins the parts of one row, in their order, into the first.
    void join(const Item &item, int64_t row, float *states) {
        const int64_t size = state_size(s), part_size = num_rows * s.num_kv_heads * size;
        float *into = states + row * size, best = NOTHING, total = 0;
        for (int part = 0; part < item.num_parts; part++) {
            const float maximum = into[part * part_size + stride];
            best = best > maximum ? best : maximum;
        }
        for (int part = 0; part < item.num_parts; part++) {
            const float *from = into + part * part_size;
            const float factor = exponential(from[stride] - best);
            total += from[stride + 16] * factor;
            for (int64_t d = 0; d < stride; d += W)
                store(into + d, part ? load(into + d) + load(from + d) * factor : load(from + d) * factor);
        }
        write(item, row, into, best, total);
    }

    // counters: of the parts of each sequence that are not finished.
    void finish(const Item &item, float *states, int32_t *counters) {
        const int64_t rows = num_rows * s.num_kv_heads, size = state_size(s);
        states += item.states;
        for (int64_t row = 0; row < rows; row++) {
            const int64_t at = row / num_rows * rows_kept + row % num_rows;
            if (item.num_parts == 1) {
                write(item, row, sums + at * stride, maxima[at], sum_of(totals[at]));
                continue;
            }
            float *state = states + (item.part * rows + row) * size;
            memcpy(state, sums + at * stride, stride * sizeof(float));
            state[stride] = maxima[at];
            state[stride + 16] = sum_of(totals[at]);
        }
        if (item.num_parts > 1 && __atomic_sub_fetch(counters + item.sequence, 1, __ATOMIC_ACQ_REL) == 0)
            for (int64_t row = 0; row < rows; row++) join(item, row, states);
    }

    void run(Tiles<T> tiles, float *states, int32_t *counters) {
        Tile<T> two[2];
        tiles.next(two[0]);
        const Item *item = nullptr;
        for (int now = 0; two[now].num_tokens; now ^= 1) {
            const Tile<T> &tile = two[now], &next = two[now ^ 1];
            if (tile.item != item) start(*(item = tile.item));
            tiles.next(two[now ^ 1]);
            over(tile, next);
            if (!next.num_tokens || next.item != item) finish(*item, states, counters);
        }
    }
};

}  // namespace
