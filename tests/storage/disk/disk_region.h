// A stretch of a disk beside what it should hold.
#pragma once

#include <algorithm>
#include <cstring>
#include <random>
#include <span>
#include <string>
#include <vector>

#include <gtest/gtest.h>

#include "storage/disk/aligned_buffer.h"
#include "storage/disk/disk.h"

namespace quarry::testing {

// Sectors [first, first + sectors) of a disk, and what they should be. One thread's.
class DiskRegion {
 public:
  DiskRegion(Disk& disk, uint64_t first, uint64_t sectors, uint64_t seed)
      : disk_(disk), offset_(first * kSectorBytes), sectors_(sectors), random_(seed) {
    memory_ = AlignedBuffer(sectors * kSectorBytes);
    model_.assign(sectors * kSectorBytes, '\0');
  }

  void WriteAll() { Write(0, sectors_); }
  void ReadAll() { Read(0, sectors_); }
  void WriteOrReadSome() {
    const uint64_t first = random_() % sectors_;
    const uint64_t most = random_() % 4 == 0 ? sectors_ - first : 8;
    const uint64_t sectors = random_() % std::min(most, sectors_ - first) + 1;
    random_() % 2 == 0 ? Write(first, sectors) : Read(first, sectors);
  }

 private:
  // Pieces of random lengths at random places of the memory, none upon another.
  std::vector<std::span<std::byte>> Scatter(uint64_t sectors) {
    std::vector<std::span<std::byte>> pieces;
    uint64_t first = random_() % (sectors_ - sectors + 1);
    while (sectors > 0) {
      const uint64_t taken = random_() % std::min<uint64_t>(sectors, 1 + random_() % 64) + 1;
      pieces.push_back(memory_.bytes().subspan(first * kSectorBytes, taken * kSectorBytes));
      first += taken;
      sectors -= taken;
    }
    std::shuffle(pieces.begin(), pieces.end(), random_);
    return pieces;
  }

  void Write(uint64_t first, uint64_t sectors) {
    std::vector<std::span<const std::byte>> pieces;
    uint64_t at = first * kSectorBytes;
    for (std::span<std::byte> piece : Scatter(sectors)) {
      for (size_t i = 0; i < piece.size(); i += 512) piece[i] = static_cast<std::byte>(random_());
      std::memcpy(model_.data() + at, piece.data(), piece.size());
      at += piece.size();
      pieces.push_back(piece);
    }
    const absl::Status status = disk_.Write(offset_ + first * kSectorBytes, pieces);
    ASSERT_TRUE(status.ok()) << status;
  }

  void Read(uint64_t first, uint64_t sectors) {
    const auto pieces = Scatter(sectors);
    for (std::span<std::byte> piece : pieces) std::memset(piece.data(), 0xee, piece.size());
    const absl::Status status = disk_.Read(offset_ + first * kSectorBytes, pieces);
    ASSERT_TRUE(status.ok()) << status;
    uint64_t at = first * kSectorBytes;
    for (std::span<std::byte> piece : pieces) {
      ASSERT_EQ(std::memcmp(model_.data() + at, piece.data(), piece.size()), 0)
          << piece.size() << " bytes at " << offset_ + at;
      at += piece.size();
    }
  }

  Disk& disk_;
  const uint64_t offset_;
  const uint64_t sectors_;
  std::mt19937_64 random_;
  AlignedBuffer memory_;
  std::string model_;
};

}  // namespace quarry::testing
