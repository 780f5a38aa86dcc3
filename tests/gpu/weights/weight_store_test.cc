// The store of weights on a device whose uploads are as late as they may be: what is used before
// it is waited for, or overwritten before it was used, shows.
#include "gpu/weights/weight_store.h"

#include <gtest/gtest.h>

#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "tests/gpu/cuda/memory_device.h"
#include "tests/support/seed.h"

namespace quarry {
namespace {

class LateDevice final : public testing::MemoryDevice {
 public:
  UploadTicket StartUpload(void* to, std::span<const std::byte> from) override {
    std::memset(to, 0xff, from.size());
    started.push_back({to, from});
    return started.size();
  }
  void WaitFor(UploadTicket upload) override {
    for (; done < upload; ++done) {
      std::memcpy(started[done].to, started[done].from.data(), started[done].from.size());
    }
  }
  DType WeightDType(DType stored) const override { return stored; }

  struct Upload {
    void* to;
    std::span<const std::byte> from;
  };
  std::vector<Upload> started;
  size_t done = 0;
};

class WeightStoreTest : public ::testing::Test {
 protected:
  // Units of two matrices each; `values_` has what they hold.
  void MakeUnits(size_t count) {
    std::vector<StoredUnit> units;
    for (size_t u = 0; u < count; ++u) {
      StoredUnit& unit = units.emplace_back();
      for (const size_t rows : {size_t{3}, 5 + u % 2}) {
        std::vector<std::byte>& bytes = values_.emplace_back(rows * 7 * 2);
        for (std::byte& b : bytes) b = static_cast<std::byte>(random_());
        unit.push_back({"w" + std::to_string(u), {{bytes, DType::kBf16, rows}}, 7});
      }
    }
    units_ = std::move(units);
  }

  std::unique_ptr<WeightStore> MakeStore(const std::vector<bool>& streamed) {
    Residence residence;
    residence.streamed = streamed;
    size_t count = 0;
    for (size_t u = 0; u < streamed.size(); ++u) {
      if (!streamed[u]) continue;
      ++count;
      residence.slot_bytes = std::max(residence.slot_bytes, UnitBytes(device_, units_[u]));
    }
    residence.slots = static_cast<uint32_t>(std::min<size_t>(2, count));
    auto store = WeightStore::Create(&device_, units_, residence);
    EXPECT_TRUE(store.ok()) << store.status();
    return *std::move(store);
  }

  void UseAndExpect(WeightStore* store, size_t unit) {
    store->Use(unit);
    const std::vector<DeviceMatrix> matrices = store->Borrow(unit);
    ASSERT_EQ(matrices.size(), 2u);
    for (size_t i = 0; i < 2; ++i) {
      const std::vector<std::byte>& want = values_[2 * unit + i];
      ASSERT_EQ(matrices[i].data.bytes(), want.size());
      ASSERT_EQ(0, std::memcmp(matrices[i].data.raw(), want.data(), want.size())) << unit;
    }
  }

  LateDevice device_;
  std::vector<StoredUnit> units_;
  std::vector<std::vector<std::byte>> values_;
  std::mt19937_64 random_{Seed()};
};

TEST_F(WeightStoreTest, UnitsAreThereInAnyOrder) {
  MakeUnits(9);
  for (int round = 0; round < 30; ++round) {
    std::vector<bool> streamed(9);
    for (size_t u = 0; u < 9; ++u) streamed[u] = random_() % 3 != 0;
    const auto store = MakeStore(streamed);
    for (int pass = 0; pass < 3; ++pass) {
      for (size_t u = 0; u < 9; ++u) ASSERT_NO_FATAL_FAILURE(UseAndExpect(store.get(), u));
    }
    for (int i = 0; i < 50; ++i) {
      ASSERT_NO_FATAL_FAILURE(UseAndExpect(store.get(), random_() % 9));
    }
  }
}

TEST_F(WeightStoreTest, EachStreamedUnitComesOnceAPassAndBeforeItIsUsed) {
  MakeUnits(8);
  for (const std::vector<bool>& streamed : {std::vector<bool>(8, true),
                                            {false, true, false, true, false, true, false, true},
                                            {true, true, false, false, true, true, false, false}}) {
    device_.started.clear();
    device_.done = 0;
    const auto store = MakeStore(streamed);
    size_t count = 0;
    for (const bool s : streamed) count += s;
    for (size_t u = 0; u < 8; ++u) store->Use(u);
    for (int pass = 1; pass < 4; ++pass) {
      for (size_t u = 0; u < 8; ++u) {
        const size_t before = device_.started.size();
        store->Use(u);
        // What it waited for had been started when another was in use; the next has been started.
        if (streamed[u]) {
          EXPECT_LE(device_.done, before) << u;
        }
      }
      EXPECT_LE(device_.started.size(), count * (pass + 1) + 2);
    }
  }
}

TEST_F(WeightStoreTest, ResidentUnitsNeverMove) {
  MakeUnits(4);
  const auto store = MakeStore(std::vector<bool>(4, false));
  for (size_t u = 0; u < 4; ++u) ASSERT_NO_FATAL_FAILURE(UseAndExpect(store.get(), u));
  EXPECT_TRUE(device_.started.empty());
}

TEST_F(WeightStoreTest, AnOddNumberTakesTurnsToo) {
  MakeUnits(5);
  const auto store = MakeStore(std::vector<bool>(5, true));
  for (int pass = 0; pass < 5; ++pass) {
    for (size_t u = 0; u < 5; ++u) ASSERT_NO_FATAL_FAILURE(UseAndExpect(store.get(), u));
  }
  EXPECT_LE(device_.started.size(), 5u * 5 + 2);
}

}  // namespace
}  // namespace quarry
