// Where a matrix of weights has its elements, or its codes and scales, in memory: the same on the
// host and on every device.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string_view>

#include "gpu/device.h"
#include "proto/types.h"

namespace quarry {

// Elements of one scale of int4 weights; rows of codes are filled up to multiples of it.
inline constexpr size_t kCodeGroup = 128;

// Plain: elements of `dtype`, [rows][width]. Codes: [rows][stride()] of one or half a byte (see
// gpu/weights/codes.h), then scales in bf16, [rows][scales_per_row()].
struct MatrixLayout {
  DType dtype = DType::kFp32;
  size_t rows = 0, width = 0;
  WeightForm form = WeightForm::kPlain;

  size_t groups() const { return (width + kCodeGroup - 1) / kCodeGroup; }
  size_t stride() const { return groups() * kCodeGroup; }  // codes
  size_t row_bytes() const {                               // without scales
    switch (form) {
      case WeightForm::kInt8:
        return stride();
      case WeightForm::kInt4:
        return stride() / 2;
      default:
        return width * DTypeBytes(dtype);
    }
  }
  size_t scales_per_row() const {
    return form == WeightForm::kPlain ? 0 : form == WeightForm::kInt8 ? 1 : groups();
  }
  size_t scales_at() const { return rows * row_bytes(); }  // bytes
  size_t bytes() const { return scales_at() + rows * scales_per_row() * sizeof(uint16_t); }
};

inline MatrixLayout LayoutOf(const DeviceMatrix& m) { return {m.dtype, m.rows, m.width, m.form}; }

constexpr std::string_view WeightFormName(WeightForm form) {
  return form == WeightForm::kInt8 ? "int8" : form == WeightForm::kInt4 ? "int4" : "plain";
}

}  // namespace quarry
