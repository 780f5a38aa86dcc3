// Weights as codes of few bits, symmetric about zero: weight = scale * code, without zero points.
//   int8: one scale for a row, codes -127 to 127. A byte is code + 128.
//   int4: one scale for kCodeGroup elements of a row, codes -8 to 7, the scale signed, so that the
//         largest weight may lie on either side of them. Eight codes are a word of 32 bits:
//         elements 2 i and 2 i + 1 are nibbles i and i + 4, code + 8, so that a mask and a shift
//         give the halves of two elements.
// Scales are bf16, and codes are chosen for the scale as it is rounded. Rows are filled up to
// multiples of kCodeGroup with codes of zero. Zero points would make the error of int4 2% smaller
// (0.097 against 0.099 of the weights' size, on the reference models and on normal ones) for 3%
// more bytes and an addition in every product.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "gpu/device.h"

namespace quarry {

// Codes of one row: `codes` has MatrixLayout::row_bytes() bytes, `scales` scales_per_row()
// elements. False, with nothing of meaning written, if a weight is not finite.
bool EncodeRow(WeightForm form, std::span<const float> row, std::byte* codes, uint16_t* scales);

// The first row.size() weights of a row's codes, exactly: a scale and a code make no more than 16
// bits.
void DecodeRow(WeightForm form, const std::byte* codes, const uint16_t* scales,
               std::span<float> row);

}  // namespace quarry
