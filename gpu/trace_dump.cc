#include "gpu/trace_dump.h"

#include <cmath>
#include <cstddef>
#include <vector>

#include "absl/strings/str_format.h"
#include "gpu/trace_file.h"
#include "proto/status_macros.h"

namespace quarry {

absl::Status DumpTraces(Sequence& sequence, const QueryRecorder& recorder, const std::string& model,
                        const std::string& directory) {
  const KvShape& shape = sequence.shape();
  std::vector<std::byte> k(size_t{sequence.tokens()} * shape.kv_heads * shape.vector_bytes());
  std::vector<std::byte> v(k.size());
  for (const auto& [layer, queries] : recorder.layers()) {
    QUARRY_RETURN_IF_ERROR(sequence.ReadKv(layer, k, v));
    TraceFile trace;
    trace.model = model;
    trace.layer = layer;
    trace.scale = 1.0f / std::sqrt(static_cast<float>(shape.head_dim));
    trace.tokens = sequence.tokens();
    trace.kv_heads = shape.kv_heads;
    trace.heads = shape.heads;
    trace.head_dim = shape.head_dim;
    trace.dtype = shape.dtype;
    trace.k = k;
    trace.v = v;
    trace.q_train = queries.prompt.q;
    trace.q_train_pos = queries.prompt.positions;
    trace.q = queries.decoded.q;
    trace.q_pos = queries.decoded.positions;
    QUARRY_RETURN_IF_ERROR(
        WriteTraceFile(trace, absl::StrFormat("%s/layer-%02d.safetensors", directory, layer)));
  }
  return absl::OkStatus();
}

}  // namespace quarry
