#include "cpu_index/value_rows.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "cpu_index/simd.h"
#include "proto/check.h"
#include "proto/half.h"
#include "proto/status_macros.h"

namespace quarry {
namespace {

// The step of the uniform quantiser of 16 levels with the least mean square error for a normal
// distribution, in standard deviations.
constexpr float kStep = 0.3352f;
constexpr uint32_t kGroup = kernels::kValueRowGroup;

constexpr uint32_t Padded(uint32_t head_dim) { return (head_dim + kGroup - 1) / kGroup * kGroup; }

}  // namespace

ValueRows::ValueRows(uint32_t rows, uint32_t head_dim)
    : head_dim_(head_dim), scale_(rows), rows_(rows, Padded(head_dim) / 2) {}

ValueRows::ValueRows(uint32_t rows, std::span<const float> deviation)
    : ValueRows(rows, static_cast<uint32_t>(deviation.size())) {
  for (float d : deviation) {
    step_.push_back(d * kStep);
    inverse_step_.push_back(d > 0 ? 1 / (d * kStep) : 0);
  }
}

void ValueRows::Write(IndexWriter* out) const {
  out->PutAll(std::span<const float>(step_));
  out->PutAll(std::span<const uint16_t>(scale_));
  out->PutAll(rows_.all());
}

absl::StatusOr<ValueRows> ValueRows::Read(IndexReader* in, uint32_t rows, uint32_t head_dim) {
  std::vector<float> step;
  QUARRY_RETURN_IF_ERROR(in->GetNumbers("step of rows of values", head_dim, 0, &step));
  QUARRY_RETURN_IF_ERROR(
      in->Want<uint8_t>(rows * (sizeof(uint16_t) + uint64_t{Padded(head_dim) / 2})));
  ValueRows out(rows, head_dim);
  for (float s : step) out.inverse_step_.push_back(s > 0 ? 1 / s : 0);
  out.step_ = std::move(step);
  QUARRY_RETURN_IF_ERROR(in->GetBf16("scale of rows of values", rows, 0, &out.scale_));
  QUARRY_RETURN_IF_ERROR(in->GetAll(out.rows_.all()));
  return out;
}

void ValueRows::Store(uint32_t first, std::span<const float> values) {
  const uint32_t padded = Padded(head_dim_);
  const auto count = static_cast<uint32_t>(values.size() / head_dim_);
  const std::vector<float> half(head_dim_, 8.0f);
  std::vector<float> squares(count), most(count);
  Kernels().measure_rows({values.data(), count, head_dim_, inverse_step_.data(), squares.data(),
                          most.data()});
  std::vector<float>& factor = squares;
  for (uint32_t r = 0; r < count; ++r) {
    scale_[first + r] = FloatToBf16(kStep * std::sqrt(squares[r] / static_cast<float>(head_dim_)));
    const float scale = Bf16ToFloat(scale_[first + r]);
    factor[r] = scale > 0 ? 1 / scale : 0;
  }
  std::vector<uint8_t> levels(size_t{count} * padded);
  Kernels().quantise({values.data(), head_dim_, count, head_dim_, inverse_step_.data(),
                      half.data(), factor.data(), levels.data(), padded});
  for (uint32_t r = 0; r < count; ++r) {
    const uint8_t* level = levels.data() + size_t{r} * padded;
    uint8_t* out = rows_.Row(first + r);
    for (uint32_t d = 0; d < padded; d += kGroup, level += kGroup, out += kGroup / 2) {
      for (uint32_t j = 0; j < kGroup / 2; ++j) {
        out[j] = static_cast<uint8_t>(level[j] | level[kGroup / 2 + j] << 4);
      }
    }
  }
}

void ValueRows::Decode(uint32_t row, std::span<float> value) const {
  constexpr float one = 1;
  std::fill(value.begin(), value.end(), 0.0f);
  AddWeighted({&row, 1}, &one, 1, 1, value);
}

void ValueRows::AddWeighted(std::span<const uint32_t> which, const float* weights,
                            size_t ld_weights, uint32_t queries, std::span<float> sums) const {
  QUARRY_CHECK(sums.size() == size_t{queries} * head_dim_);
  if (which.empty()) return;
  const uint32_t padded = Padded(head_dim_);
  std::vector<float> acc(size_t{queries} * padded);
  kernels::ValueRowTile tile{};
  tile.rows = rows_.data();
  tile.stride = rows_.stride();
  tile.which = which.data();
  tile.count = static_cast<uint32_t>(which.size());
  tile.dims = padded;
  tile.row_scale = scale_.data();
  tile.weights = weights;
  tile.ld_weights = ld_weights;
  tile.queries = queries;
  tile.acc = acc.data();
  Kernels().add_value_rows(tile);
  for (uint32_t i = 0; i < queries; ++i) {
    for (uint32_t d = 0; d < head_dim_; ++d) {
      sums[size_t{i} * head_dim_ + d] += step_[d] * acc[size_t{i} * padded + d];
    }
  }
}

}  // namespace quarry
