// What clustered indexes encode: differences of keys from their leaf, and means of values.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "cpu_index/key_index.h"
#include "cpu_index/node_level.h"

namespace quarry {

// The first KeyCodes::kCoordinates columns of rows of `width`, 0 where there are fewer.
std::vector<float> Narrowed(std::span<const float> rows, uint32_t width);

// [tokens][width]: how coordinates [tokens][width], in the order given, differ from their leaf's
// centre, as that is scored.
std::vector<float> Differences(std::span<const float> coordinates, std::span<const uint32_t> order,
                               const NodeLevel& leaves, std::span<const float> step);

std::vector<uint16_t> RoundedToBf16(std::span<const float> numbers);

// [width] mean squares of rows.
std::vector<float> SecondMoments(std::span<const float> rows, uint32_t width);

// Makes all rows equally long, relative to the variance of each coordinate [width], but for those
// that one coordinate would carry past what quantisers hold; returns by what factor each was longer,
// bf16.
std::vector<uint16_t> Equalise(std::span<const float> variance, std::span<float> rows);

// Mean values of leaves.
struct LeafMeans {
  std::vector<float> means;  // [leaves][head_dim]
  uint32_t head_dim = 0;
  uint32_t rows = 0;  // tokens
  const float* Of(uint32_t leaf) const { return means.data() + size_t{leaf} * head_dim; }
};
LeafMeans MeanValues(const KvView& run, std::span<const uint32_t> order);

}  // namespace quarry
