#include "perf/trace.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <filesystem>
#include <limits>
#include <map>
#include <utility>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "gpu/safetensors.h"
#include "gpu/trace_file.h"
#include "proto/head_dim.h"
#include "proto/status_macros.h"

namespace quarry::perf {
namespace {

constexpr char kEnding[] = ".safetensors";

absl::Status Bad(const std::string& path, const std::string& what) {
  return absl::InvalidArgumentError(absl::StrCat(path, ": ", what));
}

absl::Status BadTensor(const std::string& path, const std::string& name, const std::string& what) {
  return Bad(path, absl::StrCat("tensor ", name, ": ", what));
}

bool IsInteger(TensorDType dtype) {
  return dtype == TensorDType::kInt32 || dtype == TensorDType::kInt64;
}

absl::StatusOr<DType> FloatDType(const std::string& path, const std::string& name,
                                 TensorDType dtype) {
  if (dtype == TensorDType::kBf16) return DType::kBf16;
  if (dtype == TensorDType::kFp16) return DType::kFp16;
  if (dtype == TensorDType::kFp32) return DType::kFp32;
  return BadTensor(path, name, "integers where bf16, fp16 or fp32 is wanted");
}

// A tensor of as many dimensions as `wanted`; where a size of that is 0, any but 0 will do.
absl::StatusOr<TensorView> FindTensor(const SafetensorsFile& file, const std::string& name,
                                      const std::vector<uint64_t>& wanted,
                                      const std::string& dimensions) {
  absl::StatusOr<TensorView> tensor = file.Find(name);
  if (!tensor.ok()) return absl::InvalidArgumentError(tensor.status().message());
  bool fits = tensor->shape.size() == wanted.size();
  for (size_t d = 0; fits && d < wanted.size(); ++d) {
    const uint64_t size = tensor->shape[d];
    fits = wanted[d] == 0 ? size <= std::numeric_limits<uint32_t>::max() : size == wanted[d];
  }
  if (fits) return tensor;
  std::vector<std::string> sizes;
  for (uint64_t d : wanted) sizes.push_back(d == 0 ? "any" : absl::StrCat(d));
  return BadTensor(file.path(), name,
                   absl::StrCat("shape [", absl::StrJoin(tensor->shape, ", "), "] where ",
                                dimensions, " = [", absl::StrJoin(sizes, ", "), "] is wanted"));
}

// The largest magnitude, of elements and of the scale: fp16's. Squares of scores, as indexes sum
// them, stay within fp32 then.
constexpr float kMost = 65504;

// The first element that is NaN or beyond kMost, or as many as there are.
size_t FirstUnusable(std::span<const std::byte> data, DType dtype) {
  // Without their signs, as integers, floats are in order, infinity and NaN behind all others.
  const auto find = [&]<typename Bits>(Bits most) {
    constexpr Bits kMagnitude = std::numeric_limits<Bits>::max() >> 1;
    const size_t n = data.size() / sizeof(Bits);
    for (size_t i = 0; i < n; ++i) {
      Bits bits;
      std::memcpy(&bits, data.data() + i * sizeof(Bits), sizeof(Bits));
      if ((bits & kMagnitude) > most) return i;
    }
    return n;
  };
  const auto bits = std::bit_cast<uint32_t>(kMost);
  if (dtype == DType::kBf16) return find(static_cast<uint16_t>(bits >> 16));
  if (dtype == DType::kFp16) return find(uint16_t{0x7bff});
  return find(bits);
}

absl::Status CheckNumbers(const std::string& path, const std::string& name,
                          const TensorView& tensor, DType dtype) {
  const size_t i = FirstUnusable(tensor.bytes, dtype);
  if (i == tensor.elements()) return absl::OkStatus();
  const uint64_t width = tensor.shape[2], rows = tensor.shape[1];
  return BadTensor(path, name,
                   absl::StrCat("element [", i / width / rows, ", ", i / width % rows, ", ",
                                i % width, "] is ", tensor.at(i), ", no number up to ", kMost));
}

// k or v: from [n][kv_heads][head_dim] to [kv_heads][n][head_dim].
absl::StatusOr<std::vector<std::byte>> ReadKv(const SafetensorsFile& file, const std::string& name,
                                              const Trace& t) {
  QUARRY_ASSIGN_OR_RETURN(
      const TensorView tensor,
      FindTensor(file, name, {t.tokens, t.kv_heads, t.head_dim}, "[n, kv_heads, head_dim]"));
  QUARRY_ASSIGN_OR_RETURN(const DType dtype, FloatDType(file.path(), name, tensor.dtype));
  if (dtype != t.dtype) {
    return BadTensor(file.path(), name,
                     absl::StrCat("is ", std::string(DTypeName(dtype)), ", k is ",
                                  std::string(DTypeName(t.dtype))));
  }
  QUARRY_RETURN_IF_ERROR(CheckNumbers(file.path(), name, tensor, dtype));
  std::vector<std::byte> out(tensor.bytes.size());
  const size_t row = size_t{t.head_dim} * DTypeBytes(dtype);
  for (uint32_t h = 0; h < t.kv_heads; ++h) {
    for (uint32_t i = 0; i < t.tokens; ++i) {
      std::memcpy(out.data() + (size_t{h} * t.tokens + i) * row,
                  tensor.bytes.data() + (size_t{i} * t.kv_heads + h) * row, row);
    }
  }
  return out;
}

absl::Status ReadQueries(const SafetensorsFile& file, const std::string& name, const Trace& t,
                         std::vector<float>* q, std::vector<uint32_t>* positions) {
  const std::string pos_name = name + "_pos";
  QUARRY_ASSIGN_OR_RETURN(const TensorView tensor, FindTensor(file, name, {0, t.heads, t.head_dim},
                                                              "[queries, heads, head_dim]"));
  QUARRY_ASSIGN_OR_RETURN(const DType dtype, FloatDType(file.path(), name, tensor.dtype));
  QUARRY_RETURN_IF_ERROR(CheckNumbers(file.path(), name, tensor, dtype));
  q->resize(tensor.elements());
  for (size_t i = 0; i < q->size(); ++i) (*q)[i] = tensor.at(i);
  absl::StatusOr<TensorView> pos = file.Find(pos_name);
  if (!pos.ok()) return absl::InvalidArgumentError(pos.status().message());
  if (!IsInteger(pos->dtype) || pos->shape != std::vector<uint64_t>{tensor.shape[0]}) {
    return BadTensor(
        file.path(), pos_name,
        absl::StrCat("wanted are ", tensor.shape[0], " integers, one for each of ", name));
  }
  for (size_t i = 0; i < pos->elements(); ++i) {
    const int64_t at = pos->integer(i);
    if (at < 0 || at >= t.tokens) {
      return BadTensor(file.path(), pos_name,
                       absl::StrCat("element ", i, " is ", at, ", there are ", t.tokens, " keys"));
    }
    if (i > 0 && at <= positions->back()) {
      return BadTensor(file.path(), pos_name,
                       absl::StrCat("element ", i, " is ", at, " behind ", positions->back(),
                                    ", positions rise"));
    }
    positions->push_back(static_cast<uint32_t>(at));
  }
  return absl::OkStatus();
}

absl::Status ReadMetadata(const SafetensorsFile& file, Trace* t) {
  const auto& metadata = file.metadata();
  for (const char* key : {"scale", "model", "layer"}) {
    if (!metadata.contains(key)) return Bad(file.path(), absl::StrCat("no metadata ", key));
  }
  t->model = metadata.at("model");
  if (!absl::SimpleAtof(metadata.at("scale"), &t->scale) || !(t->scale > 0) || t->scale > kMost) {
    return Bad(file.path(), absl::StrCat("metadata scale is \"", metadata.at("scale"),
                                         "\", not a positive number up to ", kMost));
  }
  if (!absl::SimpleAtoi(metadata.at("layer"), &t->layer)) {
    return Bad(file.path(),
               absl::StrCat("metadata layer is \"", metadata.at("layer"), "\", not a count"));
  }
  return absl::OkStatus();
}

// Sizes and dtype, from k and q.
absl::Status ReadShape(const SafetensorsFile& file, Trace* t) {
  QUARRY_ASSIGN_OR_RETURN(const TensorView k,
                          FindTensor(file, "k", {0, 0, 0}, "[n, kv_heads, head_dim]"));
  QUARRY_ASSIGN_OR_RETURN(t->dtype, FloatDType(file.path(), "k", k.dtype));
  t->tokens = static_cast<uint32_t>(k.shape[0]);
  t->kv_heads = static_cast<uint32_t>(k.shape[1]);
  t->head_dim = static_cast<uint32_t>(k.shape[2]);
  if (k.elements() == 0) return BadTensor(file.path(), "k", "is empty");
  if (!IsHeadDim(t->head_dim)) {
    return BadTensor(file.path(), "k",
                     absl::StrCat("head_dim ", t->head_dim, " is no multiple of ", kHeadDimStep,
                                  " up to ", kMaxHeadDim));
  }
  QUARRY_ASSIGN_OR_RETURN(const TensorView q,
                          FindTensor(file, "q", {0, 0, t->head_dim}, "[t, heads, head_dim]"));
  if (q.elements() == 0) return BadTensor(file.path(), "q", "is empty");
  t->heads = static_cast<uint32_t>(q.shape[1]);
  if (t->heads % t->kv_heads != 0) {
    return BadTensor(
        file.path(), "q",
        absl::StrCat(t->heads, " heads are no multiple of ", t->kv_heads, " KV heads"));
  }
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<Trace> ReadTrace(const std::string& path) {
  QUARRY_ASSIGN_OR_RETURN(const std::unique_ptr<SafetensorsFile> file, SafetensorsFile::Open(path));
  Trace t;
  t.name = std::filesystem::path(path).stem().string();
  QUARRY_RETURN_IF_ERROR(ReadMetadata(*file, &t));
  QUARRY_RETURN_IF_ERROR(ReadShape(*file, &t));
  QUARRY_ASSIGN_OR_RETURN(t.k, ReadKv(*file, "k", t));
  QUARRY_ASSIGN_OR_RETURN(t.v, ReadKv(*file, "v", t));
  QUARRY_RETURN_IF_ERROR(ReadQueries(*file, "q_train", t, &t.q_train, &t.q_train_pos));
  QUARRY_RETURN_IF_ERROR(ReadQueries(*file, "q", t, &t.q, &t.q_pos));
  return t;
}

absl::Status WriteTrace(const Trace& t, const std::string& path) {
  const size_t row = size_t{t.head_dim} * DTypeBytes(t.dtype);
  std::vector<std::byte> parts[2];
  const std::vector<std::byte>* const from[2] = {&t.k, &t.v};
  for (int part = 0; part < 2; ++part) {
    if (from[part]->size() != row * t.tokens * t.kv_heads) {
      return BadTensor(path, part == 0 ? "k" : "v",
                       absl::StrCat(from[part]->size(), " bytes for ", t.tokens, " tokens of ",
                                    t.kv_heads, " KV heads of ", row, " bytes"));
    }
    parts[part].resize(from[part]->size());
    for (uint32_t i = 0; i < t.tokens; ++i) {
      for (uint32_t h = 0; h < t.kv_heads; ++h) {
        std::memcpy(parts[part].data() + (size_t{i} * t.kv_heads + h) * row,
                    from[part]->data() + (size_t{h} * t.tokens + i) * row, row);
      }
    }
  }
  return WriteTraceFile({t.model, t.layer, t.scale, t.tokens, t.kv_heads, t.heads, t.head_dim,
                         t.dtype, parts[0], parts[1], t.q_train, t.q_train_pos, t.q, t.q_pos},
                        path);
}

absl::StatusOr<std::vector<std::string>> ListTraces(const std::string& directory) {
  std::error_code error;
  std::vector<std::string> out;
  std::filesystem::directory_iterator at(directory, error);
  for (; !error && at != std::filesystem::directory_iterator(); at.increment(error)) {
    if (at->path().extension() == kEnding) out.push_back(at->path().string());
  }
  if (error) return absl::NotFoundError(absl::StrCat(directory, ": ", error.message()));
  if (out.empty()) {
    return absl::NotFoundError(absl::StrCat(directory, ": no file that ends in ", kEnding));
  }
  std::sort(out.begin(), out.end());
  return out;
}

}  // namespace quarry::perf
