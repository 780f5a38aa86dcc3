#include "cpu_index/key_codes.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "absl/strings/str_cat.h"
#include "cpu_index/simd.h"
#include "proto/check.h"
#include "proto/half.h"

namespace quarry {
namespace {

static_assert(KeyCodes::kCoordinates == kernels::kCodeCoordinates &&
              KeyCodes::kBlockKeys == kernels::kCodeBlockKeys);

// Steps of the uniform quantisers with the least mean square error for a normal distribution, in
// standard deviations.
constexpr float kFineStep = 0.3352f, kCoarseStep = 0.9957f;

constexpr bool IsFine(uint32_t c) { return c < KeyCodes::kFineCoordinates; }
constexpr int Levels(uint32_t c) { return IsFine(c) ? 16 : 4; }

// Where a coordinate lies in a block: its byte (of lane 0) and its shift.
struct Place {
  uint32_t byte, shift;
};
constexpr Place PlaceOf(uint32_t c) {
  if (IsFine(c)) return {c / 8 * 64 + c % 4, c % 8 / 4 * 4};
  const uint32_t d = c - KeyCodes::kFineCoordinates;
  return {128 + d / 16 * 64 + d % 4, d % 16 / 4 * 2};
}

}  // namespace

KeyCodes::KeyCodes(QueryBasis basis, uint32_t keys)
    : basis_(std::move(basis)), keys_(keys), codes_(size_t{keys_padded()} * kBytes) {
  for (uint32_t c = 0; c < basis_.rank; ++c) {
    step_.push_back(std::sqrt(basis_.variance[c]) * (IsFine(c) ? kFineStep : kCoarseStep));
  }
}

absl::StatusOr<KeyCodes> KeyCodes::Encode(const KvView& run, QueryBasis basis) {
  if (basis.rank > kCoordinates || basis.head_dim != run.head_dim) {
    return absl::InvalidArgumentError(
        absl::StrCat("a basis of ", basis.rank, " coordinates for head_dim ", basis.head_dim,
                     "; codes hold ", kCoordinates, ", the run has head_dim ", run.head_dim));
  }
  KeyCodes codes(std::move(basis), run.tokens().size());
  std::vector<float> key(run.head_dim), coordinates(codes.basis_.rank);
  for (const KvSegment& segment : run.segments) {
    for (uint32_t t = segment.tokens.lo; t < segment.tokens.hi; ++t) {
      const size_t at = size_t{t - segment.tokens.lo} * run.head_dim;
      for (uint32_t d = 0; d < run.head_dim; ++d) key[d] = LoadAsFloat(segment.k, at + d, run.dtype);
      codes.basis_.EncodeKey(key, coordinates);
      codes.Store(t - run.tokens().lo, coordinates);
    }
  }
  return codes;
}

void KeyCodes::Store(uint32_t key, std::span<const float> coordinates) {
  uint8_t* const block = codes_.data() + size_t{key / kBlockKeys} * kBlockKeys * kBytes;
  const uint32_t lane = key % kBlockKeys * 4;
  for (uint32_t c = 0; c < coordinates.size(); ++c) {
    const float level = step_[c] > 0 ? std::floor(coordinates[c] / step_[c]) : 0;
    const int half = Levels(c) / 2;
    const int code = static_cast<int>(
        std::clamp(level, static_cast<float>(-half), static_cast<float>(half - 1)));
    const Place place = PlaceOf(c);
    block[place.byte + lane] |= static_cast<uint8_t>((code + half) << place.shift);
  }
}

KeyCodes::Query KeyCodes::Prepare(std::span<const float> query) const {
  std::vector<float> weight(basis_.rank);
  basis_.EncodeQuery(query, weight);
  Query out{};
  float largest = 0;
  for (uint32_t c = 0; c < basis_.rank; ++c) {
    weight[c] *= step_[c];
    largest = std::max(largest, std::fabs(weight[c]));
  }
  out.scale = largest / 127;
  for (uint32_t d = 0; d < basis_.head_dim; ++d) out.offset += query[d] * basis_.mean[d];
  if (largest == 0) return out;
  for (uint32_t c = 0; c < basis_.rank; ++c) {
    out.weight[c] = static_cast<int8_t>(std::lround(weight[c] / out.scale));
    // A code stands for the middle of its interval.
    out.offset += out.scale * static_cast<float>(out.weight[c]) *
                  (0.5f - static_cast<float>(Levels(c)) / 2);
  }
  return out;
}

void KeyCodes::Sum(std::span<const Query> queries, std::span<int32_t> sums) const {
  QUARRY_CHECK(sums.size() == queries.size() * keys_padded());
  std::vector<int8_t> weights;
  for (const Query& query : queries) {
    weights.insert(weights.end(), query.weight, query.weight + kCoordinates);
  }
  kernels::CodeTile tile{};
  tile.codes = codes_.data();
  tile.blocks = keys_padded() / kBlockKeys;
  tile.weights = weights.data();
  tile.queries = static_cast<uint32_t>(queries.size());
  tile.out = sums.data();
  tile.ld_out = keys_padded();
  Kernels().sum_codes(tile);
}

uint64_t KeyCodes::memory_bytes() const {
  return code_bytes() + 4 * (basis_.key_map.size() + basis_.query_map.size() +
                             basis_.mean.size() + basis_.variance.size() + step_.size());
}

}  // namespace quarry
