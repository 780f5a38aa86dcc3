// Groups of vectors that lie together, all of one size: a balanced tree of bisections.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

namespace quarry {

inline constexpr uint32_t kLeafRows = 16;
inline constexpr uint32_t kSuperRows = 256;  // leaves of these rows lie together one level up

// Reorders the rows of `rows` [n][width] (width a multiple of 16), so that every kLeafRows
// consecutive ones lie close together, and so do every kSuperRows; only the last group of each kind
// may be smaller. Returns the old index of each row. Each bisection cuts at the median along the
// line between two means, found on a sample. The same rows give the same order on every machine
// with the same kernels. Cost: n * width * log2(n / kLeafRows).
std::vector<uint32_t> BisectRows(std::span<float> rows, uint32_t width);

}  // namespace quarry
