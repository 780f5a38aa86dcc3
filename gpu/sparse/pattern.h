// Patterns of sparse prefill: what each head of a model attends, in the manner of MInference
// (arXiv 2407.02490), and the file that holds them.
//
// A pattern file is one JSON object:
//   {"format": "quarry.prefill-patterns.v1", "model": "...", "layers": L, "heads": H,
//    "patterns": [[head 0, .., head H - 1] of layer 0, ..]}
// A head is an object with "pattern" and that pattern's parameters (those of the structs below, by
// their names), and optionally "expected": {"tiles_share": .., "error": ..}.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "proto/model_spec.h"

namespace quarry {

// Of sinks, columns, slashes, ...: more than any context has tokens.
inline constexpr uint32_t kMostPatternCount = 1u << 30;

struct DensePattern {
  friend bool operator==(const DensePattern&, const DensePattern&) = default;
};

// The first `sinks` tokens and a window of the last `local`.
struct AShapePattern {
  uint32_t sinks = 0;
  uint32_t local = 1;  // >= 1
  friend bool operator==(const AShapePattern&, const AShapePattern&) = default;
};

// Columns (keys that all rows attend) and slashes (distances at which all rows attend), those with
// the most mass of the last queries. MInference's vertical-slash; counts include what is always in.
struct VerticalSlashPattern {
  uint32_t columns = 0;
  uint32_t slashes = 0;
  friend bool operator==(const VerticalSlashPattern&, const VerticalSlashPattern&) = default;
};

// The cheapest columns and slashes that capture `mass` of the last queries' attention; dense where
// that takes more than a share of the dense tiles. A cumulative budget, as FlexPrefill has
// (arXiv 2502.20766), but of what the tiles attend and counted in their cost.
struct VerticalSlashMassPattern {
  double mass = 0;             // (0, 1]
  double max_tiles_share = 1;  // (0, 1]
  friend bool operator==(const VerticalSlashMassPattern&,
                         const VerticalSlashMassPattern&) = default;
};

// Per row tile the `blocks` key blocks with the most mass by mean-pooled queries and keys
// (MInference's block-sparse).
struct BlockSparsePattern {
  uint32_t blocks = 1;  // >= 1
  friend bool operator==(const BlockSparsePattern&, const BlockSparsePattern&) = default;
};

// Per row tile the key blocks whose weight by a query and the block's mean key is at least
// `threshold` of that query's largest, for one of its queries: no sorting, no search. In the manner
// of FlashPrefill (arXiv 2603.06199).
struct BlockScoredPattern {
  double threshold = 1;  // (0, 1]
  friend bool operator==(const BlockScoredPattern&, const BlockScoredPattern&) = default;
};

using Pattern = std::variant<DensePattern, AShapePattern, VerticalSlashPattern,
                             VerticalSlashMassPattern, BlockSparsePattern, BlockScoredPattern>;

// "dense", "a_shape", "vertical_slash" (both kinds), "block_sparse", "block_scored".
std::string_view PatternName(const Pattern& pattern);
// The name and the parameters, for people: "a_shape 1024 + 4096".
std::string PatternText(const Pattern& pattern);
// InvalidArgument names the parameter, its value and what is allowed.
absl::Status ValidatePattern(const Pattern& pattern);
inline bool IsDense(const Pattern& pattern) {
  return std::holds_alternative<DensePattern>(pattern);
}

struct HeadPattern {
  Pattern pattern;
  // On the reference sample that the pattern was chosen on; negative: unknown.
  double tiles_share = -1;  // its tiles by those of dense attention
  double error = -1;        // relative, of the output
  friend bool operator==(const HeadPattern&, const HeadPattern&) = default;
};

struct PatternFile {
  std::string model;  // for people
  uint32_t layers = 0, heads = 0;
  std::vector<HeadPattern> patterns;  // [layers][heads]

  const HeadPattern& At(uint32_t layer, uint32_t head) const {
    return patterns[size_t{layer} * heads + head];
  }
  friend bool operator==(const PatternFile&, const PatternFile&) = default;
};

// Strict: InvalidArgument names the field (`patterns[3][0].columns`) that is missing, unknown, of a
// wrong type or out of range.
absl::StatusOr<PatternFile> ParsePatterns(std::string_view json);
// Canonical: keys in order, one head per line, numbers in their shortest exact form. What it
// writes, ParsePatterns reads as the same file.
std::string WritePatterns(const PatternFile& file);
absl::StatusOr<PatternFile> LoadPatterns(const std::string& path);
absl::Status SavePatterns(const PatternFile& file, const std::string& path);

// SHA-256, encoded as in proto/IDENTITY.md, of all that decides what is attended: the patterns and
// their parameters, not the model's name or what is expected of them.
//   domain "quarry.recipe.patterns.v1"; u32 layers; u32 heads; then per head u32 kind (0 dense,
//   1 a_shape, 2 vertical_slash, 3 vertical_slash by mass, 4 block_sparse, 5 block_scored) and its
//   parameters in the structs' order, integers as u32, numbers as f64 (IEEE 754 bits as u64).
// The domain stands for how patterns become tiles too (sparse_index.h, build_index.h): whoever
// changes that takes another.
RecipeDigest PatternsDigest(const PatternFile& file);

// How K/V computed with these patterns are named (NumericRecipe, proto/model_spec.h): a context
// that is opened with this recipe publishes its blocks in a namespace of their own, so that what
// sparse attention computed never passes for exact. A file of dense heads alone has the dense
// recipe: its K/V are exact.
NumericRecipe RecipeOf(const PatternFile& file);

}  // namespace quarry
