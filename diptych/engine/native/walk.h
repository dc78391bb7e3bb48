// Which tokens a thread takes next, where they lie in the pool [block, layer, K/V, head, token, dim], and their fetching.
//
// A block's keys and values of one layer, of all KV heads, lie one after the other; blocks are scattered. The hardware
// fetches ahead only what follows, so what decides the speed of reading is the order: measured on one core, 27 GB/s from
// end to end; in blocks of 32 KiB, 22 with the heads of a block together, 16 with each head by itself.
// Not responsible for what is done with the tokens (decode.h).

#pragma once
#include "products.h"
#include "step.h"

namespace {

// A stretch of one sequence's tokens, for all heads: the piece of work that threads take.
struct Item {
    int32_t sequence, part, num_parts;
    int64_t first, end, states;  // tokens; where the states of its sequence's parts begin
};

template <class T> struct Tile {
    struct Run { const T *keys; int num_tokens; };  // of the first head; they lie one after the other

    const Item *item;
    int64_t first;
    int num_tokens, num_runs;
    Run runs[TILE];
};

// The tiles of one thread. The next item is taken when there is no tile left of the one before, while the
// last of them is worked on: so it can be fetched meanwhile.
template <class T> struct Tiles {
    const Step &s;
    const Item *items;
    const int64_t num_items;
    int64_t &taken;  // of all threads
    const Item *item = nullptr;
    int64_t at = 0;

    void next(Tile<T> &tile) {
        tile.num_runs = tile.num_tokens = 0;
        if (!item || at == item->end) {
            const int64_t mine = __atomic_fetch_add(&taken, 1, __ATOMIC_RELAXED);
            if (mine >= num_items) return;
            item = items + mine;
            at = item->first;
        }
        tile.item = item;
        tile.first = at;
        const int32_t *table = s.tables + s.first_block[item->sequence];
        const int64_t layer_size = 2 * s.num_kv_heads * s.block_size * s.dim;
        while (at < item->end && tile.num_tokens < TILE) {
            const int64_t inside = at % s.block_size;
            const int n = (int)least(least(s.block_size - inside, item->end - at), TILE - tile.num_tokens);
            const T *block = (const T *)s.pages + (table[at / s.block_size] * s.num_layers + s.layer) * layer_size;
            tile.runs[tile.num_runs++] = {block + inside * s.dim, n};
            tile.num_tokens += n;
            at += n;
        }
    }
};

// Fetches a tile in the order of memory, a little with each piece of work on the tile before it: all at once would leave
// memory idle for the rest of the time. Into the second-level cache: a tile is too much for the first.
template <class T> struct Ahead {
    static constexpr int LINES = 4;

    const Step &s;
    const Tile<T> *tile;
    const int64_t price;  // bytes read for each time that something is fetched: more where they are read several times
    int64_t due = 0, stretch = 0;
    int run = 0;
    const char *at = nullptr, *end = nullptr;

    INLINE_MEMBER void operator()(int64_t num_bytes) {
        for (due += num_bytes; due >= price; due -= price) {
            if (at >= end && !move()) return;
            UNROLL for (int line = 0; line < LINES; line++) __builtin_prefetch(at + line * 64, 0, 2);
            at += LINES * 64;
        }
    }

    bool move() {
        if (run == tile->num_runs) return false;
        const typename Tile<T>::Run &now = tile->runs[run];
        const int64_t head_size = s.block_size * s.dim, num_heads = 2 * s.num_kv_heads;
        const bool all_of_it = now.num_tokens == s.block_size;
        at = (const char *)(now.keys + stretch * head_size);
        end = (const char *)(now.keys + (all_of_it ? num_heads * head_size : stretch * head_size + now.num_tokens * s.dim));
        if (all_of_it || ++stretch == num_heads) run++, stretch = 0;
        return true;
    }
};

}  // namespace
