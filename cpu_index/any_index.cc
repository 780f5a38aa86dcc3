#include "cpu_index/any_index.h"

#include <string>
#include <string_view>

#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "cpu_index/cluster_index.h"
#include "cpu_index/code_scan.h"
#include "cpu_index/graph_index.h"
#include "cpu_index/index_form.h"
#include "proto/status_macros.h"

namespace quarry {
namespace {

// The exact scan has no data.
constexpr std::string_view kExact = "exact";
constexpr uint32_t kExactVersion = 1;

absl::StatusOr<std::unique_ptr<KeyIndex>> DeserializeExact(std::span<const std::byte> bytes) {
  QUARRY_ASSIGN_OR_RETURN(const IndexReader reader,
                          IndexReader::Open(kExact, kExactVersion, bytes));
  QUARRY_RETURN_IF_ERROR(reader.Finish());
  return MakeExactScan();
}

}  // namespace

absl::StatusOr<std::vector<std::byte>> SerializeIndex(const KeyIndex& index) {
  if (const auto* of = dynamic_cast<const ClusterIndex*>(&index)) return of->Serialize();
  if (const auto* of = dynamic_cast<const CodeScan*>(&index)) return of->Serialize();
  if (const auto* of = dynamic_cast<const GraphIndex*>(&index)) return of->Serialize();
  if (index.kind() == kExact) return IndexWriter(kExact, kExactVersion).Finish();
  return absl::UnimplementedError(
      absl::StrCat("an index of kind '", std::string(index.kind()), "' is not kept as bytes"));
}

std::shared_ptr<const ClusterModel> ModelOf(const KeyIndex& index) {
  const auto* const clusters = dynamic_cast<const ClusterIndex*>(&index);
  return clusters == nullptr ? nullptr : clusters->model();
}

absl::StatusOr<std::unique_ptr<KeyIndex>> DeserializeIndex(
    std::span<const std::byte> bytes,
    std::span<const std::shared_ptr<const ClusterModel>> known) {
  QUARRY_ASSIGN_OR_RETURN(const std::string_view kind, IndexReader::KindOf(bytes));
  if (kind == "clusters") return ClusterIndex::Deserialize(bytes, known);
  if (kind == "codes") return CodeScan::Deserialize(bytes);
  if (kind == "graph") return GraphIndex::Deserialize(bytes);
  if (kind == kExact) return DeserializeExact(bytes);
  return absl::InvalidArgumentError(absl::StrCat(
      "an index of kind '", absl::CHexEscape(absl::string_view(kind.data(), kind.size())),
      "', which there is not"));
}

}  // namespace quarry
