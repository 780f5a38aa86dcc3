// Memory that a thread uses again and again.
#pragma once

#include <cstddef>
#include <memory>
#include <new>
#include <span>

namespace quarry {

// Room for n values of T, uninitialised and 64-byte aligned; what it held is lost where it grows.
template <typename T>
class Scratch {
 public:
  T* Take(size_t n) {
    if (n > capacity_) {
      capacity_ = n + n / 2;
      data_.reset(static_cast<T*>(::operator new(capacity_ * sizeof(T), kAlignment)));
    }
    size_ = n;
    return data_.get();
  }
  // To fewer values than it has.
  void Shrink(size_t n) { size_ = n; }
  T* data() const { return data_.get(); }
  size_t size() const { return size_; }
  size_t bytes() const { return capacity_ * sizeof(T); }
  T& operator[](size_t i) const { return data_.get()[i]; }
  std::span<T> all() const { return {data_.get(), size_}; }

 private:
  static constexpr std::align_val_t kAlignment{64};
  struct Free {
    void operator()(T* p) const { ::operator delete(p, kAlignment); }
  };
  std::unique_ptr<T, Free> data_;
  size_t capacity_ = 0, size_ = 0;
};

}  // namespace quarry
