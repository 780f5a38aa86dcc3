#include "gpu/working_bytes.h"

#include <algorithm>

#include "gpu/layer_math.h"

namespace quarry {

uint64_t WorkingBytes(const ModelConfig& c, const SequenceOptions& options, uint32_t max_tokens,
                      bool with_service) {
  const KvShape shape{c.layers, c.heads, c.kv_heads, c.head_dim, options.kv_dtype};
  const uint64_t token_bytes = uint64_t{2} * c.kv_heads * shape.vector_bytes();  // of a layer
  const uint32_t rows = std::min(max_tokens, std::max(1u, options.prefill_rows));
  const uint64_t states = uint64_t{max_tokens} * c.hidden * sizeof(float);
  const uint64_t kept =
      with_service
          ? std::min<uint64_t>(max_tokens, uint64_t{options.window.first} + options.window.last)
          : max_tokens;
  // One layer's K/V at a time, or as much while a layer's grows, and what every layer keeps on the
  // device, with the room that it grows by.
  const uint64_t buffer = max_tokens * token_bytes;
  const uint64_t local =
      options.local_kv == KvMemory::kHost ? 0 : c.layers * (kept + kept / 8 + 64) * token_bytes;
  return states + LayerScratchBytes(c, shape, rows) + buffer + local + kOperationBytes;
}

}  // namespace quarry
