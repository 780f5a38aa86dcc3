#include "perf/prefill/fidelity.h"

#include <algorithm>
#include <cmath>
#include <utility>

namespace quarry::perf {
namespace {

std::vector<float> QueriesOf(const MadeLayer& layer, std::span<const MadeHead> kinds,
                             std::span<const uint32_t> tokens, ThreadTeam* team) {
  std::vector<float> q(tokens.size() * layer.kv().heads * layer.kv().head_dim);
  layer.Queries(kinds, tokens, q.data(), team);
  return q;
}

}  // namespace

Fidelity Of(std::span<const CapturedSums> heads) {
  Fidelity out;
  double mass = 0, error2 = 0, length2 = 0;
  for (const CapturedSums& head : heads) {
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
    : tokens_(std::move(tokens)),
      q_(QueriesOf(layer, kinds, tokens_, team)),
      meter_(layer.kv(), {0, layer.options().tokens}, tokens_, q_.data(), team) {}

}  // namespace quarry::perf
