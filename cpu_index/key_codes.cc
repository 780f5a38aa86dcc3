#include "cpu_index/key_codes.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <utility>

#include "absl/strings/str_cat.h"
#include "cpu_index/byte_weights.h"
#include "cpu_index/simd.h"
#include "proto/check.h"
#include "proto/status_macros.h"

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
    : basis_(std::move(basis)),
      keys_(keys),
      step_(basis_.rank),
      inverse_step_(kCoordinates),
      half_(kCoordinates, 0.5f),
      codes_(size_t{keys_padded()} * kBytes) {
  for (uint32_t c = 0; c < basis_.rank; ++c) {
    SetStep(c, std::sqrt(basis_.variance[c]) * (IsFine(c) ? kFineStep : kCoarseStep));
  }
}

void KeyCodes::Write(IndexWriter* out) const {
  basis_.Write(out);
  out->Put(keys_);
  out->PutAll(std::span<const float>(step_));
  out->PutAll(std::span<const uint8_t>(codes_));
}

absl::StatusOr<KeyCodes> KeyCodes::Read(IndexReader* in) {
  constexpr uint32_t kMostKeys = 1u << 31;
  QUARRY_ASSIGN_OR_RETURN(QueryBasis basis, QueryBasis::Read(in));
  uint32_t keys = 0;
  QUARRY_RETURN_IF_ERROR(in->Get(&keys));
  if (basis.rank > kCoordinates || keys == 0 || keys > kMostKeys) {
    return absl::DataLossError(
        absl::StrCat("codes of ", keys, " keys in ", basis.rank, " coordinates"));
  }
  std::vector<float> step;
  QUARRY_RETURN_IF_ERROR(in->GetNumbers("step of codes", basis.rank, 0, &step));
  QUARRY_RETURN_IF_ERROR(in->Want<uint8_t>((uint64_t{keys} + kBlockKeys - 1) / kBlockKeys *
                                           kBlockKeys * kBytes));
  KeyCodes codes(std::move(basis), keys);
  for (uint32_t c = 0; c < step.size(); ++c) codes.SetStep(c, step[c]);
  QUARRY_RETURN_IF_ERROR(in->GetAll(std::span(codes.codes_)));
  return codes;
}

void KeyCodes::SetStep(uint32_t c, float step) {
  step_[c] = step;
  inverse_step_[c] = step > 0 ? 1 / step : 0;
  half_[c] = static_cast<float>(Levels(c)) / 2;
}

absl::StatusOr<KeyCodes> KeyCodes::Encode(const KvView& run, QueryBasis basis) {
  if (basis.rank > kCoordinates || basis.head_dim != run.head_dim) {
    return absl::InvalidArgumentError(
        absl::StrCat("a basis of ", basis.rank, " coordinates for head_dim ", basis.head_dim,
                     "; codes hold ", kCoordinates, ", the run has head_dim ", run.head_dim));
  }
  const std::vector<float> coordinates = ProjectKeys(run, basis, kCoordinates);
  return Encode(coordinates, std::move(basis));
}

KeyCodes KeyCodes::Encode(std::span<const float> coordinates, QueryBasis basis) {
  KeyCodes codes(std::move(basis), static_cast<uint32_t>(coordinates.size() / kCoordinates));
  codes.Store(0, coordinates, kCoordinates);
  return codes;
}

void KeyCodes::Store(uint32_t first, std::span<const float> rows, size_t stride) {
  for (size_t lo = 0; lo * stride < rows.size(); lo += kBlockKeys) {
    const size_t count = std::min<size_t>(kBlockKeys, rows.size() / stride - lo);
    uint8_t levels[kBlockKeys * kCoordinates] = {};
    Kernels().quantise({rows.data() + lo * stride, stride, static_cast<uint32_t>(count),
                        static_cast<uint32_t>(std::min<size_t>(stride, kCoordinates)),
                        inverse_step_.data(), half_.data(), nullptr, levels, kCoordinates});
    for (size_t i = 0; i < count; ++i) {
      StoreLevels(static_cast<uint32_t>(first + lo + i), levels + i * kCoordinates);
    }
  }
}

void KeyCodes::StoreLevels(uint32_t key, const uint8_t* levels) {
  uint8_t* const lane =
      codes_.data() + size_t{key / kBlockKeys} * kBlockKeys * kBytes + key % kBlockKeys * 4;
  // Four coordinates are a word; words whose bytes are the same ones are put into one.
  const auto put = [&](uint32_t first, uint32_t words, uint32_t bits) {
    uint32_t together = 0;
    for (uint32_t i = 0; i < words; ++i) {
      uint32_t word;
      std::memcpy(&word, levels + first + 4 * i, sizeof(word));
      together |= word << bits * i;
    }
    std::memcpy(lane + PlaceOf(first).byte, &together, sizeof(together));
  };
  for (uint32_t c = 0; c < kFineCoordinates; c += 8) put(c, 2, 4);
  for (uint32_t c = kFineCoordinates; c < kCoordinates; c += 16) put(c, 4, 2);
}

void KeyCodes::Decode(uint32_t key, std::span<float> coordinates) const {
  const uint8_t* const block = codes_.data() + size_t{key / kBlockKeys} * kBlockKeys * kBytes;
  for (uint32_t c = 0; c < basis_.rank; ++c) {
    const Place place = PlaceOf(c);
    const int level = block[place.byte + key % kBlockKeys * 4] >> place.shift & (Levels(c) - 1);
    coordinates[c] =
        (static_cast<float>(level) + 0.5f - static_cast<float>(Levels(c)) / 2) * step_[c];
  }
}

std::vector<float> KeyCodes::ErrorVariance(std::span<const float> rows, size_t stride) const {
  constexpr uint32_t kKeys = 4096;
  const uint32_t step = keys_ / kKeys + 1;
  std::vector<float> squares(basis_.rank), coded(basis_.rank);
  uint32_t taken = 0;
  for (uint32_t t = 0; t < keys_; t += step, ++taken) {
    Decode(t, coded);
    for (uint32_t c = 0; c < basis_.rank; ++c) {
      const float missed = rows[size_t{t} * stride + c] - coded[c];
      squares[c] += missed * missed;
    }
  }
  for (float& s : squares) s /= static_cast<float>(std::max(1u, taken));
  return squares;
}

KeyCodes::Query KeyCodes::Prepare(std::span<const float> coordinates, float mean_score) const {
  // A code stands for the middle of its interval.
  const auto middle = [](size_t c) {
    return 0.5f - static_cast<float>(Levels(static_cast<uint32_t>(c))) / 2;
  };
  Query out{};
  const CodedScore score =
      ToByteWeights(coordinates.first(basis_.rank), step_, middle, mean_score, out.weight);
  out.scale = score.scale;
  out.offset = score.offset;
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
