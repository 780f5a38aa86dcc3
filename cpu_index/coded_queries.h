// Queries made ready for coded keys: a byte for each coordinate's weight.
#pragma once

#include <cstdint>
#include <vector>

namespace quarry {

// Query i's score of a code is scale[i] * (the sum of its weights by the code's numbers) + offset[i].
struct CodedQueries {
  std::vector<int8_t> weight;  // [queries][coordinates, as the codes are padded]
  std::vector<float> scale, offset;
};

}  // namespace quarry
