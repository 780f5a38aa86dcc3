#include "cpu_index/code_scan.h"

#include <algorithm>
#include <array>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "cpu_index/candidates.h"
#include "cpu_index/index_form.h"
#include "proto/check.h"
#include "proto/status_macros.h"

namespace quarry {
namespace {

constexpr std::string_view kKind = "codes";
constexpr uint32_t kVersion = 1;

// The keys of [lo, hi) with the `count` largest sums, and whatever ties with or lies close to the
// last of them: one histogram, no sort.
void TakeLargest(std::span<const int32_t> sums, TokenRange keys, uint32_t count,
                 const KeyCodes::Query& query, uint32_t first_token,
                 std::vector<Candidate>* out) {
  out->clear();
  if (keys.empty() || count == 0) return;
  const auto [least, most] =
      std::minmax_element(sums.begin() + keys.lo, sums.begin() + keys.hi);
  const int32_t lowest = *least;
  int shift = 0;
  while ((*most - lowest) >> shift >= 2048) ++shift;
  std::array<uint32_t, 2048> histogram{};
  for (uint32_t t = keys.lo; t < keys.hi; ++t) ++histogram[(sums[t] - lowest) >> shift];
  uint32_t taken = 0;
  int bin = static_cast<int>(histogram.size());
  while (bin > 0 && taken < count) taken += histogram[--bin];
  const int32_t threshold = lowest + (bin << shift);
  out->reserve(taken);
  for (uint32_t t = keys.lo; t < keys.hi; ++t) {
    if (sums[t] < threshold) continue;
    out->push_back({first_token + t, query.scale * static_cast<float>(sums[t]) + query.offset});
  }
}

}  // namespace

absl::StatusOr<std::unique_ptr<CodeScan>> CodeScan::Build(const KvView& run,
                                                          std::span<const float> queries) {
  const uint32_t rank = std::min(run.head_dim, KeyCodes::kCoordinates);
  QUARRY_ASSIGN_OR_RETURN(QueryBasis basis, FitQueryBasis(run, queries, rank));
  QUARRY_ASSIGN_OR_RETURN(KeyCodes codes, KeyCodes::Encode(run, std::move(basis)));
  return std::unique_ptr<CodeScan>(new CodeScan(std::move(codes)));
}

std::vector<std::byte> CodeScan::Serialize() const {
  IndexWriter writer(kKind, kVersion);
  codes_.Write(&writer);
  return std::move(writer).Finish();
}

absl::StatusOr<std::unique_ptr<CodeScan>> CodeScan::Deserialize(std::span<const std::byte> bytes) {
  QUARRY_ASSIGN_OR_RETURN(IndexReader reader, IndexReader::Open(kKind, kVersion, bytes));
  QUARRY_ASSIGN_OR_RETURN(KeyCodes codes, KeyCodes::Read(&reader));
  QUARRY_RETURN_IF_ERROR(reader.Finish());
  if (!codes.basis().has_maps()) {
    return absl::DataLossError(
        absl::StrCat("a code scan of ", codes.keys(), " keys has no map of queries"));
  }
  return std::unique_ptr<CodeScan>(new CodeScan(std::move(codes)));
}

void CodeScan::AttendAll(const KvView& run, const QueryBlock& queries,
                         std::span<Partial> acc) const {
  ExactScan().AttendAll(run, queries, acc);
}

void CodeScan::Score(const KvView& run, const QueryBlock& queries, CoarseScores* out) const {
  QUARRY_CHECK(Fits(run));
  const QueryBasis::Coordinates coordinates = codes_.basis().EncodeQueries(queries);
  std::vector<KeyCodes::Query> prepared;
  for (uint32_t i = 0; i < queries.queries; ++i) {
    prepared.push_back(codes_.Prepare(coordinates.Row(i), coordinates.mean_score[i]));
  }
  std::vector<int32_t> sums(size_t{queries.queries} * codes_.keys_padded());
  codes_.Sum(prepared, sums);
  const uint32_t first = run.tokens().lo;
  std::vector<std::vector<Candidate>> found(queries.queries);
  for (uint32_t i = 0; i < queries.queries; ++i) {
    const TokenRange range = Intersect(queries.ranges[i], run.tokens());
    const TokenRange keys =
        range.empty() ? TokenRange{} : TokenRange{range.lo - first, range.hi - first};
    TakeLargest(std::span(sums).subspan(size_t{i} * codes_.keys_padded(), codes_.keys()), keys,
                candidates_, prepared[i], first, &found[i]);
  }
  ListCandidates(run.tokens(), queries.ranges, found, out);
  out->bytes = codes_.code_bytes();
  RescoreCandidates(run, queries, out);
}

void CodeScan::Refine(const KvView& run, const QueryBlock& queries, const CoarseScores& coarse,
                      const RunAllotment& allotment, std::span<Partial> acc) const {
  AttendCandidates(run, queries, coarse, allotment, acc);
}

}  // namespace quarry
