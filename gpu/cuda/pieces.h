// Arrays in one allocation.
#pragma once

#include <cstddef>

namespace quarry::cuda {

// Where they begin, at multiples of 128 bytes.
class Pieces {
 public:
  // Of `count` elements and room for one more, which may be read.
  template <typename T>
  size_t Add(size_t count) {
    const size_t at = bytes_;
    bytes_ += ((count + 1) * sizeof(T) + kAlignment - 1) / kAlignment * kAlignment;
    return at;
  }
  size_t bytes() const { return bytes_; }

 private:
  static constexpr size_t kAlignment = 128;
  size_t bytes_ = 0;
};

// The array at a place.
template <typename T>
T* At(std::byte* memory, size_t place) {
  return reinterpret_cast<T*>(memory + place);
}

}  // namespace quarry::cuda
