// A whole decoder layer of the commonest kind, for few tokens:
//
//   h = x + o(attend(rope(norm(q(n))), rope(norm(k(n))), v(n))),   n = norm(x)
//   y = h + down(act(gate(m)) * up(m)),                            m = norm(h)
//
// with RMS norms, rotary positions in halves, and norms of queries and keys where there are any. Between two steps
// everything is rounded to T where transformers' code rounds it, so that what comes out is the same up to the order of
// sums. Not responsible for whether a model's layer is of this kind: fusion.py looks, and compares.

#pragma once
#include "attention.h"
#include "multiply.h"

// Mirrored by kernels.py. Norms are of type T; those of queries and keys [dim] may be null.
struct Layer {
    Matrix query, key, value, out, gate, up, down;
    const void *norm_before, *norm_after, *norm_query, *norm_key;
    const float *sinks;
    int64_t layer, window, activation;  // activation: 0 is SiLU, 1 GELU by tanh
    float epsilon, scale, softcap;
};

struct Call {
    const void *x, *cosines, *sines;  // [tokens, hidden], [tokens, rotary] twice
    void *y;                          // [tokens, hidden]
    int64_t rotary;
};

namespace {

// Tokens first .. end of a step, shared out among threads where there are enough of them.
template <class Work> INLINE void shared_out(int64_t num, int64_t threads, Work work) {
    constexpr int64_t LEAST = 16;
    const int64_t useful = num / LEAST < threads ? num / LEAST : threads;
#pragma omp parallel for num_threads(useful) if (useful > 1) schedule(static, LEAST)
    for (int64_t i = 0; i < num; i++) work(i);
}

// As transformers' RMSNorm: in float, rounded, then times the weight.
template <class T> INLINE void norm(const T *x, const T *weight, T *y, int64_t size, float epsilon) {
    Floats squares{};
    int64_t i = 0;
    float rest = 0;
    for (; i + W <= size; i += W) squares += load(x + i) * load(x + i);
    for (; i < size; i++) rest += get(x + i) * get(x + i);
    const float factor = 1.0f / __builtin_sqrtf((sum_of(squares) + rest) / (float)size + epsilon);
    T rounded_once[W];
    for (i = 0; i + W <= size; i += W) {
        store(rounded_once, load(x + i) * factor);
        store(y + i, load(weight + i) * load(rounded_once));
    }
    for (; i < size; i++) {
        put(rounded_once, get(x + i) * factor);
        put(y + i, get(weight + i) * get(rounded_once));
    }
}

// Element i turns with element i + half.
template <class T> INLINE void rotate(T *x, const T *cosines, const T *sines, int64_t rotary) {
    const int64_t half = rotary / 2;
    int64_t i = 0;
    for (; i + W <= half; i += W) {
        const Floats a = load(x + i), b = load(x + half + i);
        store(x + i, a * load(cosines + i) - b * load(sines + i));
        store(x + half + i, b * load(cosines + half + i) + a * load(sines + half + i));
    }
    for (; i < half; i++) {
        const float a = get(x + i), b = get(x + half + i);
        put(x + i, a * get(cosines + i) - b * get(sines + i));
        put(x + half + i, b * get(cosines + half + i) + a * get(sines + half + i));
    }
}

// Heads of one token [heads, dim]: normed, where there is a weight, then turned.
template <class T>
INLINE void position(T *x, int64_t token, int64_t heads, int64_t dim, const void *weight, float epsilon, const Call &call) {
    const T *cosines = (const T *)call.cosines + token * call.rotary, *sines = (const T *)call.sines + token * call.rotary;
    x += token * heads * dim;
    for (int64_t head = 0; head < heads; head++, x += dim) {
        if (weight) norm(x, (const T *)weight, x, dim, epsilon);
        rotate(x, cosines, sines, call.rotary);
    }
}

INLINE Floats silu(Floats x) { return x / (1.0f + exponential(-x)); }
INLINE Floats gelu(Floats x) { return 0.5f * x * (1.0f + tanh_of(0.7978845608028654f * (x + 0.044715f * x * x * x))); }

// gate = act(gate) * up
template <class T> INLINE void gated(T *gate, const T *up, int64_t num, int64_t activation) {
    T once[W];
    for (int64_t i = 0; i < num; i += W) {
        const Floats g = load(gate + i);
        store(once, activation ? gelu(g) : silu(g));
        store(gate + i, load(once) * load(up + i));
    }
}

template <class T> INLINE void add(const T *a, const T *b, T *to, int64_t num) {
    for (int64_t i = 0; i < num; i += W) store(to + i, load(a + i) + load(b + i));
}

// Every buffer of a layer's way, in one piece of memory.
template <class T> struct Buffers {
    T *normed, *query, *key, *value, *attended, *middle, *gate, *up;
    float *inputs;

    // null where memory is lacking
    static Buffers in(Scratch &memory, const Layer &l, int64_t num) {
        const int64_t hidden = l.down.rows, inner = l.gate.rows, widest = hidden > inner ? hidden : inner;
        const int64_t sizes[] = {hidden, l.query.rows, l.key.rows, l.value.rows, l.query.rows, hidden, inner, inner};
        int64_t total = 0;
        for (int64_t size : sizes) total += aligned(size * num * (int64_t)sizeof(T));
        const int64_t floats = (widest > l.query.rows ? widest : l.query.rows) * num * (int64_t)sizeof(float);
        if (!memory.grow(total + floats)) return {};
        char *at = memory.data;
        auto next = [&](int64_t size) { char *now = at; at += aligned(size * num * (int64_t)sizeof(T)); return (T *)now; };
        return {next(sizes[0]), next(sizes[1]), next(sizes[2]), next(sizes[3]), next(sizes[4]),
                next(sizes[5]), next(sizes[6]), next(sizes[7]), (float *)at};
    }
    static int64_t aligned(int64_t size) { return (size + 63) / 64 * 64; }
};

thread_local Scratch layer_buffers;

template <class T> int64_t attended(const Layer &l, Step &s, const Call &call, Buffers<T> &b) {
    const int64_t num = s.num_tokens, hidden = l.down.rows, dim = s.dim, heads = l.query.rows / dim;
    shared_out(num, s.num_threads, [&](int64_t i) {
        norm((const T *)call.x + i * hidden, (const T *)l.norm_before, b.normed + i * hidden, hidden, l.epsilon);
    });
    const Matrix three[] = {l.query, l.key, l.value};
    T *const outs[] = {b.query, b.key, b.value};
    if (!linears<T>(three, outs, 3, prepared(b.normed, num, hidden, b.inputs), num, s.num_threads)) return -1;
    shared_out(num, s.num_threads, [&](int64_t i) {
        position(b.query, i, heads, dim, l.norm_query, l.epsilon, call);
        position(b.key, i, s.num_kv_heads, dim, l.norm_key, l.epsilon, call);
    });
    s.key = b.key, s.value = b.value, s.query = b.query, s.out = b.attended;
    s.key_head = s.value_head = s.query_head = dim;
    s.key_token = s.value_token = l.key.rows;
    s.query_token = l.query.rows;
    s.num_heads = heads;
    s.layer = l.layer, s.window = l.window, s.scale = l.scale, s.softcap = l.softcap, s.sinks = l.sinks;
    return keep_and_attend<T>(s);
}

template <class T> int64_t run_layer(const Layer &l, Step &s, const Call &call) {
    const int64_t num = s.num_tokens, hidden = l.down.rows, inner = l.gate.rows;
    Buffers<T> b = Buffers<T>::in(layer_buffers, l, num);
    if (!b.normed || attended(l, s, call, b)) return -1;
    if (!linears<T>(&l.out, &b.middle, 1, prepared(b.attended, num, l.out.columns, b.inputs), num, s.num_threads)) return -1;
    shared_out(num, s.num_threads, [&](int64_t i) {
        T *middle = b.middle + i * hidden;
        add((const T *)call.x + i * hidden, middle, middle, hidden);
        norm(middle, (const T *)l.norm_after, b.normed + i * hidden, hidden, l.epsilon);
    });
    const Matrix both[] = {l.gate, l.up};
    T *const outs[] = {b.gate, b.up};
    if (!linears<T>(both, outs, 2, prepared(b.normed, num, hidden, b.inputs), num, s.num_threads)) return -1;
    shared_out(num, s.num_threads, [&](int64_t i) { gated(b.gate + i * inner, b.up + i * inner, inner, l.activation); });
    T *y = (T *)call.y;
    if (!linears<T>(&l.down, &y, 1, prepared(b.gate, num, inner, b.inputs), num, s.num_threads)) return -1;
    shared_out(num, s.num_threads, [&](int64_t i) { add(b.middle + i * hidden, y + i * hidden, y + i * hidden, hidden); });
    return 0;
}

}  // namespace
