#include "gpu/host_attention.h"

#include <cmath>
#include <cstring>
#include <vector>

#include "cpu_index/key_index.h"
#include "cpu_index/partial.h"

namespace quarry {

void HostAttend(const DeviceAttention& a, uint32_t kv_head, uint32_t first_row, uint32_t last_row) {
  const uint32_t group = a.heads / a.kv_heads, queries = (last_row - first_row) * group;
  const size_t d = a.head_dim;
  const auto head = [&](uint32_t i) {  // query i's place among all heads of all rows
    return size_t{first_row + i / group} * a.heads + kv_head * group + i % group;
  };
  std::vector<float> q(queries * d), acc(queries * d, 0.0f);
  std::vector<TokenRange> ranges(queries);
  std::vector<Partial> partials(queries);
  for (uint32_t i = 0; i < queries; ++i) {
    std::memcpy(&q[i * d], a.q + head(i) * d, d * sizeof(float));
    ranges[i] = a.Visible(first_row + i / group);
    partials[i].acc = std::span(acc).subspan(i * d, d);
  }
  const QueryBlock block{
      q.data(), DType::kFp32, queries, a.head_dim, 1.0f / std::sqrt(static_cast<float>(a.head_dim)),
      ranges};
  for (const DeviceKv& part : a.parts) {
    const size_t at = kv_head * part.head_stride;
    const KvSegment segment{static_cast<const std::byte*>(part.k) + at,
                            static_cast<const std::byte*>(part.v) + at, part.tokens};
    ExactScan().AttendAll({std::span(&segment, 1), a.head_dim, a.dtype}, block, partials);
  }
  for (uint32_t i = 0; i < queries; ++i) {
    a.lse[head(i)] = partials[i].Finish(std::span(a.o + head(i) * d, d));
  }
}

}  // namespace quarry
