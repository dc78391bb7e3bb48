// Memory that is kept from call to call by the thread that calls: a step allocates nothing.

#pragma once
#include <stdint.h>
#include <stdlib.h>

struct Scratch {
    char *data = nullptr;
    int64_t size = 0;
    ~Scratch() { free(data); }
    bool grow(int64_t need) {
        if (need <= size) return true;
        free(data);
        data = (char *)aligned_alloc(64, (need + 4095) / 4096 * 4096);
        size = data ? (need + 4095) / 4096 * 4096 : 0;
        return data;
    }
};
