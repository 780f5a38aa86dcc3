#include "cpu_index/query_basis.h"

#include <Eigen/Dense>
#include <algorithm>

#include "absl/strings/str_cat.h"
#include "cpu_index/run_rows.h"
#include "cpu_index/simd.h"
#include "proto/half.h"
#include "proto/status_macros.h"

namespace quarry {
namespace {

using Matrix = Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
using RowVector = Eigen::RowVectorXf;

// Of the mean of the queries' second moment, in every direction: directions that no sampled query
// has are coded coarsely, not lost. The fewer queries there are for each direction, the less is told
// by where they point: with 256 of them for 128 directions, errors of a clustered index are a third
// of what they are without that.
constexpr float kUnseen = 1e-3f;
float Untold(uint32_t head_dim, Eigen::Index queries) {
  return kUnseen + (1 - kUnseen) * static_cast<float>(head_dim) /
                       static_cast<float>(head_dim + queries);
}

constexpr uint32_t kTileKeys = 64;  // which stay in the nearest caches, widened and projected

// [keys][head_dim], every so many tokens.
Matrix SampleKeys(const KvView& run) {
  const uint32_t tokens = run.tokens().size();
  const uint32_t step = (tokens + kBasisKeys - 1) / kBasisKeys;
  Matrix keys((tokens + step - 1) / step, run.head_dim);
  const uint32_t first = run.tokens().lo;
  for (const KvSegment& segment : run.segments) {
    for (uint32_t t = segment.tokens.lo; t < segment.tokens.hi; ++t) {
      if ((t - first) % step != 0) continue;
      float* const row = keys.row((t - first) / step).data();
      const size_t at = size_t{t - segment.tokens.lo} * run.head_dim;
      for (uint32_t d = 0; d < run.head_dim; ++d) row[d] = LoadAsFloat(segment.k, at + d, run.dtype);
    }
  }
  return keys;
}

// The lower Cholesky factor of the queries' second moment.
Matrix QueryFactor(std::span<const float> queries, uint32_t head_dim) {
  if (queries.empty()) return Matrix::Identity(head_dim, head_dim);
  const Eigen::Index rows = static_cast<Eigen::Index>(queries.size() / head_dim);
  const Eigen::Map<const Matrix> q(queries.data(), rows, head_dim);
  Matrix moment = q.transpose() * q / static_cast<float>(rows);
  const float mean = std::max(moment.trace() / static_cast<float>(head_dim), 1e-12f);
  const float untold = Untold(head_dim, rows);
  moment *= 1 - untold;
  moment.diagonal().array() += untold * mean;
  return moment.llt().matrixL();
}

void Apply(std::span<const float> map, std::span<const float> x, std::span<float> out) {
  for (size_t r = 0; r < out.size(); ++r) {
    float sum = 0;
    for (size_t d = 0; d < x.size(); ++d) sum += map[r * x.size() + d] * x[d];
    out[r] = sum;
  }
}

}  // namespace

void QueryBasis::Write(IndexWriter* out) const {
  for (const uint32_t size : {head_dim, rank, has_maps() ? 1u : 0u}) out->Put(size);
  out->Put(lost_variance);
  for (const auto* part : {&variance, &mean, &key_map, &query_map}) {
    out->PutAll(std::span<const float>(*part));
  }
}

absl::StatusOr<QueryBasis> QueryBasis::Read(IndexReader* in) {
  QueryBasis basis;
  uint32_t maps = 0;
  for (uint32_t* size : {&basis.head_dim, &basis.rank, &maps}) {
    QUARRY_RETURN_IF_ERROR(in->Get(size));
  }
  if (basis.rank == 0 || basis.rank > basis.head_dim || maps > 1) {
    return absl::DataLossError(absl::StrCat("a basis of rank ", basis.rank, " of head_dim ",
                                            basis.head_dim, ", ", maps, " pairs of maps"));
  }
  QUARRY_RETURN_IF_ERROR(in->GetNumber("lost variance", 0, &basis.lost_variance));
  QUARRY_RETURN_IF_ERROR(in->GetNumbers("variance", basis.rank, 0, &basis.variance));
  if (maps == 0) return basis;
  const uint64_t numbers = uint64_t{basis.rank} * basis.head_dim;
  QUARRY_RETURN_IF_ERROR(in->GetNumbers("mean key", basis.head_dim, kAnyNumber, &basis.mean));
  QUARRY_RETURN_IF_ERROR(in->GetNumbers("map of keys", numbers, kAnyNumber, &basis.key_map));
  QUARRY_RETURN_IF_ERROR(in->GetNumbers("map of queries", numbers, kAnyNumber, &basis.query_map));
  return basis;
}

void QueryBasis::EncodeQuery(std::span<const float> query, std::span<float> out) const {
  Apply(query_map, query, out);
}

QueryBasis::Coordinates QueryBasis::EncodeQueries(const QueryBlock& queries) const {
  Coordinates out;
  out.of.resize(size_t{queries.queries} * rank);
  out.mean_score.resize(queries.queries);
  kernels::ScoreTile tile{};
  tile.q = queries.q;
  tile.queries = queries.queries;
  tile.head_dim = head_dim;
  tile.dtype = kernels::kFp32;
  tile.scale = queries.scale;
  tile.k = query_map.data();
  tile.tokens = rank;
  tile.out = out.of.data();
  tile.ld_out = rank;
  Kernels().score(tile);
  tile.k = mean.data();
  tile.tokens = 1;
  tile.out = out.mean_score.data();
  tile.ld_out = 1;
  Kernels().score(tile);
  return out;
}

KeyProjection::KeyProjection(const QueryBasis& basis, uint32_t width, DType dtype)
    : head_dim_(basis.head_dim),
      width_(width),
      taken_(std::min(width, basis.rank)),
      dtype_(dtype),
      map_(size_t{taken_} * head_dim_),
      map_bf16_(map_.size()),
      offset_(taken_),
      widened_(size_t{kTileKeys} * head_dim_) {
  for (size_t i = 0; i < map_.size(); ++i) {
    map_bf16_[i] = FloatToBf16(basis.key_map[i]);
    map_[i] = Bf16ToFloat(map_bf16_[i]);
    offset_[i / head_dim_] += map_[i] * basis.mean[i % head_dim_];
  }
}

void KeyProjection::Project(const void* keys, uint32_t count, float* out) {
  // The keys stand where queries do, so that scores come out as rows of coordinates.
  const bool is_bf16 = dtype_ == DType::kBf16;
  kernels::ScoreTile tile{};
  tile.q = widened_.data();
  tile.head_dim = head_dim_;
  tile.k = is_bf16 ? static_cast<const void*>(map_bf16_.data()) : map_.data();
  tile.dtype = is_bf16 ? kernels::kBf16 : kernels::kFp32;
  tile.tokens = taken_;
  tile.scale = 1;
  tile.ld_out = width_;
  for (uint32_t lo = 0; lo < count; lo += kTileKeys) {
    const auto* const at = static_cast<const std::byte*>(keys) +
                           size_t{lo} * head_dim_ * DTypeBytes(dtype_);
    float* const rows = out + size_t{lo} * width_;
    tile.queries = std::min(kTileKeys, count - lo);
    WidenNumbers(at, size_t{tile.queries} * head_dim_, dtype_, widened_.data());
    tile.q_bf16 = is_bf16 ? reinterpret_cast<const uint16_t*>(at) : nullptr;
    tile.out = rows;
    Kernels().score(tile);
    for (uint32_t t = 0; t < tile.queries; ++t) {
      float* const row = rows + size_t{t} * width_;
      for (uint32_t c = 0; c < taken_; ++c) row[c] -= offset_[c];
      std::fill(row + taken_, row + width_, 0.0f);
    }
  }
}

std::vector<float> ProjectKeys(const KvView& run, const QueryBasis& basis, uint32_t width) {
  KeyProjection projection(basis, width, run.dtype);
  std::vector<float> out(size_t{run.tokens().size()} * width);
  for (const KvSegment& segment : run.segments) {
    projection.Project(segment.k, segment.tokens.size(),
                       out.data() + size_t{segment.tokens.lo - run.tokens().lo} * width);
  }
  return out;
}

absl::StatusOr<QueryBasis> FitQueryBasis(const KvView& run, std::span<const float> queries,
                                         uint32_t rank) {
  const uint32_t head_dim = run.head_dim;
  if (run.tokens().empty()) return absl::InvalidArgumentError("a basis of no keys");
  if (rank == 0 || rank > head_dim) {
    return absl::InvalidArgumentError(
        absl::StrCat("a basis of rank ", rank, " of head_dim ", head_dim));
  }
  if (queries.size() % head_dim != 0) {
    return absl::InvalidArgumentError(absl::StrCat(queries.size(), " numbers are no queries of ",
                                                   head_dim));
  }
  Matrix keys = SampleKeys(run);
  const RowVector mean = keys.colwise().mean();
  keys.rowwise() -= mean;
  const Matrix factor = QueryFactor(queries, head_dim);
  const Matrix white = keys * factor;  // rows: factor^T (k - mean)
  const Matrix covariance = white.transpose() * white / static_cast<float>(keys.rows());
  const Eigen::SelfAdjointEigenSolver<Matrix> eigen(covariance);
  // Rising eigenvalues: the last columns are the basis, the last of them first.
  Matrix directions(rank, head_dim);
  QueryBasis basis;
  for (uint32_t r = 0; r < rank; ++r) {
    directions.row(r) = eigen.eigenvectors().col(head_dim - 1 - r).transpose();
    basis.variance.push_back(std::max(0.0f, eigen.eigenvalues()(head_dim - 1 - r)));
  }
  // y = U^T F^T (k - mean), and U^T F^-1 q: their product over all directions is q.(k - mean).
  const Matrix key_map = directions * factor.transpose();
  const Matrix query_map = factor.triangularView<Eigen::Lower>().solve<Eigen::OnTheRight>(directions);
  basis.head_dim = head_dim;
  basis.rank = rank;
  basis.mean.assign(mean.data(), mean.data() + head_dim);
  basis.key_map.assign(key_map.data(), key_map.data() + key_map.size());
  basis.query_map.assign(query_map.data(), query_map.data() + query_map.size());
  for (uint32_t d = 0; d < head_dim - rank; ++d) {
    basis.lost_variance += std::max(0.0f, eigen.eigenvalues()(d));
  }
  return basis;
}

}  // namespace quarry
