// The bytes that a clustered index is kept as.
#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "cpu_index/balanced_tree.h"
#include "cpu_index/cluster_index.h"
#include "cpu_index/index_form.h"
#include "proto/status_macros.h"

namespace quarry {
namespace {

constexpr std::string_view kKind = "clusters";
constexpr uint32_t kVersion = 1;
constexpr uint32_t kWidth = KeyCodes::kCoordinates;
// Of what one doubt may be; learned ones lie between 1e-4 and 20.
constexpr float kLeastDoubt = 1e-6f, kMostDoubt = 1e3f;

// The bases of all coordinates, and of the codes'.
absl::Status CheckBases(const QueryBasis& all, const QueryBasis& codes) {
  if (all.rank != all.head_dim || !all.has_maps() || codes.has_maps() ||
      codes.head_dim != all.head_dim || codes.rank != std::min(all.head_dim, kWidth)) {
    return absl::DataLossError(absl::StrCat("clusters: codes of ", codes.rank, " of ",
                                            codes.head_dim, " coordinates, of a basis of ",
                                            all.rank, " of ", all.head_dim));
  }
  return absl::OkStatus();
}

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

void Put(std::span<const float> numbers, IndexWriter* out) { out->PutAll(numbers); }

}  // namespace

// What is written, in this order: the parts, then what was learned of them.
struct ClusterIndex::Form {
  static void Write(const Parts& p, IndexWriter* out) {
    p.basis.Write(out);
    out->Put(p.lost_variance);
    p.codes.Write(out);
    out->PutAll(std::span<const uint32_t>(p.order));
    out->PutAll(std::span<const uint16_t>(p.scale));
    p.key_rows.Write(out);
    p.token_values.Write(out);
    p.leaf_values.Write(out);
    out->PutAll(std::span<const uint16_t>(p.super_values));
    p.leaves.Write(out);
    p.supers.Write(out);
  }

  static absl::StatusOr<Parts> ReadParts(IndexReader* in) {
    QUARRY_ASSIGN_OR_RETURN(QueryBasis basis, QueryBasis::Read(in));
    float lost = 0;
    QUARRY_RETURN_IF_ERROR(in->GetNumber("lost variance", 0, &lost));
    QUARRY_ASSIGN_OR_RETURN(KeyCodes codes, KeyCodes::Read(in));
    QUARRY_RETURN_IF_ERROR(CheckBases(basis, codes.basis()));
    const uint32_t tokens = codes.keys(), d = basis.head_dim;
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
    return Parts{std::move(basis),        lost,
                 std::move(order),        std::move(codes),
                 std::move(scale),        std::move(key_rows),
                 std::move(token_values), std::move(leaf_values),
                 std::move(super_values), std::move(leaves),
                 std::move(supers)};
  }

  static void Write(const Inside& inside, IndexWriter* out) {
    out->Put(inside.variance);
    out->Put(inside.lost_variance);
    Put(inside.covariance, out);
    Put(inside.slope, out);
  }

  static absl::Status Read(IndexReader* in, uint64_t slope, Inside* out) {
    QUARRY_RETURN_IF_ERROR(in->GetNumber("variance inside nodes", 0, &out->variance));
    QUARRY_RETURN_IF_ERROR(in->GetNumber("lost variance inside nodes", 0, &out->lost_variance));
    QUARRY_RETURN_IF_ERROR(in->GetNumbers("covariance inside nodes", uint64_t{kWidth} * kWidth,
                                          kAnyNumber, &out->covariance));
    return in->GetNumbers("slope inside nodes", slope, kAnyNumber, &out->slope);
  }

  static void WriteLearned(const ClusterIndex& x, IndexWriter* out) {
    Put(x.code_error_, out);
    Write(x.inside_leaf_, out);
    Write(x.inside_super_, out);
    Put(x.token_slope_, out);
    for (float doubt : {x.super_doubt_, x.leaf_doubt_, x.common_doubt_, x.token_doubt_,
                        x.row_doubt_, x.log_length_}) {
      out->Put(doubt);
    }
    out->Put(x.open_all_ ? 1u : 0u);
  }

  static absl::Status ReadLearned(IndexReader* in, ClusterIndex* x) {
    const uint64_t slope = uint64_t{x->head_dim()} * x->head_dim();
    QUARRY_RETURN_IF_ERROR(
        in->GetNumbers("error of codes", x->p_.codes.basis().rank, 0, &x->code_error_));
    QUARRY_RETURN_IF_ERROR(Read(in, slope, &x->inside_leaf_));
    QUARRY_RETURN_IF_ERROR(Read(in, slope, &x->inside_super_));
    QUARRY_RETURN_IF_ERROR(in->GetNumbers("slope of tokens", slope, kAnyNumber, &x->token_slope_));
    for (float* doubt :
         {&x->super_doubt_, &x->leaf_doubt_, &x->common_doubt_, &x->token_doubt_, &x->row_doubt_}) {
      QUARRY_RETURN_IF_ERROR(in->GetNumber("doubt", kLeastDoubt, doubt));
      if (*doubt > kMostDoubt) {
        return absl::DataLossError(absl::StrCat("clusters: a doubt of ", *doubt));
      }
    }
    QUARRY_RETURN_IF_ERROR(in->GetNumber("log of a length", kAnyNumber, &x->log_length_));
    uint32_t open_all = 0;
    QUARRY_RETURN_IF_ERROR(in->Get(&open_all));
    if (open_all > 1) {
      return absl::DataLossError(absl::StrCat("clusters: how codes are read is ", open_all));
    }
    x->open_all_ = open_all == 1;
    return absl::OkStatus();
  }
};

std::vector<std::byte> ClusterIndex::Serialize() const {
  IndexWriter writer(kKind, kVersion);
  Form::Write(p_, &writer);
  Form::WriteLearned(*this, &writer);
  return std::move(writer).Finish();
}

absl::StatusOr<std::unique_ptr<ClusterIndex>> ClusterIndex::Deserialize(
    std::span<const std::byte> bytes) {
  QUARRY_ASSIGN_OR_RETURN(IndexReader reader, IndexReader::Open(kKind, kVersion, bytes));
  QUARRY_ASSIGN_OR_RETURN(Parts parts, Form::ReadParts(&reader));
  std::unique_ptr<ClusterIndex> index(new ClusterIndex(std::move(parts)));
  QUARRY_RETURN_IF_ERROR(Form::ReadLearned(&reader, index.get()));
  QUARRY_RETURN_IF_ERROR(reader.Finish());
  return index;
}

}  // namespace quarry
