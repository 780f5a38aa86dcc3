// Checks and exact widening of what clients send.
#pragma once

#include <cstddef>
#include <cstdint>

#include "proto/types.h"

namespace quarry {

// True if none of `count` elements is NaN or infinite. `count` is a multiple of 16.
bool AllFinite(DType dtype, const void* data, size_t count);

// Widens `count` elements (a multiple of 16) to fp32 without rounding and returns true if all are
// finite. `data` is read once (it may lie in memory that a client can write) and may be unaligned.
bool WidenFinite(DType dtype, const void* data, size_t count, float* out);

}  // namespace quarry
