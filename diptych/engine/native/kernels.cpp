// What the engine computes natively, behind plain C functions: attention, linear layers, whole decoder layers.
//
// This file is compiled once for each instruction set (kernels.py), each into a library of its own: code of a wide one
// cannot leak into a narrow one. Calls run with the GIL released. Not responsible for checking anything.

#include "layer.h"

extern "C" {

// Stores the step's keys and values of one layer, then answers the queries. 0, or -1 where memory is lacking.
int64_t diptych_attend(const Step *s) { return s->is_bf16 ? keep_and_attend<bf16>(*s) : keep_and_attend<float>(*s); }

// x [num, columns] -> out [num, rows].
int64_t diptych_linear(const Matrix *a, int64_t is_bf16, const void *x, int64_t num, void *out, int64_t threads) {
    if (is_bf16) return linear<bf16>(*a, (const bf16 *)x, num, (bf16 *)out, threads);
    return linear<float>(*a, (const float *)x, num, (float *)out, threads);
}

// A decoder layer over all tokens of a step, every one of which belongs to a sequence that attention answers.
int64_t diptych_layer(const Layer *layer, Step *step, const Call *call) {
    return step->is_bf16 ? run_layer<bf16>(*layer, *step, *call) : run_layer<float>(*layer, *step, *call);
}

int64_t diptych_step_size() { return sizeof(Step); }

int64_t diptych_layer_size() { return sizeof(Layer); }

}  // extern "C"
