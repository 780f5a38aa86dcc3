#include "storage/arena.h"

#include <fcntl.h>
#include <linux/falloc.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <map>
#include <random>
#include <set>
#include <thread>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#ifndef F_SEAL_FUTURE_WRITE
#define F_SEAL_FUTURE_WRITE 0x0010
#endif

namespace quarry {
namespace {

using ::testing::HasSubstr;

constexpr uint64_t kMiB = 1 << 20;

ArenaOptions Small() {
  ArenaOptions options;
  options.capacity_bytes = 16 * kMiB;
  options.extent_bytes = 2 * kMiB;
  options.huge_pages = ArenaOptions::HugePages::kNever;
  options.spare_bytes = 0;
  return options;
}

std::unique_ptr<Arena> Make(const ArenaOptions& options) {
  auto arena = Arena::Create(options);
  EXPECT_TRUE(arena.ok()) << arena.status();
  return *std::move(arena);
}

ArenaSlot Take(Arena& arena, std::string_view tenant, uint64_t bytes) {
  auto slot = arena.Allocate(tenant, bytes);
  EXPECT_TRUE(slot.ok()) << slot.status();
  return slot.value_or(ArenaSlot{});
}

TEST(ArenaTest, ImpossibleOptionsAreRefusedByName) {
  ArenaOptions options = Small();
  options.capacity_bytes = 100;
  EXPECT_THAT(std::string(Arena::Create(options).status().message()), HasSubstr("capacity_bytes is 100"));
  options = Small();
  options.extent_bytes = 0;
  EXPECT_THAT(std::string(Arena::Create(options).status().message()), HasSubstr("extent_bytes is 0"));
}

TEST(ArenaTest, SlotsAreAlignedAndDisjoint) {
  auto arena = Make(Small());
  std::map<std::byte*, uint64_t> taken;
  for (uint64_t bytes : {1ull, 63ull, 64ull, 65ull, 1000ull, 4095ull, 4096ull, 4097ull, 300000ull}) {
    for (int i = 0; i < 5; ++i) {
      const ArenaSlot slot = Take(*arena, "t", bytes);
      EXPECT_EQ(slot.bytes, bytes);
      EXPECT_GE(slot.slot_bytes, bytes);
      const auto address = reinterpret_cast<uintptr_t>(slot.data);
      EXPECT_EQ(address % (bytes < 4096 ? 64 : 4096), 0u) << bytes;
      EXPECT_TRUE(taken.emplace(slot.data, slot.slot_bytes).second);
    }
  }
  for (auto it = taken.begin(); std::next(it) != taken.end(); ++it) {
    EXPECT_LE(it->first + it->second, std::next(it)->first);
  }
}

TEST(ArenaTest, ANeighboursPageIsNeverPartOfASlotOfAPageOrMore) {
  auto arena = Make(Small());
  for (uint64_t bytes : {4096ull, 5000ull, 70000ull}) {
    const ArenaSlot slot = Take(*arena, "t", bytes);
    EXPECT_EQ(slot.offset % 4096, 0u);
    EXPECT_EQ(slot.slot_bytes % 4096, 0u);
  }
}

TEST(ArenaTest, AClientsDescriptorCanOnlyBeRead) {
  auto arena = Make(Small());
  const ArenaSlot slot = Take(*arena, "t", 5000);
  std::memset(slot.data, 'x', 5000);
  auto info = arena->ExtentDescriptor("t", slot.extent);
  ASSERT_TRUE(info.ok());
  const int fd = info->fd;
  EXPECT_EQ(mmap(nullptr, info->bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0), MAP_FAILED);
  EXPECT_EQ(errno, EPERM);
  EXPECT_EQ(mmap(nullptr, info->bytes, PROT_WRITE, MAP_SHARED, fd, 0), MAP_FAILED);
  EXPECT_EQ(ftruncate(fd, 0), -1);
  EXPECT_EQ(errno, EPERM);
  EXPECT_EQ(ftruncate(fd, static_cast<off_t>(info->bytes * 2)), -1);
  EXPECT_EQ(fcntl(fd, F_ADD_SEALS, F_SEAL_WRITE), -1);
  EXPECT_EQ(errno, EPERM);
  EXPECT_EQ(pwrite(fd, "y", 1, 0), -1);
  EXPECT_EQ(errno, EPERM);
  EXPECT_EQ(fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 0, 4096), -1);
  EXPECT_EQ(errno, EPERM);
  EXPECT_EQ(fcntl(fd, F_GET_SEALS),
            F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_FUTURE_WRITE | F_SEAL_SEAL);
  // Opened anew through /proc it is no different.
  const int again = open(("/proc/self/fd/" + std::to_string(fd)).c_str(), O_RDWR | O_CLOEXEC);
  ASSERT_GE(again, 0);
  EXPECT_EQ(mmap(nullptr, 4096, PROT_WRITE, MAP_SHARED, again, 0), MAP_FAILED);
  close(again);

  void* read_only = mmap(nullptr, info->bytes, PROT_READ, MAP_SHARED, fd, 0);
  ASSERT_NE(read_only, MAP_FAILED);
  EXPECT_EQ(std::memcmp(static_cast<char*>(read_only) + slot.offset, slot.data, 5000), 0);
  EXPECT_EQ(mprotect(read_only, info->bytes, PROT_READ | PROT_WRITE), -1);
  // The arena goes on writing, and the client sees it.
  std::memset(slot.data, 'z', 5000);
  EXPECT_EQ(static_cast<char*>(read_only)[slot.offset + 4999], 'z');
  munmap(read_only, info->bytes);
}

TEST(ArenaTest, AnExtentIsItsTenantsAlone) {
  auto arena = Make(Small());
  const ArenaSlot a = Take(*arena, "alice", 4096), b = Take(*arena, "bob", 4096);
  EXPECT_NE(a.extent, b.extent);
  EXPECT_TRUE(arena->ExtentDescriptor("alice", a.extent).ok());
  EXPECT_TRUE(absl::IsNotFound(arena->ExtentDescriptor("bob", a.extent).status()));
  EXPECT_TRUE(absl::IsNotFound(arena->ExtentDescriptor("alice", b.extent).status()));
  EXPECT_TRUE(absl::IsNotFound(arena->ExtentDescriptor("", a.extent).status()));
  EXPECT_TRUE(absl::IsNotFound(arena->ExtentDescriptor("alice", 12345).status()));
}

TEST(ArenaTest, MemoryOfOneTenantNeverServesAnother) {
  ArenaOptions options = Small();
  options.capacity_bytes = 4 * kMiB;
  options.spare_bytes = 4 * kMiB;
  auto arena = Make(options);
  // Alice fills everything with her bytes and lets it all go.
  std::vector<ArenaSlot> hers;
  for (int i = 0; i < 4; ++i) hers.push_back(Take(*arena, "alice", kMiB));
  EXPECT_TRUE(absl::IsResourceExhausted(arena->Allocate("alice", kMiB).status()));
  for (const ArenaSlot& slot : hers) std::memset(slot.data, 'A', kMiB);
  for (const ArenaSlot& slot : hers) arena->Free(slot);
  EXPECT_EQ(arena->Stats().spare_bytes, 4 * kMiB);
  std::set<uint32_t> her_extents;
  for (const ArenaSlot& slot : hers) her_extents.insert(slot.extent);
  // Whatever Bob gets is new: zero bytes, other extents.
  for (int i = 0; i < 4; ++i) {
    const ArenaSlot his = Take(*arena, "bob", kMiB);
    EXPECT_FALSE(her_extents.contains(his.extent));
    for (uint64_t at = 0; at < his.slot_bytes; ++at) ASSERT_EQ(his.data[at], std::byte{0});
  }
  for (uint32_t extent : her_extents) {
    EXPECT_TRUE(absl::IsNotFound(arena->ExtentDescriptor("bob", extent).status()));
  }
}

TEST(ArenaTest, TheCapacityIsAHardLimitRefusedWithNumbers) {
  auto arena = Make(Small());
  std::vector<ArenaSlot> slots;
  while (true) {
    auto slot = arena->Allocate("t", 3 * kMiB);
    if (!slot.ok()) {
      EXPECT_TRUE(absl::IsResourceExhausted(slot.status()));
      EXPECT_THAT(std::string(slot.status().message()), HasSubstr("3145728"));
      EXPECT_THAT(std::string(slot.status().message()), HasSubstr("1048576 bytes left of 16777216"));
      break;
    }
    slots.push_back(*slot);
    ASSERT_LE(arena->Stats().extent_bytes, 16 * kMiB);
  }
  EXPECT_EQ(slots.size(), 5u);
  // What is left serves smaller slots, to the last page.
  uint64_t small = 0;
  while (arena->Allocate("t", 4096).ok()) ++small;
  EXPECT_EQ(small, 256u);
  EXPECT_EQ(arena->Stats().extent_bytes, 16 * kMiB);
  EXPECT_EQ(arena->Stats().used_bytes, 16 * kMiB);
}

TEST(ArenaTest, WhollyFreeExtentsGoBackToTheSystem) {
  auto arena = Make(Small());
  std::vector<ArenaSlot> slots;
  for (int i = 0; i < 16; ++i) slots.push_back(Take(*arena, "t", kMiB));
  EXPECT_EQ(arena->Stats().extent_bytes, 16 * kMiB);
  std::map<uint32_t, int> of_extent;
  for (const ArenaSlot& slot : slots) ++of_extent[slot.extent];
  for (const ArenaSlot& slot : slots) {
    arena->Free(slot);
    if (--of_extent[slot.extent] == 0) {
      EXPECT_TRUE(absl::IsNotFound(arena->ExtentDescriptor("t", slot.extent).status()));
    } else {
      EXPECT_TRUE(arena->ExtentDescriptor("t", slot.extent).ok());
    }
  }
  const ArenaStats stats = arena->Stats();
  EXPECT_EQ(stats.extent_bytes, 0u);
  EXPECT_EQ(stats.extents, 0u);
  EXPECT_EQ(stats.committed_bytes, 0u);
  EXPECT_EQ(stats.given_back_bytes, 16 * kMiB);
  EXPECT_EQ(stats.used_bytes, 0u);
  EXPECT_EQ(arena->SupplyOf("t", kMiB).room_bytes, 16 * kMiB);
}

TEST(ArenaTest, SparesAreReusedByTheirTenantAndGivenUpToOthers) {
  ArenaOptions options = Small();
  options.spare_bytes = 4 * kMiB;
  auto arena = Make(options);
  std::vector<ArenaSlot> slots;
  for (int i = 0; i < 8; ++i) slots.push_back(Take(*arena, "t", 2 * kMiB));
  for (const ArenaSlot& slot : slots) arena->Free(slot);
  EXPECT_EQ(arena->Stats().spare_bytes, 4 * kMiB);
  EXPECT_EQ(arena->Stats().extent_bytes, 4 * kMiB);
  const uint32_t again = Take(*arena, "t", 2 * kMiB).extent;
  EXPECT_LT(again, 8u);  // not a new one
  EXPECT_EQ(arena->Stats().spare_bytes, 2 * kMiB);
  // 14 MiB are not in use; another tenant can have them all, spares included.
  for (int i = 0; i < 7; ++i) Take(*arena, "other", 2 * kMiB);
  EXPECT_EQ(arena->Stats().spare_bytes, 0u);
  EXPECT_EQ(arena->Stats().committed_bytes, 16 * kMiB);
  // 12 MiB beyond the spares, and the spare extent that made room for the other tenant.
  EXPECT_EQ(arena->Stats().given_back_bytes, 14 * kMiB);
  EXPECT_TRUE(absl::IsResourceExhausted(arena->Allocate("other", 2 * kMiB).status()));
}

TEST(ArenaTest, ARareSizeHoldsLittleAndACommonOneGrowsByDoubling) {
  ArenaOptions options = Small();
  options.capacity_bytes = 512 * kMiB;
  options.extent_bytes = 64 * kMiB;
  options.prefault = false;
  auto arena = Make(options);
  Take(*arena, "t", 100);
  EXPECT_EQ(arena->Stats().extent_bytes, 2 * kMiB);
  for (int i = 0; i < 200; ++i) Take(*arena, "t", kMiB);
  EXPECT_LE(arena->Stats().extents, 12u);
  EXPECT_LE(arena->Stats().extent_bytes, 402 * kMiB);
}

TEST(ArenaTest, AFreedSlotCannotBeFreedAgain) {
  auto arena = Make(Small());
  const ArenaSlot slot = Take(*arena, "t", 4096), other = Take(*arena, "t", 4096);
  arena->Free(slot);
  EXPECT_DEATH(arena->Free(slot), "QUARRY_CHECK");
  arena->Free(other);
}

TEST(ArenaTest, ADescriptorStaysItsExtentsWhileItIsPassedOn) {
  auto arena = Make(Small());
  const ArenaSlot slot = Take(*arena, "alice", kMiB);
  slot.data[0] = std::byte{'A'};
  auto info = arena->ExtentDescriptor("alice", slot.extent);
  ASSERT_TRUE(info.ok());
  arena->Free(slot);
  const ArenaSlot bobs = Take(*arena, "bob", kMiB);
  bobs.data[0] = std::byte{'B'};
  // The number is not Bob's extent, although Alice's is gone.
  char byte = 0;
  ASSERT_EQ(pread(info->fd, &byte, 1, 0), 1);
  EXPECT_EQ(byte, 'A');
}

TEST(ArenaTest, MemoryIsFaultedInBeforeItIsHandedOut) {
  auto arena = Make(Small());
  const ArenaSlot slot = Take(*arena, "t", 2 * kMiB);
  std::vector<unsigned char> resident(slot.slot_bytes / 4096);
  ASSERT_EQ(mincore(slot.data, slot.slot_bytes, resident.data()), 0);
  for (unsigned char page : resident) ASSERT_EQ(page & 1, 1);
}

TEST(ArenaTest, HugePagesOrAFallbackThatIsCounted) {
  ArenaOptions options = Small();
  options.huge_pages = ArenaOptions::HugePages::kTry;
  auto arena = Make(options);
  const ArenaSlot slot = Take(*arena, "t", 2 * kMiB);
  const ArenaStats stats = arena->Stats();
  const uint64_t page_bytes = arena->ExtentDescriptor("t", slot.extent)->page_bytes;
  if (stats.huge_page_bytes > 0) {
    EXPECT_EQ(page_bytes, 2 * kMiB);
    EXPECT_EQ(stats.huge_page_fallbacks, 0u);
  } else {
    EXPECT_EQ(page_bytes, 4096u);
    EXPECT_EQ(stats.huge_page_fallbacks, 1u);
  }
  std::memset(slot.data, 1, slot.bytes);
  EXPECT_EQ(mmap(nullptr, 2 * kMiB, PROT_WRITE, MAP_SHARED,
                 arena->ExtentDescriptor("t", slot.extent)->fd, 0),
            MAP_FAILED);
}

TEST(ArenaTest, ExtentNumbersAreNeverReused) {
  auto arena = Make(Small());
  uint32_t last = 0;
  for (int i = 0; i < 20; ++i) {
    const ArenaSlot slot = Take(*arena, "t", 2 * kMiB);
    EXPECT_TRUE(i == 0 || slot.extent > last);
    last = slot.extent;
    arena->Free(slot);
  }
}

TEST(ArenaTest, RunningOutOfDescriptorsIsRefusedAndLeavesTheCapacityWhole) {
  // In a child: the limit is the process's.
  const pid_t child = fork();
  if (child == 0) {
    auto arena = Arena::Create(Small());
    const rlimit limit{.rlim_cur = 0, .rlim_max = 0};
    if (setrlimit(RLIMIT_NOFILE, &limit) != 0) _exit(10);
    const absl::Status status = (*arena)->Allocate("t", 4096).status();
    if (!absl::IsResourceExhausted(status)) _exit(11);
    if (status.message().find("LimitNOFILE") == absl::string_view::npos) _exit(12);
    if ((*arena)->SupplyOf("t", 4096).room_bytes != 16 * kMiB) _exit(13);
    _exit(0);
  }
  int status = 0;
  ASSERT_EQ(waitpid(child, &status, 0), child);
  ASSERT_TRUE(WIFEXITED(status));
  EXPECT_EQ(WEXITSTATUS(status), 0);
}

TEST(ArenaTest, ThreadsNeverShareASlotNorExceedTheCapacity) {
  ArenaOptions options = Small();
  options.prefault = false;
  options.spare_bytes = 4 * kMiB;
  auto arena = Make(options);
  std::vector<std::thread> threads;
  for (int t = 0; t < 4; ++t) {
    threads.emplace_back([&, t] {
      const std::string tenant = t % 2 == 0 ? "a" : "b";
      std::mt19937 random(static_cast<uint32_t>(t));
      std::vector<ArenaSlot> mine;
      for (int i = 0; i < 3000; ++i) {
        if (mine.size() < 6 && random() % 2 == 0) {
          auto slot = arena->Allocate(tenant, 1 + random() % (600 << 10));
          if (!slot.ok()) continue;
          std::memset(slot->data, t, 64);
          mine.push_back(*slot);
        } else if (!mine.empty()) {
          ASSERT_EQ(mine.back().data[63], static_cast<std::byte>(t));
          arena->Free(mine.back());
          mine.pop_back();
        }
        ASSERT_LE(arena->Stats().extent_bytes, 16 * kMiB);
      }
      for (const ArenaSlot& slot : mine) arena->Free(slot);
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(arena->Stats().used_bytes, 0u);
  EXPECT_EQ(arena->Stats().extent_bytes, arena->Stats().spare_bytes);
  const ArenaSupply supply = arena->SupplyOf("c", 4096);
  EXPECT_EQ(supply.room_bytes + supply.other_spare_bytes, 16 * kMiB);
  EXPECT_EQ(supply.returning_bytes, 0u);
}

}  // namespace
}  // namespace quarry
