#include "cpu_index/cluster_model.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "absl/strings/str_cat.h"
#include "cpu_index/cluster_rows.h"
#include "cpu_index/simd.h"
#include "proto/status_macros.h"

namespace quarry {
namespace {

constexpr uint32_t kWidth = KeyCodes::kCoordinates;
constexpr uint32_t kOpenAll = 1, kScanIfFaster = 2;  // flags
// Of what one doubt may be; learned ones lie between 1e-4 and 20.
constexpr float kLeastDoubt = 1e-6f, kMostDoubt = 1e3f;
// How much larger a query's variance may be than any sampled one's. Queries of heads that drift
// stay below twice; of queries three times as long as all sampled ones, 9 times, a fifth erred by
// more than four times what was predicted.
constexpr float kMostBeyond = 4;
// A breadth is a number above 0: times the variance of a place without a node, -infinity, it must
// leave that as it is.
constexpr float kLeastBreadth = 1e-30f, kMostBreadth = 1e30f;

void Put(std::span<const float> numbers, IndexWriter* out) { out->PutAll(numbers); }
void Put(std::span<const uint16_t> numbers, IndexWriter* out) { out->PutAll(numbers); }

void Write(const ClusterModel::Inside& inside, IndexWriter* out) {
  out->Put(inside.variance);
  Put(inside.covariance, out);
  Put(inside.slope, out);
}

absl::Status Read(IndexReader* in, uint64_t slope, ClusterModel::Inside* out) {
  QUARRY_RETURN_IF_ERROR(in->GetNumber("variance inside nodes", 0, &out->variance));
  QUARRY_RETURN_IF_ERROR(in->GetNumbers("covariance inside nodes", uint64_t{kWidth} * kWidth,
                                        kAnyNumber, &out->covariance));
  return in->GetBf16("slope inside nodes", slope, kAnyNumber, &out->slope);
}

}  // namespace

uint32_t ClusterModel::rank() const { return std::min(basis.head_dim, kWidth); }

QueryBasis ClusterModel::CodeBasis() const {
  QueryBasis out;
  out.head_dim = basis.head_dim;
  out.rank = rank();
  out.variance.assign(row_variance.begin(), row_variance.begin() + out.rank);
  return out;
}

float ClusterModel::LostVariance(std::span<const float> coordinates) const {
  float sum = 0;
  for (size_t c = rank(); c < coordinates.size(); ++c) {
    sum += difference_variance[c] * coordinates[c] * coordinates[c];
  }
  return sum;
}

std::vector<float> ClusterModel::Breadth(const Inside& inside, std::span<const float> coordinates,
                                         uint32_t queries) const {
  const size_t stride = coordinates.size() / queries, used = rank();
  std::vector<float> y(size_t{queries} * kWidth), along(y.size()), out;
  for (uint32_t i = 0; i < queries; ++i) {
    std::copy_n(coordinates.data() + i * stride, used, y.data() + size_t{i} * kWidth);
  }
  kernels::ScoreTile tile{};
  tile.q = y.data();
  tile.queries = queries;
  tile.head_dim = kWidth;
  tile.k = inside.covariance.data();
  tile.tokens = kWidth;
  tile.dtype = kernels::kFp32;
  tile.scale = 1;
  tile.out = along.data();
  tile.ld_out = kWidth;
  Kernels().score(tile);
  for (size_t at = 0; at < y.size(); at += kWidth) {
    float sum = 0;
    for (uint32_t c = 0; c < kWidth; ++c) {
      sum += along[at + c] * y[at + c];
    }
    sum += LostVariance(coordinates.subspan(at / kWidth * stride, stride));
    const float breadth =
        std::max(sum, 1e-6f * inside.variance) / std::max(inside.variance, 1e-12f);
    // In this order what is no number is the least.
    out.push_back(std::min(kMostBreadth, std::max(kLeastBreadth, breadth)));
  }
  return out;
}

std::vector<float> ClusterModel::CodeVariance(std::span<const float> coordinates,
                                              uint32_t queries) const {
  const size_t stride = coordinates.size() / queries;
  std::vector<float> out;
  for (uint32_t i = 0; i < queries; ++i) {
    const float* const y = coordinates.data() + i * stride;
    float sum = 0;
    for (size_t c = 0; c < code_error.size(); ++c) {
      sum += code_error[c] * y[c] * y[c];
    }
    sum += LostVariance({y, stride});
    out.push_back(sum);
  }
  return out;
}

float ClusterModel::KeyVariance(std::span<const float> coordinates) const {
  float sum = 0;
  for (size_t c = 0; c < coordinates.size(); ++c) {
    sum += basis.variance[c] * coordinates[c] * coordinates[c];
  }
  return sum;
}

bool ClusterModel::Trusts(std::span<const float> coordinates) const {
  const float variance = KeyVariance(coordinates);
  return std::isfinite(variance) && variance <= kMostBeyond * largest_variance;
}

ClusterModel::Unrest ClusterModel::UnrestOf(float code_variance, float leaf_breadth,
                                            float super_breadth) const {
  // A weight e^x, with x normal of this variance, and a value that has an error of its own.
  constexpr float kOwn = 0.7f, kMost = 2.5f;
  const auto unrest = [=](float variance) {
    return std::sqrt(std::exp(std::min(kMost, variance)) - 1 + kOwn);
  };
  return {unrest(code_variance), unrest(leaf.variance * leaf_breadth),
          unrest(super.variance * super_breadth)};
}

float ClusterModel::CorrectionAt(float tolerance) const {
  // In this order what is no number has the first one's.
  if (!(tolerance < kTried.front())) return std::exp(correction.front());
  for (size_t i = 1; i < kTried.size(); ++i) {
    if (tolerance < kTried[i]) continue;
    const float part = std::log(kTried[i - 1] / tolerance) / std::log(kTried[i - 1] / kTried[i]);
    return std::exp(correction[i - 1] + part * (correction[i] - correction[i - 1]));
  }
  return std::exp(correction.back());
}

uint64_t ClusterModel::query_bytes() const {
  return 2 * (query_map.size() + leaf.slope.size() + super.slope.size() + token_slope.size()) +
         4 * (basis.mean.size() + leaf.covariance.size() + super.covariance.size() +
              code_error.size() + centre_step.size());
}

uint64_t ClusterModel::memory_bytes() const {
  return query_bytes() + 4 * (basis.key_map.size() + basis.query_map.size() +
                              difference_variance.size() + row_variance.size() +
                              token_deviation.size() + leaf_deviation.size());
}

void ClusterModel::Write(IndexWriter* out) const {
  basis.Write(out);
  out->Put(lost_variance);
  for (const auto* numbers : {&centre_step, &difference_variance, &row_variance, &token_deviation,
                              &leaf_deviation, &code_error}) {
    Put(*numbers, out);
  }
  quarry::Write(leaf, out);
  quarry::Write(super, out);
  Put(token_slope, out);
  for (float number : {super_doubt, leaf_doubt, common_doubt, token_doubt, row_doubt, caution,
                       log_length, largest_variance, needed_rows, scans_from}) {
    out->Put(number);
  }
  for (float number : correction) out->Put(number);
  const uint32_t flags = (open_all ? kOpenAll : 0) | (scan_if_faster ? kScanIfFaster : 0);
  for (uint32_t number : {flags, learned_queries, learned_tokens}) out->Put(number);
}

absl::Status ClusterModel::Check() const {
  constexpr std::string_view kKind = "cluster model";
  IndexWriter writer(kKind, 0);
  Write(&writer);
  const std::vector<std::byte> bytes = std::move(writer).Finish();
  QUARRY_ASSIGN_OR_RETURN(IndexReader reader, IndexReader::Open(kKind, 0, bytes));
  return Read(&reader).status();
}

absl::StatusOr<ClusterModel> ClusterModel::Read(IndexReader* in) {
  ClusterModel m;
  QUARRY_ASSIGN_OR_RETURN(m.basis, QueryBasis::Read(in));
  const uint32_t d = m.basis.head_dim;
  if (m.basis.rank != d || !m.basis.has_maps() || d % 16 != 0) {
    return absl::DataLossError(
        absl::StrCat("clusters: a basis of ", m.basis.rank, " of ", d, " coordinates"));
  }
  m.query_map = RoundedToBf16(m.basis.query_map);
  QUARRY_RETURN_IF_ERROR(in->GetNumber("lost variance", 0, &m.lost_variance));
  QUARRY_RETURN_IF_ERROR(in->GetNumbers("step of centres", kWidth, 0, &m.centre_step));
  for (auto* numbers : {&m.difference_variance, &m.row_variance, &m.token_deviation,
                        &m.leaf_deviation}) {
    QUARRY_RETURN_IF_ERROR(in->GetNumbers("variance", d, 0, numbers));
  }
  QUARRY_RETURN_IF_ERROR(in->GetNumbers("error of codes", m.rank(), 0, &m.code_error));
  const uint64_t slope = uint64_t{d} * d;
  QUARRY_RETURN_IF_ERROR(quarry::Read(in, slope, &m.leaf));
  QUARRY_RETURN_IF_ERROR(quarry::Read(in, slope, &m.super));
  QUARRY_RETURN_IF_ERROR(in->GetBf16("slope of tokens", slope, kAnyNumber, &m.token_slope));
  for (float* doubt :
       {&m.super_doubt, &m.leaf_doubt, &m.common_doubt, &m.token_doubt, &m.row_doubt}) {
    QUARRY_RETURN_IF_ERROR(in->GetNumber("doubt", kLeastDoubt, doubt));
    if (*doubt > kMostDoubt) {
      return absl::DataLossError(absl::StrCat("clusters: a doubt of ", *doubt));
    }
  }
  QUARRY_RETURN_IF_ERROR(in->GetNumber("caution", 1, &m.caution));
  QUARRY_RETURN_IF_ERROR(in->GetNumber("log of a length", kAnyNumber, &m.log_length));
  QUARRY_RETURN_IF_ERROR(in->Get(&m.largest_variance));
  if (!(m.largest_variance >= 0)) {
    return absl::DataLossError(
        absl::StrCat("clusters: a largest variance of ", m.largest_variance));
  }
  QUARRY_RETURN_IF_ERROR(in->GetNumber("share of rows", 0, &m.needed_rows));
  if (m.needed_rows > kMostNeededRows) {
    return absl::DataLossError(absl::StrCat("clusters: a share of rows of ", m.needed_rows));
  }
  QUARRY_RETURN_IF_ERROR(in->GetNumber("error from which on scans are faster", 0, &m.scans_from));
  if (m.scans_from != 0 && std::find(kTried.begin(), kTried.end(), m.scans_from) == kTried.end()) {
    return absl::DataLossError(
        absl::StrCat("clusters: an error of ", m.scans_from, " from which on scans are faster"));
  }
  for (float& number : m.correction) {
    QUARRY_RETURN_IF_ERROR(in->GetNumber("correction", -kMostCorrection, &number));
    if (number > kMostCorrection) {
      return absl::DataLossError(absl::StrCat("clusters: a correction of ", number));
    }
  }
  uint32_t flags = 0;
  for (uint32_t* number : {&flags, &m.learned_queries, &m.learned_tokens}) {
    QUARRY_RETURN_IF_ERROR(in->Get(number));
  }
  if ((flags & ~(kOpenAll | kScanIfFaster)) != 0) {
    return absl::DataLossError(absl::StrCat("clusters: flags ", flags));
  }
  m.open_all = (flags & kOpenAll) != 0;
  m.scan_if_faster = (flags & kScanIfFaster) != 0;
  return m;
}

}  // namespace quarry
