// The bytes that an index is kept as: what it is, its version, its data, a checksum.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <span>
#include <string_view>
#include <type_traits>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace quarry {

// "QRYINDEX", the kind in 16 bytes filled up with 0, the version (u32), 0 (u32), how many bytes of
// data follow (u64), the data, and the XXH3-128 of everything before it. Little-endian.
inline constexpr size_t kIndexFormHeaderBytes = 40, kIndexFormDigestBytes = 16;

// The least finite number.
inline constexpr float kAnyNumber = std::numeric_limits<float>::lowest();

class IndexWriter {
 public:
  // kind: at most 16 bytes.
  IndexWriter(std::string_view kind, uint32_t version);

  template <typename T>
  void Put(const T& value) {
    PutAll(std::span<const T>(&value, 1));
  }
  template <typename T>
  void PutAll(std::span<const T> values) {
    static_assert(std::is_trivially_copyable_v<T>);
    const auto* const data = reinterpret_cast<const std::byte*>(values.data());
    bytes_.insert(bytes_.end(), data, data + values.size_bytes());
  }

  std::vector<std::byte> Finish() &&;

 private:
  std::vector<std::byte> bytes_;
};

// Reads what an IndexWriter wrote, in the same order. The bytes outlive it.
class IndexReader {
 public:
  // What kind of index the bytes say they are, without a look at the rest of them; it points into
  // them. DataLoss: not an index's bytes.
  static absl::StatusOr<std::string_view> KindOf(std::span<const std::byte> bytes);
  // DataLoss: cut off, altered, or not an index's bytes. InvalidArgument: of another kind, or of a
  // version that is not `version`.
  static absl::StatusOr<IndexReader> Open(std::string_view kind, uint32_t version,
                                          std::span<const std::byte> bytes);

  // DataLoss if the data end before.
  template <typename T>
  absl::Status Get(T* value) {
    return GetAll(std::span<T>(value, 1));
  }
  template <typename T>
  absl::Status GetAll(std::span<T> values) {
    static_assert(std::is_trivially_copyable_v<T>);
    if (values.size() > left_.size() / sizeof(T)) return Short(values.size() * sizeof(T));
    if (!values.empty()) std::memcpy(values.data(), left_.data(), values.size_bytes());
    left_ = left_.subspan(values.size_bytes());
    return absl::OkStatus();
  }
  // DataLoss if fewer than `count` values of T are left; asked before memory is made for them.
  template <typename T>
  absl::Status Want(uint64_t count) const {
    if (count <= left_.size() / sizeof(T)) return absl::OkStatus();
    constexpr uint64_t kMost = std::numeric_limits<uint64_t>::max();
    return Short(count <= kMost / sizeof(T) ? count * sizeof(T) : kMost);
  }
  // DataLoss if the data end before.
  template <typename T>
  absl::Status Skip(uint64_t count) {
    if (absl::Status status = Want<T>(count); !status.ok()) return status;
    left_ = left_.subspan(count * sizeof(T));
    return absl::OkStatus();
  }
  // Makes `out` so long, if so many are left, and reads it.
  template <typename T>
  absl::Status GetVector(uint64_t count, std::vector<T>* out) {
    if (absl::Status status = Want<T>(count); !status.ok()) return status;
    out->resize(count);
    return GetAll(std::span<T>(*out));
  }
  // The same of finite numbers that are at least `least`; DataLoss, naming them, if one is not.
  absl::Status GetNumbers(std::string_view name, uint64_t count, float least,
                          std::vector<float>* out);
  absl::Status GetNumber(std::string_view name, float least, float* out);
  // The same of finite numbers in bf16.
  absl::Status GetBf16(std::string_view name, uint64_t count, float least,
                       std::vector<uint16_t>* out);
  // Bytes not yet read; look at them before memory is made for what a number read promises.
  size_t left() const { return left_.size(); }
  // DataLoss if anything was not read.
  absl::Status Finish() const;

 private:
  explicit IndexReader(std::span<const std::byte> data) : left_(data) {}
  absl::Status Short(size_t wanted) const;

  std::span<const std::byte> left_;
};

}  // namespace quarry
