#include "perf/prefill/fidelity.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "gpu/sparse/build_index.h"
#include "gpu/sparse/sparse_attention.h"

namespace quarry::perf {

Fidelity Of(std::span<const HeadFidelity> heads) {
  Fidelity out;
  double mass = 0, error2 = 0, length2 = 0;
  for (const HeadFidelity& head : heads) {
    mass += head.mass;
    error2 += head.error2;
    length2 += head.length2;
    out.least_mass = std::min(out.least_mass, head.least_mass);
    out.answers += head.rows;
  }
  if (out.answers > 0) out.mass = mass / static_cast<double>(out.answers);
  if (length2 > 0) out.error = std::sqrt(error2 / length2);
  return out;
}

ExactRows::ExactRows(const MadeLayer& layer, std::span<const MadeHead> kinds,
                     std::vector<uint32_t> tokens, ThreadTeam* team)
    : layer_(layer), tokens_(std::move(tokens)) {
  const LayerKv& kv = layer.kv();
  const size_t answers = tokens_.size() * kv.heads;
  std::vector<float> q(answers * kv.head_dim);
  layer.Queries(kinds, tokens_, q.data(), team);
  const std::vector<HeadPlan> dense(kv.heads);
  const SparseIndex index = BuildIndex(dense, {kv, 0, layer.options().tokens}, team);
  o_.resize(q.size());
  lse_.resize(answers);
  quarry::AttendSparse({kv, &index, tokens_, q.data(), o_.data(), lse_.data()}, team);
}

void ExactRows::Compare(size_t row, std::span<const float> o, std::span<const float> lse,
                        std::span<HeadFidelity> sums) const {
  const size_t heads = layer_.kv().heads, d = layer_.kv().head_dim;
  for (size_t h = 0; h < heads; ++h) {
    HeadFidelity& sum = sums[h];
    // Rounding may leave a mask more than there is.
    const double mass = std::min(1.0, std::exp(double{lse[h]} - lse_[row * heads + h]));
    sum.mass += mass;
    sum.least_mass = std::min(sum.least_mass, mass);
    ++sum.rows;
    const float* const exact = &o_[(row * heads + h) * d];
    for (size_t i = 0; i < d; ++i) {
      const double apart = double{o[h * d + i]} - exact[i];
      sum.error2 += apart * apart;
      sum.length2 += double{exact[i]} * exact[i];
    }
  }
}

}  // namespace quarry::perf
