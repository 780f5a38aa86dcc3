// The store of weights on a device whose uploads are as late as they may be: what is used before
// it is waited for, or overwritten before it was used, shows.
#include "gpu/weights/weight_store.h"

#include <gtest/gtest.h>

#include <cstring>
#include <optional>
#include <random>
#include <string>
#include <vector>

#include "proto/check.h"
#include "tests/gpu/cuda/memory_device.h"
#include "tests/support/seed.h"

namespace quarry {
namespace {

class LateDevice final : public testing::MemoryDevice {
 public:
  absl::StatusOr<DeviceBuffer> AllocateSpare(size_t bytes, size_t leave_free,
                                             std::string_view what) override {
    if (bytes + leave_free > spare) return absl::ResourceExhaustedError("none");
    spare -= bytes;
    return Allocate(bytes, what);
  }
  void Release(void* data, size_t bytes) override {
    for (size_t i = done; i < started.size(); ++i) QUARRY_CHECK(started[i].to != data);
    std::memset(data, 0xff, bytes);
    MemoryDevice::Release(data, bytes);
  }
  using Device::TakeSpareBack;

  UploadTicket StartUpload(void* to, std::span<const std::byte> from) override {
    if (fails > 0) {
      --fails;
      return 0;
    }
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
  size_t spare = 0;  // bytes
  size_t fails = 0;  // uploads to come that do
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

  std::unique_ptr<WeightStore> MakeStore(const std::vector<bool>& streamed,
                                         std::optional<uint64_t> leave_free = std::nullopt) {
    Residence residence;
    residence.streamed = streamed;
    size_t count = 0;
    for (size_t u = 0; u < streamed.size(); ++u) {
      if (!streamed[u]) continue;
      ++count;
      residence.slot_bytes = std::max(residence.slot_bytes, UnitBytes(device_, units_[u]));
    }
    residence.slots = static_cast<uint32_t>(std::min<size_t>(2, count));
    auto store = WeightStore::Create(&device_, units_, residence, leave_free);
    EXPECT_TRUE(store.ok()) << store.status();
    return *std::move(store);
  }

  void UseAndExpect(WeightStore* store, size_t unit) {
    store->Use(unit);
    Expect(store, unit);
  }
  void Pass(WeightStore* store) {
    for (size_t u = 0; u < units_.size(); ++u) ASSERT_NO_FATAL_FAILURE(UseAndExpect(store, u));
  }
  // The unit that was used last.
  void Expect(WeightStore* store, size_t unit) {
    const std::vector<DeviceMatrix> matrices = store->Borrow(unit);
    ASSERT_EQ(matrices.size(), 2u);
    ASSERT_EQ(matrices[0].data.raw(), store->At(unit));
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

TEST_F(WeightStoreTest, UnitsStayInSpareMemoryUntilItIsTakenBack) {
  MakeUnits(9);
  const std::vector<bool> streamed = {true, true, false, true, true, true, false, true, true};
  const size_t unit = UnitBytes(device_, units_[0]);  // no unit is larger
  device_.spare = 100 * unit;
  const auto store = MakeStore(streamed, 7);
  ASSERT_NO_FATAL_FAILURE(Pass(store.get()));
  EXPECT_EQ(device_.started.size(), 7u);
  EXPECT_EQ(store->spare_bytes(), 5 * unit);  // the other two stay in the slots
  const uint64_t moves = store->moves();
  for (int pass = 0; pass < 3; ++pass) ASSERT_NO_FATAL_FAILURE(Pass(store.get()));
  EXPECT_EQ(device_.started.size(), 7u);
  EXPECT_EQ(store->moves(), moves);
  // In the midst of a pass: the unit in use stays where it is.
  device_.spare = 0;
  store->Use(3);
  while (device_.TakeSpareBack()) ASSERT_NO_FATAL_FAILURE(Expect(store.get(), 3));
  EXPECT_GT(store->moves(), moves);
  EXPECT_LE(store->spare_bytes(), unit);
  for (int pass = 0; pass < 3; ++pass) ASSERT_NO_FATAL_FAILURE(Pass(store.get()));
  // All are streamed again, also the one that was used last.
  device_.spare = 100 * unit;
  ASSERT_NO_FATAL_FAILURE(Pass(store.get()));
  device_.spare = 0;
  for (size_t u = 0; u < 9; ++u) {
    store->Use(u);
    while (device_.TakeSpareBack()) ASSERT_NO_FATAL_FAILURE(Expect(store.get(), u));
  }
  store->UseNone();
  while (device_.TakeSpareBack()) continue;
  EXPECT_EQ(store->spare_bytes(), 0u);
  const size_t before = device_.started.size();
  ASSERT_NO_FATAL_FAILURE(Pass(store.get()));
  EXPECT_GE(device_.started.size(), before + 6);
}

TEST_F(WeightStoreTest, APartOfThemStaysWhereThereIsRoomForAPart) {
  MakeUnits(8);
  const size_t unit = UnitBytes(device_, units_[0]);
  for (const size_t room : {1, 2, 3, 5}) {
    device_.started.clear();
    device_.done = 0;
    device_.spare = room * unit + 5;
    const auto store = MakeStore(std::vector<bool>(8, true), 5);
    for (int pass = 0; pass < 3; ++pass) ASSERT_NO_FATAL_FAILURE(Pass(store.get()));
    EXPECT_EQ(store->spare_bytes(), room * unit);
    // The two slots' units come once a pass each, the others stay.
    EXPECT_LE(device_.started.size(), 8 + 2 * (8 - room) + 2);
    // Every one comes while another is in use.
    for (size_t u = 0; u < 8; ++u) {
      const size_t before = device_.started.size();
      store->Use(u);
      EXPECT_LE(device_.done, before) << u;
    }
  }
}

TEST_F(WeightStoreTest, SpareMemoryComesAndGoesAtAnyTime) {
  MakeUnits(9);
  const size_t unit = UnitBytes(device_, units_[0]);
  for (int round = 0; round < 30; ++round) {
    std::vector<bool> streamed(9);
    for (size_t u = 0; u < 9; ++u) streamed[u] = random_() % 3 != 0;
    device_.started.clear();
    device_.done = 0;
    const auto store = MakeStore(streamed, 3);
    size_t last = 0;
    for (int i = 0; i < 200; ++i) {
      device_.spare = random_() % 4 * unit + 3;
      last = random_() % 3 == 0 ? random_() % 9 : (last + 1) % 9;
      ASSERT_NO_FATAL_FAILURE(UseAndExpect(store.get(), last));
      if (random_() % 4 == 0) {
        device_.TakeSpareBack();
        ASSERT_NO_FATAL_FAILURE(Expect(store.get(), last));
      }
    }
  }
}

TEST_F(WeightStoreTest, AnUploadThatFailedIsTriedAgain) {
  MakeUnits(6);
  for (const bool spare : {false, true}) {
    device_.started.clear();
    device_.done = 0;
    device_.spare = 1 << 20;
    const auto store =
        MakeStore(std::vector<bool>(6, true), spare ? std::optional<uint64_t>(0) : std::nullopt);
    device_.fails = 3;
    for (size_t u = 0; u < 6; ++u) store->Use(u);  // what comes of it the device says
    ASSERT_NO_FATAL_FAILURE(Pass(store.get()));
    // Of one that is used again at once, as where a pass failed at its beginning.
    const auto other = MakeStore(std::vector<bool>(6, true));
    device_.fails = 1;
    other->Use(0);
    ASSERT_NO_FATAL_FAILURE(Pass(other.get()));
  }
}

TEST_F(WeightStoreTest, ASecondStoreOfADeviceHasNoSpareMemory) {
  MakeUnits(6);
  device_.spare = 1 << 20;
  auto first = MakeStore(std::vector<bool>(6, true), 0);
  {
    const auto second = MakeStore(std::vector<bool>(6, true), 0);
    ASSERT_NO_FATAL_FAILURE(Pass(second.get()));
    ASSERT_NO_FATAL_FAILURE(Pass(first.get()));
    EXPECT_EQ(second->spare_bytes(), 0u);
    EXPECT_GT(first->spare_bytes(), 0u);
  }
  EXPECT_TRUE(device_.TakeSpareBack());
  first.reset();
  EXPECT_FALSE(device_.TakeSpareBack());
  const auto third = MakeStore(std::vector<bool>(6, true), 0);
  ASSERT_NO_FATAL_FAILURE(Pass(third.get()));
  EXPECT_GT(third->spare_bytes(), 0u);
}

}  // namespace
}  // namespace quarry
