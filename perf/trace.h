// A trace: K, V and queries of one layer of a real or synthetic model, to measure retrieval on.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "proto/types.h"

namespace quarry::perf {

// One layer. A file of this form, from any engine, can be measured: safetensors with
//   k, v         [n, kv_heads, head_dim]   keys after RoPE, and values; bf16, fp16 or fp32
//   q_train      [m, heads, head_dim]      queries sampled from the prefill, after RoPE
//   q_train_pos  [m]                       their positions, integers
//   q            [t, heads, head_dim]      held-out decode queries; each attends to the keys
//   q_pos        [t]                       before its position: [0, q_pos]
// and the metadata `scale` (of q.k), `model` and `layer`. Positions rise, below n; head_dim is one
// that the kernels take; m may be 0. Not thread-safe.
struct Trace {
  std::string name;   // of the file, without its ending
  std::string model;
  uint32_t layer = 0;
  float scale = 0;
  uint32_t tokens = 0, kv_heads = 0, heads = 0, head_dim = 0;
  DType dtype = DType::kBf16;        // of k and v
  std::vector<std::byte> k, v;       // [kv_heads][n][head_dim]: a head's keys are contiguous
  std::vector<float> q_train, q;     // [m or t][heads][head_dim]
  std::vector<uint32_t> q_train_pos, q_pos;

  uint32_t group() const { return heads / kv_heads; }
  std::span<const std::byte> Keys(uint32_t kv_head) const { return Head(k, kv_head); }
  std::span<const std::byte> Values(uint32_t kv_head) const { return Head(v, kv_head); }
  // The group's queries of one position: [group][head_dim].
  std::span<const float> Queries(std::span<const float> all, uint32_t index,
                                 uint32_t kv_head) const {
    const size_t row = size_t{group()} * head_dim;
    return all.subspan((size_t{index} * kv_heads + kv_head) * row, row);
  }

 private:
  std::span<const std::byte> Head(const std::vector<std::byte>& all, uint32_t kv_head) const {
    return std::span(all).subspan(all.size() / kv_heads * kv_head, all.size() / kv_heads);
  }
};

// InvalidArgument names the file, the tensor and what is wrong with it: a shape that disagrees or
// that no kernel takes, positions past the keys or that do not rise, NaN or a number beyond 65,504,
// missing metadata.
absl::StatusOr<Trace> ReadTrace(const std::string& path);
absl::Status WriteTrace(const Trace& trace, const std::string& path);
// The traces of a directory, in the order of their names; the files are read one at a time.
absl::StatusOr<std::vector<std::string>> ListTraces(const std::string& directory);

}  // namespace quarry::perf
