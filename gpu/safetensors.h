// Safetensors files, mapped and checked before anything is used.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace quarry {

enum class TensorDType { kBf16, kFp16, kFp32, kInt32, kInt64 };

// Borrowed from the file's mapping.
struct TensorView {
  TensorDType dtype = TensorDType::kFp32;
  std::vector<uint64_t> shape;
  std::span<const std::byte> bytes;
  uint64_t elements() const;
  // Element i widened to fp32; integers are cast.
  float at(uint64_t i) const;
  int64_t integer(uint64_t i) const;  // element i of integers, exactly
};

// One file. InvalidArgument names the file, the tensor and the numbers: a header longer than the
// file or 100 MB, malformed JSON, unknown dtypes, offsets that overlap, leave holes, run out of
// the file or do not fit the shape, duplicate names.
class SafetensorsFile {
 public:
  static absl::StatusOr<std::unique_ptr<SafetensorsFile>> Open(const std::string& path);
  ~SafetensorsFile();
  SafetensorsFile(const SafetensorsFile&) = delete;
  SafetensorsFile& operator=(const SafetensorsFile&) = delete;

  const std::string& path() const { return path_; }
  std::span<const std::byte> file_bytes() const { return file_; }
  const std::map<std::string, TensorView>& tensors() const { return tensors_; }
  const std::map<std::string, std::string>& metadata() const { return metadata_; }
  // NotFound names the file and the tensor.
  absl::StatusOr<TensorView> Find(std::string_view name) const;

 private:
  SafetensorsFile() = default;
  absl::Status Parse();

  std::string path_;
  std::span<const std::byte> file_;
  std::map<std::string, TensorView> tensors_;
  std::map<std::string, std::string> metadata_;
};

// Writes a file of this format, the tensors in the order given. A reader sees the whole file or the
// one before it. InvalidArgument names a tensor whose bytes do not fit its shape;
// Unavailable a file that cannot be written.
absl::Status WriteSafetensors(const std::string& path,
                              std::span<const std::pair<std::string, TensorView>> tensors,
                              const std::map<std::string, std::string>& metadata);

// A model's tensors: model.safetensors, or the shards that model.safetensors.index.json names.
class WeightFiles {
 public:
  // InvalidArgument names the index, the tensor and the file where they disagree, and a tensor
  // that stands in two files; NotFound a file.
  static absl::StatusOr<WeightFiles> Open(const std::string& directory);
  absl::StatusOr<TensorView> Find(std::string_view name) const;
  // In the order of their names.
  const std::vector<std::unique_ptr<SafetensorsFile>>& files() const { return files_; }

 private:
  std::vector<std::unique_ptr<SafetensorsFile>> files_;
  std::map<std::string, const SafetensorsFile*, std::less<>> where_;
};

}  // namespace quarry
