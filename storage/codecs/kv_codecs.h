// Coding and decoding of strips of K and V (storage/CODECS.md).
#pragma once

#include <cstddef>
#include <span>

#include "absl/status/status.h"
#include "proto/kv_codec.h"
#include "proto/simd_level.h"
#include "proto/types.h"
#include "storage/codecs/tile_kernels.h"

namespace quarry {

// Codes rows [strip.tokens][strip.head_dim] of dtype, finite numbers, into `out`, strip.bytes() of
// any alignment, which must not overlap. One pass over the rows and one more over what the first
// cache holds; the same bytes on every machine. Any thread.
void EncodeStrip(const CodedStrip& strip, DType dtype, const void* rows, std::span<std::byte> out);

// The rows of a coded strip, within a code's step of what was coded, and finite whatever the bytes
// are. The errors of CheckCodedStrip, with rows untouched. Any thread.
absl::Status DecodeStrip(const CodedStrip& strip, std::span<const std::byte> coded, DType dtype,
                         void* rows);

namespace codecs {

// The coders of a level, AMX having those of AVX-512.
const Table& TableOf(SimdLevel level);

}  // namespace codecs

}  // namespace quarry
