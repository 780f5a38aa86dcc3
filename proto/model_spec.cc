#include "proto/model_spec.h"

#include <cmath>

#include "absl/strings/str_cat.h"
#include "proto/head_dim.h"

namespace quarry {
namespace {

constexpr uint32_t kMaxLayers = 1024;
constexpr uint32_t kMaxHeads = 1024;
constexpr size_t kMaxNameBytes = 256;
constexpr size_t kMaxAdapters = 1024;

absl::Status OutOfRange(const char* field, uint64_t value, uint64_t low, uint64_t high) {
  return absl::InvalidArgumentError(
      absl::StrCat("model ", field, " is ", value, ", must be in [", low, ", ", high, "]"));
}

absl::Status ValidateShape(const KvShape& s) {
  if (s.layers == 0 || s.layers > kMaxLayers) return OutOfRange("layers", s.layers, 1, kMaxLayers);
  if (s.heads == 0 || s.heads > kMaxHeads) return OutOfRange("heads", s.heads, 1, kMaxHeads);
  if (s.kv_heads == 0 || s.kv_heads > s.heads) {
    return OutOfRange("kv_heads", s.kv_heads, 1, s.heads);
  }
  if (s.heads % s.kv_heads != 0) {
    return absl::InvalidArgumentError(absl::StrCat("model heads is ", s.heads,
                                                   ", not a multiple of kv_heads ", s.kv_heads));
  }
  if (!IsHeadDim(s.head_dim)) {
    return absl::InvalidArgumentError(absl::StrCat("model head_dim is ", s.head_dim,
                                                   ", must be a multiple of ", kHeadDimStep,
                                                   " up to ", kMaxHeadDim));
  }
  if (!IsValid(s.dtype)) {
    return absl::InvalidArgumentError(
        absl::StrCat("model dtype is ", static_cast<int>(s.dtype), ", not a known dtype"));
  }
  return absl::OkStatus();
}

}  // namespace

absl::Status ValidateModelSpec(const ModelSpec& spec) {
  if (absl::Status s = ValidateShape(spec.shape); !s.ok()) return s;
  if (spec.name.size() > kMaxNameBytes) {
    return OutOfRange("name's length", spec.name.size(), 0, kMaxNameBytes);
  }
  if (spec.adapters.size() > kMaxAdapters) {
    return OutOfRange("number of adapters", spec.adapters.size(), 0, kMaxAdapters);
  }
  const RopeSpec& rope = spec.rope;
  if (rope.rotary_dim > spec.shape.head_dim || rope.rotary_dim != 2 * rope.inv_freq.size()) {
    return absl::InvalidArgumentError(
        absl::StrCat("rope rotary_dim is ", rope.rotary_dim, " with ", rope.inv_freq.size(),
                     " frequencies and head_dim ", spec.shape.head_dim));
  }
  if (!std::isfinite(rope.attention_scale) || rope.attention_scale <= 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("rope attention_scale is ", rope.attention_scale, ", must be positive"));
  }
  for (size_t i = 0; i < rope.inv_freq.size(); ++i) {
    if (!std::isfinite(rope.inv_freq[i])) {
      return absl::InvalidArgumentError(absl::StrCat("rope inv_freq[", i, "] is not finite"));
    }
  }
  if (!IsValid(rope.dtype)) {
    return absl::InvalidArgumentError(
        absl::StrCat("rope dtype is ", static_cast<int>(rope.dtype), ", not a known dtype"));
  }
  if (rope.regime > RopeRegime::kLong) {
    return absl::InvalidArgumentError(
        absl::StrCat("rope regime is ", static_cast<int>(rope.regime), ", not a known regime"));
  }
  return absl::OkStatus();
}

}  // namespace quarry
