#include "gpu/weights/codes.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>

#include "gpu/weights/matrix_layout.h"
#include "proto/check.h"
#include "proto/half.h"

namespace quarry {
namespace {

// What the largest weight of an int4 group is divided by, of -8: a few large weights are better cut
// off than all others coarse. Finer steps do not make errors smaller by 1%.
constexpr float kInt4Shrinks[] = {1.0f, 0.96f, 0.92f, 0.88f, 0.84f, 0.8f, 0.76f, 0.72f};

// x rounded to nearest, ties to even, for |x| < 2^22: faster than what the baseline instruction set
// has for it.
float Nearest(float x) { return (x + 0x1.8p23f) - 0x1.8p23f; }

// The smallest bf16 that is no less than x > 0: with it no weight of a row lies beyond its codes.
uint16_t Bf16NoLess(float x) {
  const uint16_t nearest = FloatToBf16(x);
  return Bf16ToFloat(nearest) < x ? static_cast<uint16_t>(nearest + 1) : nearest;
}

void EncodeInt8(std::span<const float> row, float largest, std::byte* codes, uint16_t* scale) {
  *scale = Bf16NoLess(largest / 127.0f);
  const float size = Bf16ToFloat(*scale);
  for (size_t i = 0; i < row.size(); ++i) {
    const float code = size > 0 ? Nearest(row[i] / size) : 0.0f;
    codes[i] = static_cast<std::byte>(static_cast<int>(std::clamp(code, -127.0f, 127.0f)) + 128);
  }
  const size_t stride = (row.size() + kCodeGroup - 1) / kCodeGroup * kCodeGroup;
  std::memset(codes + row.size(), 128, stride - row.size());
}

// Where weight i's code lies in the word of its eight.
size_t Int4Shift(size_t i) { return 4 * (i % 8 / 2 + i % 2 * 4); }

using Group = std::array<float, kCodeGroup>;

// In lanes that the compiler can turn into vectors.
float ErrorOf(const Group& group, float scale) {
  constexpr size_t kLanes = 8;
  const float inverse = 1.0f / scale;
  float errors[kLanes] = {};
  for (size_t i = 0; i < kCodeGroup; i += kLanes) {
    for (size_t lane = 0; lane < kLanes; ++lane) {
      const float x = group[i + lane];
      const float off = std::clamp(Nearest(x * inverse), -8.0f, 7.0f) * scale - x;
      errors[lane] += off * off;
    }
  }
  float sum = 0;
  for (const float error : errors) sum += error;
  return sum;
}

// The scale, of those that are tried, by which codes miss the group least.
uint16_t Int4Scale(const Group& group) {
  const float* const largest =
      std::max_element(group.data(), group.data() + kCodeGroup,
                       [](float a, float b) { return std::abs(a) < std::abs(b); });
  uint16_t best = 0;
  float best_error = INFINITY;
  for (const float shrink : kInt4Shrinks) {
    const uint16_t scale = FloatToBf16(*largest / -8.0f * shrink);
    if (Bf16ToFloat(scale) == 0.0f || !std::isfinite(1.0f / Bf16ToFloat(scale))) continue;
    const float error = ErrorOf(group, Bf16ToFloat(scale));
    if (best == 0 || error < best_error) {  // squares of huge weights are infinite
      best = scale;
      best_error = error;
    }
  }
  return best;
}

void EncodeInt4(std::span<const float> row, std::byte* codes, uint16_t* scales) {
  for (size_t lo = 0; lo < row.size(); lo += kCodeGroup, ++scales, codes += kCodeGroup / 2) {
    Group group = {};
    std::copy_n(row.begin() + static_cast<ptrdiff_t>(lo), std::min(kCodeGroup, row.size() - lo),
                group.begin());
    *scales = Int4Scale(group);
    const float scale = Bf16ToFloat(*scales);
    uint32_t words[kCodeGroup / 8] = {};
    for (size_t i = 0; i < kCodeGroup; ++i) {
      const float code = scale != 0 ? std::clamp(Nearest(group[i] / scale), -8.0f, 7.0f) : 0;
      words[i / 8] |= static_cast<uint32_t>(static_cast<int>(code) + 8) << Int4Shift(i);
    }
    std::memcpy(codes, words, sizeof(words));
  }
}

}  // namespace

bool EncodeRow(WeightForm form, std::span<const float> row, std::byte* codes, uint16_t* scales) {
  float largest = 0;
  bool finite = true;
  for (const float x : row) {
    finite &= std::isfinite(x);
    largest = std::max(largest, std::abs(x));
  }
  if (!finite) return false;
  QUARRY_CHECK(form != WeightForm::kPlain);
  if (form == WeightForm::kInt8) {
    EncodeInt8(row, largest, codes, scales);
  } else {
    EncodeInt4(row, codes, scales);
  }
  return true;
}

void DecodeRow(WeightForm form, const std::byte* codes, const uint16_t* scales,
               std::span<float> row) {
  QUARRY_CHECK(form != WeightForm::kPlain);
  if (form == WeightForm::kInt8) {
    const float scale = Bf16ToFloat(*scales);
    for (size_t i = 0; i < row.size(); ++i) {
      row[i] = scale * static_cast<float>(static_cast<int>(codes[i]) - 128);
    }
    return;
  }
  for (size_t i = 0; i < row.size(); ++i) {
    uint32_t word;
    std::memcpy(&word, codes + i / 8 * 4, sizeof(word));
    const int code = static_cast<int>(word >> Int4Shift(i) & 15) - 8;
    row[i] = Bf16ToFloat(scales[i / kCodeGroup]) * static_cast<float>(code);
  }
}

}  // namespace quarry
