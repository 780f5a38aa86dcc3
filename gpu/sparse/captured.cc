#include "gpu/sparse/captured.h"

#include <algorithm>
#include <cmath>

#include "gpu/sparse/sparse_attention.h"
#include "proto/check.h"

namespace quarry {

CaptureMeter::CaptureMeter(const LayerKv& layer, TokenRange rows, std::span<const uint32_t> tokens,
                           const float* q, ThreadTeam* team)
    : layer_(layer), tokens_(tokens), q_(q) {
  QUARRY_CHECK(!tokens.empty());
  const std::vector<HeadPlan> dense(layer.heads);
  const SparseIndex index = BuildIndex(dense, {layer, rows.lo, rows.size()}, team);
  lse_.resize(tokens.size() * layer.heads);
  o_.resize(lse_.size() * layer.head_dim);
  AttendSparse({layer, &index, tokens, q, o_.data(), lse_.data()}, team);
}

std::vector<Captured> CaptureMeter::Measure(const SparseIndex& index, ThreadTeam* team) const {
  std::vector<float> o(o_.size()), lse(lse_.size());
  AttendSparse({layer_, &index, tokens_, q_, o.data(), lse.data()}, team);
  const size_t heads = layer_.heads, width = heads * layer_.head_dim;
  std::vector<CapturedSums> sums(heads);
  for (size_t r = 0; r < tokens_.size(); ++r) {
    Add(r, std::span(o).subspan(r * width, width), std::span(lse).subspan(r * heads, heads), sums);
  }
  std::vector<Captured> out;
  for (const CapturedSums& sum : sums) {
    out.push_back({sum.mass / static_cast<double>(sum.rows), sum.least_mass,
                   sum.length2 > 0 ? std::sqrt(sum.error2 / sum.length2) : 0});
  }
  return out;
}

void CaptureMeter::Add(size_t row, std::span<const float> o, std::span<const float> lse,
                       std::span<CapturedSums> sums) const {
  const size_t heads = layer_.heads, d = layer_.head_dim;
  for (size_t h = 0; h < heads; ++h) {
    CapturedSums& sum = sums[h];
    const size_t at = row * heads + h;
    // Rounding may leave a mask more than there is.
    const double mass = std::min(1.0, std::exp(double{lse[h]} - lse_[at]));
    sum.mass += mass;
    sum.least_mass = std::min(sum.least_mass, mass);
    ++sum.rows;
    for (size_t i = 0; i < d; ++i) {
      const double exact = o_[at * d + i], apart = o[h * d + i] - exact;
      sum.error2 += apart * apart;
      sum.length2 += exact * exact;
    }
  }
}

}  // namespace quarry
