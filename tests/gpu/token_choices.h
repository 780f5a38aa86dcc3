// Draws of tokens from logits, and whether a choice is one that exact arithmetic could have made.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <iterator>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "gpu/sampler.h"
#include "tests/support/normal_floats.h"

namespace quarry::testing {

// Some spread widely, some equal, with zeros of both signs.
inline std::vector<float> MadeLogits(std::mt19937_64& random, uint32_t vocab) {
  const int kind = static_cast<int>(random() % 4);
  std::vector<float> out = NormalFloats(random, vocab, kind == 0 ? 0.1f : kind == 1 ? 3.0f : 20.0f);
  for (float& x : out) {
    if (kind == 3) x = std::round(x / 8) * 8;  // many ties
    if (random() % 16 == 0) x = random() % 2 == 0 ? 0.0f : -0.0f;
  }
  if (random() % 4 == 0) out[random() % vocab] += 40;
  return out;
}

inline TokenDraw MadeDraw(std::mt19937_64& random) {
  constexpr double kTemperatures[] = {0, 5e-324, 1e-300, 1e-30, 0.05, 0.7, 1, 3, 1e6, 1e308};
  constexpr double kTopP[] = {1, 0.999, 0.9, 0.5, 1e-6};
  std::uniform_real_distribution<double> uniform(0, 1);
  double at = uniform(random);
  if (random() % 8 == 0) at = 0;
  if (random() % 8 == 0) at = std::nextafter(1.0, 0.0);
  return {kTemperatures[random() % std::size(kTemperatures)], kTopP[random() % std::size(kTopP)],
          at};
}

// Rows of logits as a device has them: of `tile` ids after the other, all rows.
inline std::vector<float> InTiles(const std::vector<std::vector<float>>& rows, uint32_t tile) {
  const auto vocab = static_cast<uint32_t>(rows.front().size());
  std::vector<float> out;
  for (uint32_t first = 0; first < vocab; first += tile) {
    for (const std::vector<float>& row : rows) {
      const auto from = row.begin() + first;
      out.insert(out.end(), from, from + std::min(tile, vocab - first));
    }
  }
  return out;
}

// Empty if it is; `rounding` is of probabilities.
inline std::string WrongChoice(const std::vector<float>& logits, const TokenDraw& draw, uint32_t id,
                               double rounding) {
  if (id >= logits.size()) return "no id: " + std::to_string(id);
  if (draw.temperature <= 0) {
    const uint32_t want = ChooseToken(logits, draw);
    return id == want ? "" : std::to_string(id) + " is not " + std::to_string(want);
  }
  std::vector<uint32_t> order(logits.size());
  std::iota(order.begin(), order.end(), 0u);
  std::stable_sort(order.begin(), order.end(),
                   [&](uint32_t a, uint32_t b) { return logits[a] > logits[b]; });
  const double best = logits[order[0]];
  std::vector<double> upto;  // of what comes before, by order
  double total = 0;
  for (const uint32_t i : order) {
    upto.push_back(total);
    total += std::exp((logits[i] - best) / draw.temperature);
  }
  upto.push_back(total);
  const double slack = rounding * total;
  // The nucleus ends where its least is reached, or a token earlier or later.
  const auto end_for = [&](double least) {
    size_t n = 1;
    while (n < order.size() && upto[n] < least) ++n;
    return upto[n];
  };
  const double least = end_for(draw.top_p * total - slack),
               most = end_for(draw.top_p * total + slack);
  const size_t place =
      static_cast<size_t>(std::find(order.begin(), order.end(), id) - order.begin());
  if (upto[place + 1] + slack >= draw.at * least && upto[place] - slack <= draw.at * most &&
      upto[place] < most) {
    return "";
  }
  return "id " + std::to_string(id) + " lies in [" + std::to_string(upto[place] / total) + ", " +
         std::to_string(upto[place + 1] / total) + ") of the order, the draw at " +
         std::to_string(draw.at * least / total) + " to " + std::to_string(draw.at * most / total);
}

}  // namespace quarry::testing
