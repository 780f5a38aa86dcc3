// Traces as files: what a layer of a run looked at, to measure retrieval on. perf/trace.h reads
// them back and says what a trace is.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>

#include "absl/status/status.h"
#include "proto/types.h"

namespace quarry {

// Everything of one layer, borrowed.
struct TraceFile {
  std::string model;
  uint32_t layer = 0;
  float scale = 0;  // of q.k
  uint32_t tokens = 0, kv_heads = 0, heads = 0, head_dim = 0;
  DType dtype = DType::kBf16;       // of k and v
  std::span<const std::byte> k, v;  // [tokens][kv_heads][head_dim], keys after RoPE
  std::span<const float> q_train;   // [m][heads][head_dim], sampled from the prefill, after RoPE
  std::span<const uint32_t> q_train_pos;  // [m]
  std::span<const float> q;               // [t][heads][head_dim], held-out decode queries
  std::span<const uint32_t> q_pos;        // [t]
};

// Safetensors with the tensors k, v, q_train, q_train_pos, q, q_pos and the metadata scale, model
// and layer. InvalidArgument names the file and the tensor whose size disagrees; Unavailable a
// file that cannot be written.
absl::Status WriteTraceFile(const TraceFile& trace, const std::string& path);

}  // namespace quarry
