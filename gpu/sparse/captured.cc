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
  const size_t d = layer_.head_dim;
  std::vector<Captured> out(layer_.heads);
  for (uint32_t h = 0; h < layer_.heads; ++h) {
    double mass = 0, error = 0, length = 0;
    for (size_t r = 0; r < tokens_.size(); ++r) {
      const size_t at = r * layer_.heads + h;
      // Rounding may leave a mask more than there is.
      const double share = std::min(1.0, std::exp(double{lse[at]} - lse_[at]));
      mass += share;
      out[h].least_mass = std::min(out[h].least_mass, share);
      for (size_t i = at * d; i < (at + 1) * d; ++i) {
        error += (double{o[i]} - o_[i]) * (double{o[i]} - o_[i]);
        length += double{o_[i]} * o_[i];
      }
    }
    out[h].mass = mass / static_cast<double>(tokens_.size());
    out[h].error = length > 0 ? std::sqrt(error / length) : 0;
  }
  return out;
}

}  // namespace quarry
