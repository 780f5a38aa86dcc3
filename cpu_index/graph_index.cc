#include "cpu_index/graph_index.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "cpu_index/candidates.h"
#include "cpu_index/graph_search.h"
#include "cpu_index/index_form.h"
#include "proto/check.h"
#include "proto/status_macros.h"

namespace quarry {
namespace {

constexpr std::string_view kKind = "graph";
constexpr uint32_t kVersion = 2;

// The data: these, the entries, and of every key how many links it has, and they. links: the most
// that a key has.
struct Sizes {
  uint32_t first_token, keys, head_dim, links, entries, all_links;
};

absl::Status CheckSizes(const Sizes& sizes, size_t left) {
  const uint64_t numbers = uint64_t{sizes.entries} + sizes.keys + sizes.all_links;
  if (sizes.keys == 0 || sizes.entries == 0 || sizes.head_dim == 0 ||
      sizes.links > 255 || uint64_t{sizes.first_token} + sizes.keys > ~uint32_t{0} ||
      numbers * sizeof(uint32_t) != left) {
    return absl::DataLossError(absl::StrCat("graph: ", sizes.keys, " keys from ",
                                            sizes.first_token, ", ", sizes.entries, " entries, ",
                                            sizes.all_links, " links, at most ", sizes.links,
                                            " a key, in ", left, " bytes"));
  }
  return absl::OkStatus();
}

absl::Status CheckKeys(std::span<const uint32_t> keys, uint32_t count) {
  for (uint32_t key : keys) {
    if (key >= count) {
      return absl::DataLossError(absl::StrCat("graph: a link to key ", key, " of ", count));
    }
  }
  return absl::OkStatus();
}

// Every key gets the room that the one with the most links needs, so there must be one: asked before
// memory is made. Rows are where the reader is, which stays there.
absl::Status CheckMostLinks(const Sizes& sizes, IndexReader rows) {
  uint32_t most = 0;
  for (uint32_t key = 0; key < sizes.keys; ++key) {
    uint32_t links = 0;
    QUARRY_RETURN_IF_ERROR(rows.Get(&links));
    QUARRY_RETURN_IF_ERROR(rows.Skip<uint32_t>(links));
    most = std::max(most, links);
  }
  if (most != sizes.links) {
    return absl::DataLossError(absl::StrCat("graph: keys of at most ", most, " links, not ",
                                            sizes.links));
  }
  return rows.Finish();
}

absl::Status GetLinks(const Sizes& sizes, IndexReader* reader, GraphLinks* out) {
  std::vector<uint32_t> entries;
  QUARRY_RETURN_IF_ERROR(reader->GetVector(sizes.entries, &entries));
  QUARRY_RETURN_IF_ERROR(CheckKeys(entries, sizes.keys));
  QUARRY_RETURN_IF_ERROR(CheckMostLinks(sizes, *reader));
  *out = GraphLinks(sizes.keys, sizes.links);
  out->entries = std::move(entries);
  for (uint32_t key = 0; key < sizes.keys; ++key) {
    uint32_t* const row = out->Row(key);
    QUARRY_RETURN_IF_ERROR(reader->Get(row));
    QUARRY_RETURN_IF_ERROR(reader->GetAll(std::span(row + 1, row[0])));
    QUARRY_RETURN_IF_ERROR(CheckKeys(out->Of(key), sizes.keys));
  }
  return reader->Finish();
}

}  // namespace

absl::StatusOr<std::unique_ptr<GraphIndex>> GraphIndex::Build(const KvView& run,
                                                              std::span<const float> queries,
                                                              const GraphOptions& options) {
  QUARRY_ASSIGN_OR_RETURN(GraphLinks links, BuildGraph(run, queries, options));
  return std::unique_ptr<GraphIndex>(
      new GraphIndex(run.tokens(), run.head_dim, std::move(links)));
}

std::vector<std::byte> GraphIndex::Serialize() const {
  Sizes sizes{tokens_.lo, links_.keys(), head_dim_, 0,
              static_cast<uint32_t>(links_.entries.size()), 0};
  for (uint32_t key = 0; key < links_.keys(); ++key) {
    const auto links = static_cast<uint32_t>(links_.Of(key).size());
    sizes.links = std::max(sizes.links, links);
    sizes.all_links += links;
  }
  IndexWriter writer(kKind, kVersion);
  writer.Put(sizes);
  writer.PutAll(std::span<const uint32_t>(links_.entries));
  for (uint32_t key = 0; key < links_.keys(); ++key) {
    writer.Put(static_cast<uint32_t>(links_.Of(key).size()));
    writer.PutAll(links_.Of(key));
  }
  return std::move(writer).Finish();
}

absl::StatusOr<std::unique_ptr<GraphIndex>> GraphIndex::Deserialize(
    std::span<const std::byte> bytes) {
  QUARRY_ASSIGN_OR_RETURN(IndexReader reader, IndexReader::Open(kKind, kVersion, bytes));
  Sizes sizes{};
  QUARRY_RETURN_IF_ERROR(reader.Get(&sizes));
  QUARRY_RETURN_IF_ERROR(CheckSizes(sizes, reader.left()));
  GraphLinks links;
  QUARRY_RETURN_IF_ERROR(GetLinks(sizes, &reader, &links));
  const TokenRange tokens{sizes.first_token, sizes.first_token + sizes.keys};
  return std::unique_ptr<GraphIndex>(new GraphIndex(tokens, sizes.head_dim, std::move(links)));
}

void GraphIndex::AttendAll(const KvView& run, const QueryBlock& queries,
                           std::span<Partial> acc) const {
  ExactScan().AttendAll(run, queries, acc);
}

void GraphIndex::Score(const KvView& run, const QueryBlock& queries, CoarseScores* out) const {
  QUARRY_CHECK(Fits(run));
  SearchGraph(links_, run, queries, queue_, out);
}

void GraphIndex::Refine(const KvView& run, const QueryBlock& queries, const CoarseScores& coarse,
                        const RunAllotment& allotment, std::span<Partial> acc) const {
  AttendCandidates(run, queries, coarse, allotment, acc);
}

}  // namespace quarry
