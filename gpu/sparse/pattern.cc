#include "gpu/sparse/pattern.h"

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "proto/canonical_hash.h"
#include "proto/status_macros.h"

namespace quarry {
namespace {

template <typename... Fs>
struct Overloaded : Fs... {
  using Fs::operator()...;
};
template <typename... Fs>
Overloaded(Fs...) -> Overloaded<Fs...>;

absl::Status CheckShare(const char* name, double value) {
  // Also refuses what is no number.
  if (value > 0 && value <= 1) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat(name, " ", value, " is not in (0, 1]"));
}

absl::Status CheckCount(const char* name, uint32_t value, uint32_t least) {
  if (value >= least && value <= kMostPatternCount) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat(name, " ", value, " is not from ", least, " to ", kMostPatternCount));
}

}  // namespace

std::string_view PatternName(const Pattern& pattern) {
  return std::visit(Overloaded{[](const DensePattern&) { return "dense"; },
                               [](const AShapePattern&) { return "a_shape"; },
                               [](const VerticalSlashPattern&) { return "vertical_slash"; },
                               [](const VerticalSlashMassPattern&) { return "vertical_slash"; },
                               [](const BlockSparsePattern&) { return "block_sparse"; },
                               [](const BlockScoredPattern&) { return "block_scored"; }},
                    pattern);
}

std::string PatternText(const Pattern& pattern) {
  return std::visit(
      Overloaded{
          [](const DensePattern&) { return std::string("dense"); },
          [](const AShapePattern& p) { return absl::StrCat("a_shape ", p.sinks, " + ", p.local); },
          [](const VerticalSlashPattern& p) {
            return absl::StrCat("vertical_slash ", p.columns, " + ", p.slashes);
          },
          [](const VerticalSlashMassPattern& p) {
            return absl::StrCat("vertical_slash mass ", p.mass, " within ", p.max_tiles_share);
          },
          [](const BlockSparsePattern& p) { return absl::StrCat("block_sparse ", p.blocks); },
          [](const BlockScoredPattern& p) {
            return absl::StrFormat("block_scored %.3g", p.threshold);
          }},
      pattern);
}

absl::Status ValidatePattern(const Pattern& pattern) {
  return std::visit(
      Overloaded{[](const DensePattern&) { return absl::OkStatus(); },
                 [](const AShapePattern& p) {
                   QUARRY_RETURN_IF_ERROR(CheckCount("sinks", p.sinks, 0));
                   return CheckCount("local", p.local, 1);
                 },
                 [](const VerticalSlashPattern& p) {
                   QUARRY_RETURN_IF_ERROR(CheckCount("columns", p.columns, 0));
                   return CheckCount("slashes", p.slashes, 0);
                 },
                 [](const VerticalSlashMassPattern& p) {
                   QUARRY_RETURN_IF_ERROR(CheckShare("mass", p.mass));
                   return CheckShare("max_tiles_share", p.max_tiles_share);
                 },
                 [](const BlockSparsePattern& p) { return CheckCount("blocks", p.blocks, 1); },
                 [](const BlockScoredPattern& p) { return CheckShare("threshold", p.threshold); }},
      pattern);
}

RecipeDigest PatternsDigest(const PatternFile& file) {
  CanonicalHash fields("quarry.recipe.patterns.v1");
  fields.U32(file.layers);
  fields.U32(file.heads);
  for (const HeadPattern& head : file.patterns) {
    fields.U32(static_cast<uint32_t>(head.pattern.index()));
    std::visit(Overloaded{[](const DensePattern&) {},
                          [&](const AShapePattern& p) {
                            fields.U32(p.sinks);
                            fields.U32(p.local);
                          },
                          [&](const VerticalSlashPattern& p) {
                            fields.U32(p.columns);
                            fields.U32(p.slashes);
                          },
                          [&](const VerticalSlashMassPattern& p) {
                            fields.F64(p.mass);
                            fields.F64(p.max_tiles_share);
                          },
                          [&](const BlockSparsePattern& p) { fields.U32(p.blocks); },
                          [&](const BlockScoredPattern& p) { fields.F64(p.threshold); }},
               head.pattern);
  }
  return fields.Finish<RecipeDigest>();
}

NumericRecipe RecipeOf(const PatternFile& file) {
  for (const HeadPattern& head : file.patterns) {
    if (!IsDense(head.pattern)) return {PatternsDigest(file)};
  }
  return {};
}

}  // namespace quarry
