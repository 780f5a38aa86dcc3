// What a context is computed with: the fields that decide whether cached KV may be reused.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "proto/types.h"

namespace quarry {

enum class RopeRegime : uint8_t { kNone = 0, kShort = 1, kLong = 2 };  // kNone: not LongRoPE

// The rotary embedding as it is applied, not as it is named: two revisions of one model carry
// different factors. Signature: RopeSignatureOf() in identity.h.
struct RopeSpec {
  std::vector<float> inv_freq;  // [rotary_dim / 2], after every scaling
  float attention_scale = 1.0f;  // multiplies cos and sin
  uint32_t rotary_dim = 0;
  bool interleaved = false;  // false: neox (halves), true: pairs
  DType dtype = DType::kFp32;  // of the rotation's arithmetic
  RopeRegime regime = RopeRegime::kNone;
  // The regime holds for positions below this; 0 = no limit of its own.
  uint32_t regime_max_tokens = 0;
};

struct ModelSpec {
  std::string name;  // for people; not part of any identity
  KvShape shape;
  WeightsDigest weights;
  TokenizerDigest tokenizer;
  std::vector<AdapterDigest> adapters;  // in application order
  RopeSpec rope;
};

// How K/V were computed. Dense (all zero digest) is exact; any sparse pattern file, retrieval
// budget or lossy codec that took part gives another digest, so approximate KV never passes
// for exact.
struct NumericRecipe {
  RecipeDigest digest;
  bool dense() const { return digest.IsZero(); }
  friend bool operator==(const NumericRecipe&, const NumericRecipe&) = default;
};

// The fields of a namespace digest. One differing field is one miss.
struct NamespaceFields {
  std::string tenant;
  WeightsDigest weights;
  TokenizerDigest tokenizer;
  std::vector<AdapterDigest> adapters;
  RopeSignature rope;
  RecipeDigest recipe;
};

// InvalidArgument names the field and its value: zero or oversized dimensions, heads not a
// multiple of kv_heads, head_dim not a multiple of 16, rotary_dim not 2 * inv_freq.size().
absl::Status ValidateModelSpec(const ModelSpec& spec);

}  // namespace quarry
