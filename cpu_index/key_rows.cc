#include "cpu_index/key_rows.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <numeric>

#include "absl/strings/str_cat.h"
#include "cpu_index/simd.h"
#include "proto/check.h"
#include "proto/status_macros.h"

namespace quarry {
namespace {

constexpr uint32_t kMostBits = 8, kMostCoordinates = kMaxHeadDim;
// Uniform quantisers of a normal distribution with the least mean square error: their steps in
// standard deviations, and that error by the variance, for 0 to 8 bits.
constexpr float kStep[] = {0, 1.596f, 0.9957f, 0.586f, 0.3352f, 0.1881f, 0.1041f, 0.0569f, 0.0308f};
constexpr float kError[] = {1,        0.3634f,  0.1188f,  0.03744f,  0.01154f,
                            0.00349f, 0.00104f, 0.000304f, 0.0000877f};

// Bits for each group, as many as its coordinates' share of the error deserves: the next bit always
// goes where it takes most away.
std::vector<uint8_t> ShareBits(std::span<const float> variance, uint32_t bytes) {
  std::vector<uint8_t> width(variance.size());
  for (uint32_t spent = 0; spent < bytes; ++spent) {
    uint32_t best = 0;
    float most = -1;
    for (uint32_t g = 0; g < width.size(); ++g) {
      if (width[g] == kMostBits) continue;
      const float gain = variance[g] * (kError[width[g]] - kError[width[g] + 1]);
      if (gain > most) {
        most = gain;
        best = g;
      }
    }
    if (most <= 0) break;
    ++width[best];
  }
  return width;
}

float Levels(uint32_t bits) { return static_cast<float>(1u << bits); }

// The low `bits` of eight bytes, one behind another: fields are put together pair by pair.
uint64_t PackBytes(uint64_t x, uint32_t bits) {
  constexpr uint64_t kEvenBytes = 0x00ff00ff00ff00ff, kEvenPairs = 0x0000ffff0000ffff;
  const uint32_t apart = 8 - bits;
  x = (x & kEvenBytes) | (x & ~kEvenBytes) >> apart;
  x = (x & kEvenPairs) | (x & ~kEvenPairs) >> 2 * apart;
  return (x & 0xffffffffu) | (x >> 32) << 4 * bits;
}

}  // namespace

KeyRows::KeyRows(uint32_t rows, uint32_t coordinates)
    : coordinates_(coordinates),
      width_(coordinates / kGroup),
      step_(coordinates),
      inverse_step_(coordinates),
      half_(coordinates),
      rows_(rows, coordinates / 2) {
  QUARRY_CHECK(coordinates % kGroup == 0 && coordinates > 0 && coordinates <= kMostCoordinates);
}

KeyRows::KeyRows(uint32_t rows, std::span<const float> variance)
    : KeyRows(rows, static_cast<uint32_t>(variance.size())) {
  std::vector<float> of_group(width_.size());
  for (uint32_t c = 0; c < coordinates_; ++c) of_group[c / kGroup] += variance[c];
  width_ = ShareBits(of_group, coordinates_ / 2);
  for (uint32_t c = 0; c < coordinates_; ++c) {
    const uint32_t bits = width_[c / kGroup];
    SetStep(c, kStep[bits] * std::sqrt(variance[c]));
    error_variance_ += variance[c] * kError[bits];
  }
  LayOut();
}

void KeyRows::SetStep(uint32_t c, float step) {
  step_[c] = step;
  inverse_step_[c] = step > 0 ? 1 / step : 0;
}

void KeyRows::LayOut() {
  const uint32_t padded = (coordinates_ + 63) / 64 * 64;
  from_.resize(padded);
  shift_.resize(padded);
  mask_.resize(padded);
  uint16_t at = 0;  // the group's first byte
  for (uint32_t g = 0; g < width_.size(); ++g) {
    if (g % 8 == 0) part_.push_back(at);
    const uint32_t bits = width_[g];
    for (uint32_t i = 0; i < kGroup; ++i) {
      const uint32_t c = g * kGroup + i;
      half_[c] = Levels(bits) / 2;
      from_[c] = static_cast<uint8_t>(at - part_.back() + (bits > 0 ? std::min(i, bits - 1) : 0));
      shift_[c] = static_cast<uint8_t>(i * bits);
      mask_[c] = static_cast<uint8_t>((1u << bits) - 1);
    }
    at = static_cast<uint16_t>(at + bits);
  }
}

void KeyRows::Write(IndexWriter* out) const {
  out->Put(error_variance_);
  out->PutAll(std::span<const uint8_t>(width_));
  out->PutAll(std::span<const float>(step_));
  out->PutAll(rows_.all());
}

absl::StatusOr<KeyRows> KeyRows::Read(IndexReader* in, uint32_t rows, uint32_t coordinates) {
  if (coordinates % kGroup != 0 || coordinates == 0 || coordinates > kMostCoordinates) {
    return absl::DataLossError(absl::StrCat("rows of keys of ", coordinates, " coordinates"));
  }
  QUARRY_RETURN_IF_ERROR(in->Want<uint8_t>(uint64_t{rows} * (coordinates / 2)));
  KeyRows out(rows, coordinates);
  QUARRY_RETURN_IF_ERROR(in->GetNumber("error of rows of keys", 0, &out.error_variance_));
  QUARRY_RETURN_IF_ERROR(in->GetAll(std::span(out.width_)));
  const uint32_t bytes = std::accumulate(out.width_.begin(), out.width_.end(), 0u);
  const uint32_t widest = *std::max_element(out.width_.begin(), out.width_.end());
  if (widest > kMostBits || bytes > coordinates / 2) {
    return absl::DataLossError(absl::StrCat("rows of keys of ", bytes, " bytes for ", coordinates,
                                            " coordinates of at most ", widest, " bits"));
  }
  std::vector<float> step;
  QUARRY_RETURN_IF_ERROR(in->GetNumbers("step of rows of keys", coordinates, 0, &step));
  for (uint32_t c = 0; c < coordinates; ++c) out.SetStep(c, step[c]);
  out.LayOut();
  QUARRY_RETURN_IF_ERROR(in->GetAll(out.rows_.all()));
  return out;
}

void KeyRows::Store(uint32_t first, std::span<const float> rows) {
  const auto count = static_cast<uint32_t>(rows.size() / coordinates_);
  std::vector<uint8_t> levels(size_t{count} * coordinates_);
  Kernels().quantise({rows.data(), coordinates_, count, coordinates_, inverse_step_.data(),
                      half_.data(), nullptr, levels.data(), coordinates_});
  uint8_t row[kMostCoordinates / 2 + sizeof(uint64_t)] = {};
  for (uint32_t r = 0; r < count; ++r) {
    uint8_t* bytes = row;
    for (uint32_t g = 0; g < width_.size(); ++g) {
      uint64_t packed;
      std::memcpy(&packed, levels.data() + size_t{r} * coordinates_ + g * kGroup, sizeof(packed));
      packed = PackBytes(packed, width_[g]);
      std::memcpy(bytes, &packed, sizeof(packed));  // the next group goes over what is too much
      bytes += width_[g];
    }
    std::memcpy(rows_.Row(first + r), row, rows_.stride());
  }
}

void KeyRows::Decode(uint32_t row, std::span<float> coordinates) const {
  const uint8_t* bytes = rows_.Row(row);
  for (uint32_t g = 0; g < width_.size(); ++g) {
    const uint32_t bits = width_[g];
    uint64_t packed = 0;
    std::memcpy(&packed, bytes, bits);
    bytes += bits;
    for (uint32_t i = 0; i < kGroup; ++i) {
      const uint32_t c = g * kGroup + i;
      const auto level = static_cast<float>(packed >> shift_[c] & mask_[c]);
      coordinates[c] = bits == 0 ? 0 : (level + 0.5f - Levels(bits) / 2) * step_[c];
    }
  }
}

CodedQueries KeyRows::Prepare(std::span<const float> coordinates, uint32_t count) const {
  CodedQueries out;
  out.weight.resize(count * mask_.size());
  std::vector<float> weight(coordinates_);
  for (uint32_t i = 0; i < count; ++i) {
    float largest = 0;
    for (uint32_t c = 0; c < coordinates_; ++c) {
      weight[c] = coordinates[size_t{i} * coordinates_ + c] * step_[c];
      largest = std::max(largest, std::fabs(weight[c]));
    }
    const float scale = largest / 127, inverse = largest > 0 ? 127 / largest : 0;
    float offset = 0;
    for (uint32_t c = 0; c < coordinates_; ++c) {
      const auto w = static_cast<int8_t>(std::lround(weight[c] * inverse));
      out.weight[i * mask_.size() + c] = w;
      // A code stands for the middle of its interval.
      offset += scale * static_cast<float>(w) * (0.5f - Levels(width_[c / kGroup]) / 2);
    }
    out.scale.push_back(scale);
    out.offset.push_back(offset);
  }
  return out;
}

void KeyRows::Score(const CodedQueries& queries, std::span<const uint32_t> which,
                    std::span<const uint16_t> row_scale, float* out, size_t ld_out) const {
  if (which.empty()) return;
  kernels::KeyRowTile tile{};
  tile.rows = rows_.data();
  tile.stride = rows_.stride();
  tile.row_scale = row_scale.data();
  tile.which = which.data();
  tile.count = static_cast<uint32_t>(which.size());
  tile.parts = static_cast<uint32_t>(part_.size());
  tile.part = part_.data();
  tile.from = from_.data();
  tile.shift = shift_.data();
  tile.mask = mask_.data();
  tile.weights = queries.weight.data();
  tile.scale = queries.scale.data();
  tile.offset = queries.offset.data();
  tile.queries = static_cast<uint32_t>(queries.scale.size());
  tile.out = out;
  tile.ld_out = ld_out;
  Kernels().score_key_rows(tile);
}

}  // namespace quarry
