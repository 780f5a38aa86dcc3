#include "gpu/trace_file.h"

#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "gpu/safetensors.h"

namespace quarry {
namespace {

TensorDType TensorDTypeOf(DType dtype) {
  switch (dtype) {
    case DType::kBf16:
      return TensorDType::kBf16;
    case DType::kFp16:
      return TensorDType::kFp16;
    case DType::kFp32:
      return TensorDType::kFp32;
  }
  return TensorDType::kFp32;
}

}  // namespace

absl::Status WriteTraceFile(const TraceFile& t, const std::string& path) {
  const std::vector<uint64_t> kv_shape = {t.tokens, t.kv_heads, t.head_dim};
  const auto queries = [&](std::span<const float> q, std::span<const uint32_t> positions) {
    return TensorView{
        TensorDType::kFp32, {positions.size(), t.heads, t.head_dim}, std::as_bytes(q)};
  };
  const auto positions = [](std::span<const uint32_t> p) {
    return TensorView{TensorDType::kInt32, {p.size()}, std::as_bytes(p)};
  };
  const std::vector<std::pair<std::string, TensorView>> tensors = {
      {"k", {TensorDTypeOf(t.dtype), kv_shape, t.k}},
      {"v", {TensorDTypeOf(t.dtype), kv_shape, t.v}},
      {"q_train", queries(t.q_train, t.q_train_pos)},
      {"q_train_pos", positions(t.q_train_pos)},
      {"q", queries(t.q, t.q_pos)},
      {"q_pos", positions(t.q_pos)}};
  return WriteSafetensors(path, tensors,
                          {{"scale", absl::StrFormat("%.9g", t.scale)},
                           {"model", t.model},
                           {"layer", absl::StrCat(t.layer)}});
}

}  // namespace quarry
