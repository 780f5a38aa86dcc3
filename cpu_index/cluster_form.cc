// The bytes that a clustered index is kept as.
#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "cpu_index/cluster_index.h"
#include "cpu_index/index_form.h"
#include "proto/status_macros.h"

namespace quarry {
namespace {

constexpr std::string_view kKind = "clusters";
constexpr uint32_t kVersion = 7;

absl::Status GetOrder(uint32_t tokens, IndexReader* in, std::vector<uint32_t>* out) {
  QUARRY_RETURN_IF_ERROR(in->GetVector(tokens, out));
  std::vector<bool> seen(tokens);
  for (uint32_t token : *out) {
    if (token >= tokens || seen[token]) {
      return absl::DataLossError(absl::StrCat("clusters: token ", token, " of ", tokens,
                                              token < tokens ? " comes twice" : " does not exist"));
    }
    seen[token] = true;
  }
  return absl::OkStatus();
}

void Write(const ClusterIndex::Parts& p, IndexWriter* out) {
  p.codes.Write(out);
  out->PutAll(std::span<const uint32_t>(p.order));
  out->PutAll(std::span<const uint16_t>(p.scale));
  p.key_rows.Write(out);
  p.token_values.Write(out);
  p.leaf_values.Write(out);
  out->PutAll(std::span<const uint16_t>(p.super_values));
  p.leaves.Write(out);
  p.supers.Write(out);
  p.uncoded.Write(out);
}

// Codes and rows have quantisers of their own in their bytes, but queries are made ready by the
// model's: they must be the same.
absl::Status CheckQuantisers(const ClusterIndex::Parts& p, const ClusterModel& m) {
  const QueryBasis& codes = p.codes.basis();
  const KeyCodes wanted_codes = KeyCodes::Encode(std::span<const float>(), m.CodeBasis());
  const KeyRows wanted_rows(0, m.row_variance);
  if (codes.has_maps() || codes.head_dim != m.head_dim() || codes.rank != m.rank() ||
      !p.codes.SameSteps(wanted_codes) || !p.key_rows.SameSteps(wanted_rows)) {
    return absl::DataLossError(absl::StrCat("clusters: codes of ", codes.rank, " of ",
                                            codes.head_dim, " coordinates, of a model of ",
                                            m.rank(), " of ", m.head_dim(),
                                            ", or other quantisers"));
  }
  return absl::OkStatus();
}

absl::StatusOr<ClusterIndex::Parts> ReadParts(const ClusterModel& model, IndexReader* in) {
  QUARRY_ASSIGN_OR_RETURN(KeyCodes codes, KeyCodes::Read(in));
  const uint32_t tokens = codes.keys(), d = model.head_dim();
  std::vector<uint32_t> order;
  QUARRY_RETURN_IF_ERROR(GetOrder(tokens, in, &order));
  std::vector<uint16_t> scale, super_values;
  QUARRY_RETURN_IF_ERROR(in->GetBf16("scale of codes", codes.keys_padded(), 0, &scale));
  QUARRY_ASSIGN_OR_RETURN(KeyRows key_rows, KeyRows::Read(in, tokens, d));
  QUARRY_ASSIGN_OR_RETURN(ValueRows token_values, ValueRows::Read(in, tokens, d));
  const uint32_t leaf_count = (tokens + kLeafRows - 1) / kLeafRows;
  const uint32_t super_count = (tokens + kSuperRows - 1) / kSuperRows;
  QUARRY_ASSIGN_OR_RETURN(ValueRows leaf_values, ValueRows::Read(in, leaf_count, d));
  QUARRY_RETURN_IF_ERROR(
      in->GetBf16("mean value", uint64_t{super_count} * d, kAnyNumber, &super_values));
  QUARRY_ASSIGN_OR_RETURN(NodeLevel leaves, NodeLevel::Read(in, tokens, kLeafRows));
  QUARRY_ASSIGN_OR_RETURN(NodeLevel supers, NodeLevel::Read(in, tokens, kSuperRows));
  QUARRY_ASSIGN_OR_RETURN(UncodedKeys uncoded, UncodedKeys::Read(in, tokens, d));
  ClusterIndex::Parts parts{std::move(order),        std::move(codes),
                            std::move(scale),        std::move(key_rows),
                            std::move(token_values), std::move(leaf_values),
                            std::move(super_values), std::move(leaves),
                            std::move(supers),       std::move(uncoded)};
  QUARRY_RETURN_IF_ERROR(CheckQuantisers(parts, model));
  return parts;
}

std::vector<std::byte> BytesOf(const ClusterModel& model) {
  IndexWriter writer(kKind, kVersion);
  model.Write(&writer);
  return std::move(writer).Finish();
}

// The known one that is the same, if there is one.
std::shared_ptr<const ClusterModel> Shared(
    ClusterModel model, std::span<const std::shared_ptr<const ClusterModel>> known) {
  const std::vector<std::byte> bytes =
      known.empty() ? std::vector<std::byte>() : BytesOf(model);
  const auto same = std::find_if(known.begin(), known.end(), [&](const auto& of) {
    return BytesOf(*of) == bytes;
  });
  if (same != known.end()) return *same;
  return std::make_shared<const ClusterModel>(std::move(model));
}

}  // namespace

std::vector<std::byte> ClusterIndex::Serialize() const {
  IndexWriter writer(kKind, kVersion);
  model_->Write(&writer);
  Write(p_, &writer);
  return std::move(writer).Finish();
}

absl::StatusOr<std::unique_ptr<ClusterIndex>> ClusterIndex::Deserialize(
    std::span<const std::byte> bytes,
    std::span<const std::shared_ptr<const ClusterModel>> known) {
  QUARRY_ASSIGN_OR_RETURN(IndexReader reader, IndexReader::Open(kKind, kVersion, bytes));
  QUARRY_ASSIGN_OR_RETURN(ClusterModel read, ClusterModel::Read(&reader));
  const std::shared_ptr<const ClusterModel> model = Shared(std::move(read), known);
  QUARRY_ASSIGN_OR_RETURN(Parts parts, ReadParts(*model, &reader));
  QUARRY_RETURN_IF_ERROR(reader.Finish());
  return std::unique_ptr<ClusterIndex>(new ClusterIndex(std::move(parts), model));
}

}  // namespace quarry
