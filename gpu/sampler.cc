#include "gpu/sampler.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

namespace quarry {

TokenDraw Sampler::Draw() {
  if (options_.temperature <= 0) return {};
  return {options_.temperature, options_.top_p,
          std::uniform_real_distribution<double>(0, 1)(random_)};
}

uint32_t FirstUnfit(std::span<const float> logits) {
  const auto unfit = std::ranges::find_if_not(logits, [](float x) { return std::isfinite(x); });
  return unfit != logits.end() ? static_cast<uint32_t>(unfit - logits.begin()) : kEveryToken;
}

uint32_t ChooseToken(std::span<const float> logits, const TokenDraw& draw) {
  const auto best = std::max_element(logits.begin(), logits.end());
  if (draw.temperature <= 0) return static_cast<uint32_t>(best - logits.begin());
  std::vector<uint32_t> order(logits.size());
  std::iota(order.begin(), order.end(), 0u);
  std::sort(order.begin(), order.end(), [&](uint32_t a, uint32_t b) {
    return logits[a] > logits[b] || (logits[a] == logits[b] && a < b);
  });
  std::vector<double> probability;
  double total = 0;
  for (uint32_t id : order) {
    probability.push_back(std::exp((double{logits[id]} - *best) / draw.temperature));
    total += probability.back();
  }
  double kept = 0;
  size_t count = 0;
  while (count < order.size() && (count == 0 || kept < draw.top_p * total)) {
    kept += probability[count++];
  }
  double at = draw.at * kept;
  for (size_t i = 0; i + 1 < count; ++i) {
    if (at < probability[i]) return order[i];
    at -= probability[i];
  }
  return order[count - 1];
}

}  // namespace quarry
