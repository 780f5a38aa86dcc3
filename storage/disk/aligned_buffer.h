// Memory that a disk reads into and writes from.
#pragma once

#include <cstddef>
#include <cstring>
#include <memory>
#include <new>
#include <span>
#include <utility>

#include "proto/check.h"
#include "storage/disk/disk.h"

namespace quarry {

// Whole sectors at an address that is a multiple of kSectorBytes, all zeros at first. Empty when
// default-constructed or moved from. Not thread-safe.
class AlignedBuffer {
 public:
  AlignedBuffer() = default;
  // `bytes` is a multiple of kSectorBytes.
  explicit AlignedBuffer(size_t bytes) : size_(bytes) {
    QUARRY_CHECK(bytes % kSectorBytes == 0);
    if (bytes == 0) return;
    data_.reset(static_cast<std::byte*>(::operator new(bytes, kAlignment)));
    std::memset(data_.get(), 0, bytes);
  }
  AlignedBuffer(AlignedBuffer&& other) noexcept
      : data_(std::move(other.data_)), size_(std::exchange(other.size_, 0)) {}
  AlignedBuffer& operator=(AlignedBuffer&& other) noexcept {
    data_ = std::move(other.data_);
    size_ = std::exchange(other.size_, 0);
    return *this;
  }

  std::span<std::byte> bytes() { return {data_.get(), size_}; }
  std::span<const std::byte> bytes() const { return {data_.get(), size_}; }
  size_t size() const { return size_; }

 private:
  static constexpr std::align_val_t kAlignment{kSectorBytes};
  struct Free {
    void operator()(std::byte* data) const { ::operator delete(data, kAlignment); }
  };

  std::unique_ptr<std::byte, Free> data_;
  size_t size_ = 0;
};

}  // namespace quarry
