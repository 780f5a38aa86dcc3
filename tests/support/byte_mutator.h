// Small changes to valid bytes, for fuzz targets.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <random>
#include <span>

namespace quarry::testing {

// Changes by seed: flipped bits, other bytes, numbers near what they were and near the edges of
// their types, stretches copied from elsewhere, zeros. One thread's.
class ByteMutator {
 public:
  explicit ByteMutator(uint64_t seed) : random_(seed) {}

  uint64_t Below(uint64_t n) { return random_() % n; }

  // One change, of at most 64 bytes.
  void Change(std::span<std::byte> bytes) {
    const size_t at = Below(bytes.size());
    const std::span<std::byte> here = bytes.subspan(at);
    switch (Below(6)) {
      case 0:
        here[0] ^= std::byte{static_cast<uint8_t>(1u << Below(8))};
        break;
      case 1:
        here[0] = static_cast<std::byte>(random_());
        break;
      case 2:
        ChangeNumber<uint32_t>(here);
        break;
      case 3:
        ChangeNumber<uint64_t>(here);
        break;
      case 4: {
        const std::span<std::byte> from = bytes.subspan(Below(bytes.size()));
        const size_t n = std::min({size_t{1} + Below(64), here.size(), from.size()});
        std::memmove(here.data(), from.data(), n);
        break;
      }
      default:
        std::memset(here.data(), 0, std::min<size_t>(1 + Below(64), here.size()));
        break;
    }
  }

 private:
  template <typename T>
  void ChangeNumber(std::span<std::byte> here) {
    if (here.size() < sizeof(T)) return;
    T value;
    std::memcpy(&value, here.data(), sizeof(value));
    switch (Below(5)) {
      case 0:
        value += static_cast<T>(Below(8)) - 4;
        break;
      case 1:
        value = static_cast<T>(~T{0} - Below(5000));
        break;
      case 2:
        value = static_cast<T>(T{1} << Below(8 * sizeof(T)));
        break;
      case 3:
        value += static_cast<T>((Below(9) - 4) * 4096);  // sectors
        break;
      default:
        value = static_cast<T>(random_());
        break;
    }
    std::memcpy(here.data(), &value, sizeof(value));
  }

  std::mt19937_64 random_;
};

}  // namespace quarry::testing
