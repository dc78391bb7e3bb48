// Linear layers of one input, shared out among threads: by vectors (linear.h), or by tiles (tiled.h) where the library
// is built for them, the layers are of bfloat16 and there are more than a few rows of input.
//
// Neither threads nor other rows change a bit of what comes out, as long as these are few or more than a few: vectors
// and tiles take their sums in different orders.

#pragma once
#include "linear.h"
#include "tiled.h"

namespace {

// The input as the products want it; converted, where they do, into `room` [num, columns].
template <class T> const typename Dot<T>::Input *prepared(const T *x, int64_t num, int64_t columns, float *room) {
    if constexpr (sizeof(typename Dot<T>::Input) == sizeof(T)) return (const typename Dot<T>::Input *)x;
    else {
        for (int64_t i = 0; i < num * columns; i += W) store(room + i, load(x + i));
        return (const typename Dot<T>::Input *)room;
    }
}

INLINE int threads_for(int64_t bytes, int64_t allowed) {
    const int64_t useful = bytes / MATRIX_THREAD_BYTES;
    return (int)(useful < 1 ? 1 : useful < allowed ? useful : allowed);
}

// Several layers of one input: outs[i] is [num, rows of layer i].
template <class T>
bool linears(const Matrix *layers, T *const *outs, int count, const typename Dot<T>::Input *x, int64_t num, int64_t allowed) {
    int64_t bytes = 0;
    for (int i = 0; i < count; i++) bytes += layers[i].rows * layers[i].columns * (int64_t)sizeof(T);
    const int threads = threads_for(bytes * (num + 7) / 8, allowed);
#if defined(DIPTYCH_TILES)
    if constexpr (sizeof(T) == sizeof(bf16))
        if (num > STREAMED) return tiled(layers, outs, count, x, num, threads);
#endif
    int64_t next = 0, lacking = 0;
#pragma omp parallel num_threads(threads) if (threads > 1)
    if (!in_pieces(layers, count, ROWS, threads, next, [&](int i, int64_t first, int64_t end) {
            return some_rows<T>(layers[i], first, end, x, num, outs[i], layers[i].rows);
        }))
        __atomic_store_n(&lacking, 1, __ATOMIC_RELAXED);
    return !lacking;
}

thread_local Scratch converted;

template <class T> int64_t linear(const Matrix &a, const T *x, int64_t num, T *out, int64_t allowed) {
    if (sizeof(typename Dot<T>::Input) != sizeof(T) && !converted.grow(num * a.columns * (int64_t)sizeof(float))) return -1;
    return linears<T>(&a, &out, 1, prepared(x, num, a.columns, (float *)converted.data), num, allowed) ? 0 : -1;
}

}  // namespace
