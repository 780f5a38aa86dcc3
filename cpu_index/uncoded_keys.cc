#include "cpu_index/uncoded_keys.h"

#include <algorithm>
#include <numeric>

#include "absl/strings/str_cat.h"
#include "cpu_index/run_rows.h"
#include "cpu_index/simd.h"
#include "proto/half.h"
#include "proto/status_macros.h"

namespace quarry {

UncodedKeys::UncodedKeys(const KvView& run, std::span<const uint32_t> order,
                         std::span<const float> lost)
    : head_dim_(run.head_dim) {
  std::vector<uint32_t> places(lost.size());
  std::iota(places.begin(), places.end(), 0u);
  const auto kept = static_cast<ptrdiff_t>(lost.size() / kTokensForOne);
  std::nth_element(places.begin(), places.begin() + kept, places.end(),
                   [&](uint32_t a, uint32_t b) {
                     return lost[a] != lost[b] ? lost[a] > lost[b] : a < b;
                   });
  places_.assign(places.begin(), places.begin() + kept);
  std::sort(places_.begin(), places_.end());
  const RunRows keys(run, KvPart::kKey);
  for (const uint32_t place : places_) {
    const std::byte* const key = keys.At(order[place]);
    for (uint32_t d = 0; d < head_dim_; ++d) {
      keys_.push_back(FloatToBf16(LoadAsFloat(key, d, run.dtype)));
    }
  }
}

void UncodedKeys::Write(IndexWriter* out) const {
  out->Put(static_cast<uint32_t>(places_.size()));
  out->PutAll(std::span<const uint32_t>(places_));
  out->PutAll(std::span<const uint16_t>(keys_));
}

absl::StatusOr<UncodedKeys> UncodedKeys::Read(IndexReader* in, uint32_t tokens,
                                              uint32_t head_dim) {
  UncodedKeys out(head_dim);
  uint32_t count = 0;
  QUARRY_RETURN_IF_ERROR(in->Get(&count));
  if (count > tokens) {
    return absl::DataLossError(absl::StrCat("clusters: ", count, " uncoded keys of ", tokens));
  }
  QUARRY_RETURN_IF_ERROR(in->GetVector(count, &out.places_));
  for (uint32_t i = 0; i < count; ++i) {
    if (out.places_[i] >= tokens || (i > 0 && out.places_[i] <= out.places_[i - 1])) {
      return absl::DataLossError(absl::StrCat("clusters: the ", i, "th uncoded key is at place ",
                                              out.places_[i], " of ", tokens));
    }
  }
  QUARRY_RETURN_IF_ERROR(
      in->GetBf16("uncoded key", uint64_t{count} * head_dim, kAnyNumber, &out.keys_));
  return out;
}

void UncodedKeys::Score(const QueryBlock& queries, float* out) const {
  kernels::ScoreTile tile{};
  tile.q = queries.q;
  tile.queries = queries.queries;
  tile.head_dim = queries.head_dim;
  tile.scale = queries.scale;
  tile.dtype = kernels::kBf16;
  tile.k = keys_.data();
  tile.tokens = static_cast<uint32_t>(places_.size());
  tile.out = out;
  tile.ld_out = places_.size();
  if (!places_.empty()) Kernels().score(tile);
}

}  // namespace quarry
