#include "tests/storage/disk/simulated_disk.h"

#include <algorithm>
#include <bit>
#include <functional>
#include <map>
#include <random>
#include <set>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "storage/disk/aligned_buffer.h"
#include "tests/support/seed.h"

namespace quarry::testing {
namespace {

using ::testing::AnyOf;
using ::testing::Each;
using ::testing::Ge;
using ::testing::HasSubstr;
using ::testing::SizeIs;

using Bytes = std::vector<std::byte>;

constexpr uint64_t kSectors = 256;

SimulatedDiskOptions Small(uint64_t seed = 1) {
  SimulatedDiskOptions options;
  options.bytes = kSectors * kSectorBytes;
  options.seed = seed;
  return options;
}

Bytes Filled(char with, uint64_t sectors = 1) {
  return Bytes(sectors * kSectorBytes, static_cast<std::byte>(with));
}

absl::Status WriteFilled(SimulatedDisk& disk, uint64_t sector, char with, uint64_t sectors = 1) {
  AlignedBuffer buffer(sectors * kSectorBytes);
  std::ranges::fill(buffer.bytes(), static_cast<std::byte>(with));
  const std::span<const std::byte> piece = buffer.bytes();
  return disk.Write(sector * kSectorBytes, {&piece, 1});
}

absl::Status ReadInto(SimulatedDisk& disk, uint64_t sector, AlignedBuffer& buffer) {
  const std::span<std::byte> piece = buffer.bytes();
  return disk.Read(sector * kSectorBytes, {&piece, 1});
}

Bytes ReadBack(SimulatedDisk& disk, uint64_t sector, uint64_t sectors = 1) {
  AlignedBuffer buffer(sectors * kSectorBytes);
  const absl::Status status = ReadInto(disk, sector, buffer);
  EXPECT_TRUE(status.ok()) << status;
  return Bytes(buffer.bytes().begin(), buffer.bytes().end());
}

Bytes Whole(const SimulatedDisk& disk) { return disk.Peek(0, disk.bytes()); }

// The first byte of each granule; fails where a granule is mixed.
std::string Granules(const Bytes& bytes) {
  std::string granules;
  for (size_t at = 0; at < bytes.size(); at += kGranuleBytes) {
    granules += static_cast<char>(bytes[at]);
    EXPECT_TRUE(std::all_of(bytes.begin() + at, bytes.begin() + at + kGranuleBytes,
                            [&](std::byte b) { return b == bytes[at]; }));
  }
  return granules;
}

int DifferingBits(const Bytes& a, const Bytes& b) {
  int bits = 0;
  for (size_t i = 0; i < a.size(); ++i) bits += std::popcount(static_cast<uint8_t>(a[i] ^ b[i]));
  return bits;
}

// `seeds` disks, one after another.
void ForSeeds(int seeds, const std::function<void(SimulatedDisk&)>& test) {
  std::mt19937_64 random(Seed());
  for (int i = 0; i < seeds && !::testing::Test::HasFailure(); ++i) {
    const uint64_t seed = random();
    SCOPED_TRACE(seed);
    SimulatedDisk disk(Small(seed));
    test(disk);
  }
}

TEST(SimulatedDiskTest, ReadsWhatWasWrittenWhateverThePieces) {
  SimulatedDisk disk(Small());
  AlignedBuffer one(kSectorBytes), two(2 * kSectorBytes);
  std::ranges::fill(one.bytes(), std::byte{'a'});
  std::ranges::fill(two.bytes(), std::byte{'b'});
  const std::span<const std::byte> pieces[] = {two.bytes(), one.bytes()};
  ASSERT_TRUE(disk.Write(5 * kSectorBytes, pieces).ok());
  AlignedBuffer first(kSectorBytes), rest(4 * kSectorBytes);
  const std::span<std::byte> out[] = {first.bytes(), rest.bytes()};
  ASSERT_TRUE(disk.Read(4 * kSectorBytes, out).ok());
  EXPECT_EQ(Granules(Bytes(first.bytes().begin(), first.bytes().end())), std::string(8, '\0'));
  EXPECT_EQ(Granules(Bytes(rest.bytes().begin(), rest.bytes().end())),
            std::string(16, 'b') + std::string(8, 'a') + std::string(8, '\0'));
  EXPECT_EQ(disk.Peek(6 * kSectorBytes - 1, 2), Bytes(2, std::byte{'b'}));

  EXPECT_TRUE(disk.Sync().ok());
  EXPECT_TRUE(disk.Discard(0, 2 * kSectorBytes).ok());
  const DiskCounts counts = disk.counts();
  EXPECT_EQ(disk.operations(), 4);
  EXPECT_EQ(counts.reads, 1);
  EXPECT_EQ(counts.writes, 1);
  EXPECT_EQ(counts.syncs, 1);
  EXPECT_EQ(counts.discards, 1);
  EXPECT_EQ(counts.read_bytes, 5 * kSectorBytes);
  EXPECT_EQ(counts.written_bytes, 3 * kSectorBytes);
  EXPECT_EQ(counts.discarded_bytes, 2 * kSectorBytes);
}

TEST(SimulatedDiskTest, ATebibyteTakesTheMemoryOfWhatIsWritten) {
  SimulatedDiskOptions options;
  options.bytes = uint64_t{1} << 40;
  SimulatedDisk disk(options);
  const uint64_t last = options.bytes / kSectorBytes - 1;
  ASSERT_TRUE(WriteFilled(disk, last, 'z').ok());
  ASSERT_TRUE(WriteFilled(disk, 1, 'a').ok());
  ASSERT_TRUE(disk.Sync().ok());
  const auto after = disk.Crashed(1);
  EXPECT_EQ(ReadBack(*after, last), Filled('z'));
  EXPECT_EQ(ReadBack(*after, last / 2), Filled('\0'));
  ASSERT_TRUE(after->Discard(0, options.bytes).ok());
  EXPECT_NE(ReadBack(*after, 1), Filled('a'));
}

TEST(SimulatedDiskTest, WhatIsNotInSectorsOrPassesTheEndIsInvalid) {
  SimulatedDisk disk(Small());
  AlignedBuffer buffer(3 * kSectorBytes);
  const auto expect_invalid = [&](uint64_t offset, std::span<std::byte> piece) {
    const std::span<const std::byte> written = piece;
    EXPECT_TRUE(absl::IsInvalidArgument(disk.Read(offset, {&piece, 1})));
    EXPECT_TRUE(absl::IsInvalidArgument(disk.Write(offset, {&written, 1})));
  };
  const uint64_t end = disk.bytes();
  const std::span<std::byte> sectors = buffer.bytes().first(2 * kSectorBytes);
  expect_invalid(512, sectors);
  expect_invalid(0, sectors.first(512));
  expect_invalid(0, buffer.bytes().subspan(512, kSectorBytes));
  expect_invalid(end - kSectorBytes, sectors);
  expect_invalid(end, sectors);
  expect_invalid(uint64_t{0} - kSectorBytes, sectors);
  EXPECT_TRUE(absl::IsInvalidArgument(disk.Discard(512, kSectorBytes)));
  EXPECT_TRUE(absl::IsInvalidArgument(disk.Discard(0, 512)));
  EXPECT_TRUE(absl::IsInvalidArgument(disk.Discard(kSectorBytes, uint64_t{0} - kSectorBytes)));
  const absl::Status status = disk.Discard(end, kSectorBytes);
  EXPECT_THAT(std::string(status.message()),
              HasSubstr("discard of 4096 bytes at 1048576 of disk simulated"));
  EXPECT_EQ(disk.operations(), 0);
  EXPECT_TRUE(WriteFilled(disk, kSectors - 1, 'x').ok());
}

TEST(SimulatedDiskTest, WhatWasSyncedSurvivesEveryPowerCut) {
  SimulatedDisk disk(Small());
  ASSERT_TRUE(WriteFilled(disk, 0, 'a', 8).ok());
  ASSERT_TRUE(disk.Sync().ok());
  EXPECT_EQ(disk.unsynced(), 0);
  ASSERT_TRUE(WriteFilled(disk, 4, 'b', 8).ok());
  EXPECT_EQ(disk.unsynced(), 1);
  for (uint64_t seed = 0; seed < 100; ++seed) {
    const auto after = disk.Crashed(seed);
    EXPECT_EQ(ReadBack(*after, 0, 4), Filled('a', 4));
    for (char granule : Granules(ReadBack(*after, 4, 4))) EXPECT_THAT(granule, AnyOf('a', 'b'));
    EXPECT_EQ(after->operations(), 2);
    EXPECT_EQ(after->unsynced(), 0);
  }
  EXPECT_EQ(ReadBack(disk, 4, 8), Filled('b', 8));
}

TEST(SimulatedDiskTest, APowerCutFollowsFromItsSeed) {
  SimulatedDisk disk(Small());
  for (uint64_t i = 0; i < 8; ++i) ASSERT_TRUE(WriteFilled(disk, 2 * i, 'a', 4).ok());
  std::set<Bytes> found;
  for (uint64_t seed = 0; seed < 100; ++seed) {
    found.insert(Whole(*disk.Crashed(seed)));
    EXPECT_EQ(Whole(*disk.Crashed(seed)), Whole(*disk.Crashed(seed)));
  }
  EXPECT_THAT(found, SizeIs(Ge(40)));
}

TEST(SimulatedDiskTest, PowerCutsOfOneKindKeepWhatTheirNamesSay) {
  // Three sectors: written once; by an older and a newer write; by the newer alone.
  SimulatedDisk disk(Small());
  ASSERT_TRUE(WriteFilled(disk, 0, 'a', 2).ok());
  ASSERT_TRUE(WriteFilled(disk, 1, 'b', 2).ok());
  std::map<PowerCut, std::set<std::string>> found;
  for (int cut = 0; cut < kPowerCuts; ++cut) {
    for (uint64_t seed = 0; seed < 400; ++seed) {
      const auto after = disk.Crashed(static_cast<PowerCut>(cut), seed);
      std::string granules = Granules(after->Peek(0, 3 * kSectorBytes));
      std::ranges::replace(granules, '\0', '.');
      found[static_cast<PowerCut>(cut)].insert(granules);
    }
  }
  const std::string none(8, '.'), a(8, 'a'), b(8, 'b');
  EXPECT_EQ(found[PowerCut::kNoneKept], (std::set{none + none + none}));
  EXPECT_EQ(found[PowerCut::kAllKept], (std::set{a + b + b}));
  EXPECT_EQ(found[PowerCut::kWholeWrites],
            (std::set{none + none + none, a + a + none, none + b + b, a + b + b}));

  std::set<std::string> prefixes;
  for (size_t n = 0; n <= 32; ++n) {
    std::string granules = none + none + none;
    for (size_t i = 0; i < std::min<size_t>(n, 16); ++i) granules[i] = 'a';
    for (size_t i = 16; i < n; ++i) granules[i - 8] = 'b';
    prefixes.insert(granules);
  }
  EXPECT_EQ(found[PowerCut::kPrefix], prefixes);

  for (const PowerCut cut : {PowerCut::kGranules, PowerCut::kAnyOrder}) {
    EXPECT_THAT(found[cut], SizeIs(Ge(200)));
    std::set<char> in_both;
    for (const std::string& granules : found[cut]) in_both.insert(granules[8]);
    EXPECT_EQ(in_both, (std::set{'.', 'a', 'b'}));
  }
  // All of both is kept, and the older lies over a part of the newer, which only an order explains.
  const auto count = [&](PowerCut cut) {
    return std::ranges::count_if(found[cut], [](const std::string& granules) {
      return std::ranges::count(granules.substr(8, 8), 'a') >= 7;
    });
  };
  EXPECT_GT(count(PowerCut::kAnyOrder), count(PowerCut::kGranules));
}

TEST(SimulatedDiskTest, TornBytesAreKeptOrLostWhole) {
  for (const uint32_t torn_bytes : {512, 1024, 2048, 4096}) {
    SimulatedDiskOptions options = Small();
    options.torn_bytes = torn_bytes;
    SimulatedDisk disk(options);
    ASSERT_TRUE(WriteFilled(disk, 0, 'a', 4).ok());
    const size_t unit = torn_bytes / kGranuleBytes;
    std::set<std::string> found;
    for (uint64_t seed = 0; seed < 100; ++seed) {
      const std::string granules = Granules(disk.Crashed(seed)->Peek(0, 4 * kSectorBytes));
      found.insert(granules);
      for (size_t i = 0; i < granules.size(); ++i) {
        EXPECT_EQ(granules[i], granules[i / unit * unit]);
      }
    }
    EXPECT_THAT(found, SizeIs(Ge(10)));
  }
}

TEST(SimulatedDiskTest, AnErrorDoesNothing) {
  SimulatedDisk disk(Small());
  ASSERT_TRUE(WriteFilled(disk, 3, 'a').ok());
  for (uint64_t at : {1, 2, 3}) disk.Schedule({Fault::kError, at});
  AlignedBuffer buffer(kSectorBytes);
  const absl::Status status = WriteFilled(disk, 3, 'b');
  EXPECT_TRUE(absl::IsUnavailable(status));
  EXPECT_THAT(std::string(status.message()),
              HasSubstr("write of 4096 bytes at 12288 of disk simulated: input/output error"));
  EXPECT_TRUE(absl::IsUnavailable(ReadInto(disk, 3, buffer)));
  EXPECT_TRUE(absl::IsUnavailable(disk.Discard(3 * kSectorBytes, kSectorBytes)));
  EXPECT_EQ(ReadBack(disk, 3), Filled('a'));
  EXPECT_EQ(disk.struck(Fault::kError), 3);
}

TEST(SimulatedDiskTest, AWriteThatFailsMayBeDoneInPart) {
  for (const auto& [kind, code] : {std::pair(Fault::kNoSpace, absl::StatusCode::kResourceExhausted),
                                   std::pair(Fault::kShort, absl::StatusCode::kUnavailable),
                                   std::pair(Fault::kCrash, absl::StatusCode::kUnavailable)}) {
    SCOPED_TRACE(NameOf(kind));
    std::set<std::string> found;
    ForSeeds(60, [&, kind = kind, code = code](SimulatedDisk& disk) {
      disk.Schedule({kind, 0});
      EXPECT_EQ(WriteFilled(disk, 0, 'a', 2).code(), code);
      found.insert(Granules(disk.Peek(0, 2 * kSectorBytes)));
    });
    EXPECT_THAT(found, SizeIs(Ge(15)));
  }
}

TEST(SimulatedDiskTest, AShortReadReadsAFirstPart) {
  std::set<size_t> found;
  ForSeeds(60, [&](SimulatedDisk& disk) {
    ASSERT_TRUE(WriteFilled(disk, 0, 'a', 2).ok());
    disk.Schedule({Fault::kShort, 1});
    AlignedBuffer buffer(2 * kSectorBytes);
    EXPECT_TRUE(absl::IsUnavailable(ReadInto(disk, 0, buffer)));
    const size_t n = std::ranges::count(buffer.bytes(), std::byte{'a'});
    found.insert(n);
    EXPECT_THAT(buffer.bytes().first(n), Each(std::byte{'a'}));
  });
  EXPECT_THAT(found, SizeIs(Ge(8)));
}

TEST(SimulatedDiskTest, OneBitIsFlippedInWhatIsReadOrStored) {
  ForSeeds(20, [&](SimulatedDisk& disk) {
    ASSERT_TRUE(WriteFilled(disk, 0, 'a', 3).ok());
    disk.Schedule({Fault::kBitFlip, 1});
    EXPECT_EQ(DifferingBits(ReadBack(disk, 0, 3), Filled('a', 3)), 1);
    EXPECT_EQ(ReadBack(disk, 0, 3), Filled('a', 3));
    disk.Schedule({Fault::kBitFlip, 3});
    ASSERT_TRUE(WriteFilled(disk, 0, 'b', 3).ok());
    EXPECT_EQ(DifferingBits(ReadBack(disk, 0, 3), Filled('b', 3)), 1);
    ASSERT_TRUE(disk.Sync().ok());
    EXPECT_EQ(DifferingBits(ReadBack(*disk.Crashed(1), 0, 3), Filled('b', 3)), 1);
  });
}

TEST(SimulatedDiskTest, AMisdirectedCallGoesToAnotherPlace) {
  std::set<uint64_t> places;
  ForSeeds(60, [&](SimulatedDisk& disk) {
    ASSERT_TRUE(WriteFilled(disk, 100, 'a', 2).ok());
    disk.Schedule({Fault::kMisdirected, 1});
    EXPECT_NE(ReadBack(disk, 100, 2), Filled('a', 2));
    disk.Schedule({Fault::kMisdirected, 2});
    ASSERT_TRUE(WriteFilled(disk, 100, 'b', 2).ok());
    const std::string granules = Granules(Whole(disk));
    const uint64_t place = granules.find('b');
    ASSERT_NE(place, std::string::npos);
    EXPECT_NE(place, 100 * 8);
    EXPECT_EQ(granules.substr(place, 16), std::string(16, 'b'));
    places.insert(place);
  });
  EXPECT_THAT(places, SizeIs(Ge(30)));
}

TEST(SimulatedDiskTest, OnTheSmallestDiskTheOtherPlaceIsTheOnlyOther) {
  SimulatedDiskOptions options;
  options.bytes = 2 * kSectorBytes;
  SimulatedDisk disk(options);
  ASSERT_TRUE(WriteFilled(disk, 0, 'a').ok());
  for (uint64_t i = 1; i <= 40; i += 2) {
    disk.Schedule({Fault::kMisdirected, i});
    disk.Schedule({Fault::kMisdirected, i + 1});
    EXPECT_EQ(ReadBack(disk, 1), Filled('a'));
    EXPECT_EQ(ReadBack(disk, 0), Filled('\0'));
  }
  // Another place for all of it there is not.
  disk.Schedule({Fault::kMisdirected, 0});
  ASSERT_TRUE(WriteFilled(disk, 0, 'b', 2).ok());
  EXPECT_EQ(disk.Peek(0, 2 * kSectorBytes), Filled('b', 2));
}

TEST(SimulatedDiskTest, ALostWriteStoresNothing) {
  SimulatedDisk disk(Small());
  disk.Schedule({Fault::kLost, 0});
  ASSERT_TRUE(WriteFilled(disk, 0, 'a').ok());
  EXPECT_EQ(ReadBack(disk, 0), Filled('\0'));
  EXPECT_EQ(disk.unsynced(), 0);
}

TEST(SimulatedDiskTest, ALyingSyncMakesNothingDurable) {
  SimulatedDisk disk(Small());
  ASSERT_TRUE(WriteFilled(disk, 0, 'a').ok());
  disk.Schedule({Fault::kLyingSync, 0});
  ASSERT_TRUE(disk.Sync().ok());
  EXPECT_EQ(ReadBack(*disk.Crashed(PowerCut::kNoneKept, 1), 0), Filled('\0'));
  ASSERT_TRUE(disk.Sync().ok());
  EXPECT_EQ(ReadBack(*disk.Crashed(PowerCut::kNoneKept, 1), 0), Filled('a'));
}

TEST(SimulatedDiskTest, WhatAFailedSyncDroppedNoLaterOneSaves) {
  for (const auto& [kind, code] :
       {std::pair(Fault::kFailedSync, absl::StatusCode::kUnavailable),
        std::pair(Fault::kError, absl::StatusCode::kUnavailable),
        std::pair(Fault::kNoSpace, absl::StatusCode::kResourceExhausted)}) {
    SCOPED_TRACE(NameOf(kind));
    std::set<std::pair<char, char>> found;  // what is read before a power cut and after it
    ForSeeds(40, [&, kind = kind, code = code](SimulatedDisk& disk) {
      for (uint64_t i = 0; i < 4; ++i) ASSERT_TRUE(WriteFilled(disk, i, 'a').ok());
      disk.Schedule({kind, 4});
      EXPECT_EQ(disk.Sync().code(), code);
      EXPECT_TRUE(disk.Sync().ok());
      const auto after = disk.Crashed(PowerCut::kAllKept, 1);
      for (uint64_t i = 0; i < 4; ++i) {
        found.insert({Granules(ReadBack(disk, i))[0], Granules(ReadBack(*after, i))[0]});
      }
    });
    EXPECT_EQ(found, (std::set<std::pair<char, char>>{{'a', 'a'}, {'a', '\0'}, {'\0', '\0'}}));
  }
}

TEST(SimulatedDiskTest, AfterACrashThePowerIsGoneUntilTheNextDisk) {
  for (uint64_t at = 1; at <= 4; ++at) {
    SimulatedDisk disk(Small());
    ASSERT_TRUE(WriteFilled(disk, 0, 'a').ok());
    disk.Schedule({Fault::kCrash, at});
    disk.Schedule({Fault::kError, 5});
    AlignedBuffer buffer(kSectorBytes);
    const absl::Status statuses[] = {ReadInto(disk, 0, buffer), disk.Sync(),
                                     WriteFilled(disk, 1, 'b'),
                                     disk.Discard(2 * kSectorBytes, kSectorBytes), disk.Sync()};
    for (uint64_t i = 0; i < std::size(statuses); ++i) {
      EXPECT_EQ(absl::IsUnavailable(statuses[i]), i + 1 >= at) << i << " of " << at;
    }
    EXPECT_THAT(std::string(statuses[4].message()), HasSubstr("the power is gone"));
    EXPECT_EQ(disk.struck(Fault::kCrash), 1);
    EXPECT_EQ(disk.struck(Fault::kError), 0);
    EXPECT_EQ(disk.operations(), 6);

    const auto after = disk.Crashed(PowerCut::kAllKept, 1);
    EXPECT_EQ(ReadBack(*after, 0), Filled('a'));
    EXPECT_TRUE(WriteFilled(*after, 0, 'c').ok());
  }
}

TEST(SimulatedDiskTest, AFaultWaitsForAnOperationThatItCanBefall) {
  SimulatedDisk disk(Small());
  disk.Schedule({Fault::kFailedSync, 0});
  disk.Schedule({Fault::kLost, 1});
  disk.Schedule({Fault::kError, 1});
  disk.Schedule({Fault::kBitFlip, 1});
  AlignedBuffer buffer(kSectorBytes);
  ASSERT_TRUE(WriteFilled(disk, 0, 'a').ok());
  EXPECT_TRUE(absl::IsUnavailable(ReadInto(disk, 0, buffer)));
  ASSERT_TRUE(WriteFilled(disk, 0, 'b').ok());
  EXPECT_EQ(disk.Peek(0, kSectorBytes), Filled('a'));
  EXPECT_EQ(disk.struck(Fault::kLost), 1);
  EXPECT_TRUE(absl::IsUnavailable(disk.Sync()));
  EXPECT_TRUE(disk.Sync().ok());
  EXPECT_TRUE(disk.Read(0, {}).ok());  // no bit to flip
  EXPECT_EQ(disk.struck(Fault::kBitFlip), 0);
  ASSERT_TRUE(ReadInto(disk, 0, buffer).ok());
  EXPECT_EQ(disk.struck(Fault::kBitFlip), 1);
}

TEST(SimulatedDiskTest, AStallMayUseTheDiskAndGoesWithAnotherFault) {
  SimulatedDisk* stalled = nullptr;
  int stalls = 0;
  SimulatedDiskOptions options = Small();
  options.stall = [&] {
    ++stalls;
    EXPECT_TRUE(WriteFilled(*stalled, 1, 'b').ok());
  };
  SimulatedDisk disk(options);
  stalled = &disk;
  disk.Schedule({Fault::kStall, 0});
  disk.Schedule({Fault::kError, 0});
  EXPECT_TRUE(absl::IsUnavailable(WriteFilled(disk, 0, 'a')));
  EXPECT_EQ(stalls, 1);
  EXPECT_EQ(disk.struck(Fault::kStall), 1);
  EXPECT_EQ(ReadBack(disk, 1), Filled('b'));
}

TEST(SimulatedDiskTest, ASyncDoesNotCoverWhatIsWrittenMeanwhile) {
  SimulatedDisk* stalled = nullptr;
  SimulatedDiskOptions options = Small();
  options.stall = [&] { EXPECT_TRUE(WriteFilled(*stalled, 1, 'b').ok()); };
  SimulatedDisk disk(options);
  stalled = &disk;
  ASSERT_TRUE(WriteFilled(disk, 0, 'a').ok());
  disk.Schedule({Fault::kStall, 0});
  ASSERT_TRUE(disk.Sync().ok());
  const auto after = disk.Crashed(PowerCut::kNoneKept, 1);
  EXPECT_EQ(ReadBack(*after, 0), Filled('a'));
  EXPECT_EQ(ReadBack(*after, 1), Filled('\0'));
  ASSERT_TRUE(disk.Sync().ok());
  EXPECT_EQ(ReadBack(*disk.Crashed(PowerCut::kNoneKept, 1), 1), Filled('b'));
}

TEST(SimulatedDiskTest, DiscardedSectorsAreGarbageAndAPowerCutMayUndoIt) {
  SimulatedDisk disk(Small(1)), other(Small(2));
  for (SimulatedDisk* each : {&disk, &other}) {
    ASSERT_TRUE(WriteFilled(*each, 0, 'a', 4).ok());
    ASSERT_TRUE(each->Sync().ok());
    ASSERT_TRUE(each->Discard(kSectorBytes, 2 * kSectorBytes).ok());
  }
  EXPECT_EQ(ReadBack(disk, 0), Filled('a'));
  EXPECT_EQ(ReadBack(disk, 3), Filled('a'));
  const Bytes garbage = ReadBack(disk, 1);
  EXPECT_GT(DifferingBits(garbage, Filled('\0')), 15'000);
  EXPECT_GT(DifferingBits(garbage, ReadBack(disk, 2)), 15'000);
  EXPECT_GT(DifferingBits(garbage, ReadBack(other, 1)), 15'000);
  EXPECT_EQ(ReadBack(disk, 1), garbage);
  EXPECT_EQ(ReadBack(*disk.Crashed(PowerCut::kNoneKept, 1), 1), Filled('a'));
  EXPECT_EQ(ReadBack(*disk.Crashed(PowerCut::kAllKept, 1), 1), garbage);
  // Of what was never written too.
  ASSERT_TRUE(disk.Discard(8 * kSectorBytes, kSectorBytes).ok());
  EXPECT_NE(ReadBack(disk, 8), Filled('\0'));
}

TEST(SimulatedDiskTest, ADiskThatCannotForgetSaysSo) {
  SimulatedDiskOptions options = Small();
  options.discards_supported = false;
  SimulatedDisk disk(options);
  ASSERT_TRUE(WriteFilled(disk, 0, 'a').ok());
  EXPECT_TRUE(absl::IsUnimplemented(disk.Discard(0, kSectorBytes)));
  EXPECT_EQ(ReadBack(disk, 0), Filled('a'));
}

TEST(SimulatedDiskTest, WhatTestsChangeOnTheMediumOutlastsSyncsAndPowerCuts) {
  for (const bool synced : {false, true}) {
    SimulatedDisk disk(Small());
    ASSERT_TRUE(WriteFilled(disk, 0, 'a', 3).ok());
    if (synced) {
      ASSERT_TRUE(disk.Sync().ok());
    }
    disk.FlipBit(5 * 8 + 3);
    const Bytes corrupt(kSectorBytes + 20, std::byte{'c'});
    disk.Corrupt(kSectorBytes - 10, corrupt);
    Bytes expected = Filled('a', 3);
    expected[5] ^= std::byte{1 << 3};
    std::ranges::copy(corrupt, expected.begin() + kSectorBytes - 10);
    EXPECT_EQ(ReadBack(disk, 0, 3), expected);
    EXPECT_EQ(disk.Crashed(PowerCut::kAllKept, 1)->Peek(0, expected.size()), expected);
    ASSERT_TRUE(disk.Sync().ok());
    EXPECT_EQ(disk.Crashed(PowerCut::kNoneKept, 1)->Peek(0, expected.size()), expected);
  }
}

// What came of random calls and faults, drawn by `seed`.
std::string RandomCalls(SimulatedDisk& disk, uint64_t seed, int calls) {
  std::mt19937_64 random(seed);
  std::string results;
  for (int i = 0; i < calls; ++i) {
    if (random() % 3 == 0) {
      auto kind = static_cast<Fault::Kind>(random() % Fault::kCrash);
      if (kind == Fault::kStall) kind = Fault::kError;
      disk.Schedule({kind, disk.operations() + random() % 4});
    }
    const uint64_t sectors = random() % 4 + 1;
    const uint64_t sector = random() % (kSectors - sectors);
    AlignedBuffer buffer(sectors * kSectorBytes);
    switch (random() % 4) {
      case 0:
        results += ReadInto(disk, sector, buffer).ToString();
        results.append(reinterpret_cast<const char*>(buffer.bytes().data()), buffer.size());
        break;
      case 1:
        results += WriteFilled(disk, sector, static_cast<char>(random()), sectors).ToString();
        break;
      case 2:
        results += disk.Sync().ToString();
        break;
      case 3:
        results += disk.Discard(sector * kSectorBytes, sectors * kSectorBytes).ToString();
        break;
    }
  }
  return results;
}

TEST(SimulatedDiskTest, TheSameSeedDoesTheSame) {
  ForSeeds(10, [](SimulatedDisk& disk) {
    SimulatedDisk other(Small(Seed() + 1));
    const std::string results = RandomCalls(disk, 1, 200);
    EXPECT_NE(RandomCalls(other, 1, 200), results);
    EXPECT_NE(Whole(disk), Whole(other));
  });
  for (uint64_t seed = Seed(); seed < Seed() + 10; ++seed) {
    SimulatedDisk one(Small(seed)), two(Small(seed));
    EXPECT_EQ(RandomCalls(one, seed, 200), RandomCalls(two, seed, 200));
    EXPECT_EQ(Whole(one), Whole(two));
    EXPECT_EQ(Whole(*one.Crashed(seed)), Whole(*two.Crashed(seed)));
  }
}

TEST(SimulatedDiskTest, ACloneGoesOnAsItsModel) {
  ForSeeds(10, [](SimulatedDisk& disk) {
    RandomCalls(disk, 1, 100);
    const auto clone = disk.Clone();
    EXPECT_EQ(clone->operations(), disk.operations());
    EXPECT_EQ(RandomCalls(*clone, 2, 100), RandomCalls(disk, 2, 100));
    EXPECT_EQ(Whole(*clone), Whole(disk));
    EXPECT_EQ(Whole(*clone->Crashed(3)), Whole(*disk.Crashed(3)));
    ASSERT_TRUE(WriteFilled(*clone, 0, 'x', kSectors).ok());
    EXPECT_NE(Whole(*clone), Whole(disk));
  });
}

TEST(SimulatedDiskTest, ManyThreadsUseItAtOnce) {
  SimulatedDisk disk(Small());
  constexpr uint64_t kThreads = 4, kRounds = 50;
  std::vector<std::thread> threads;
  for (uint64_t t = 0; t < kThreads; ++t) {
    threads.emplace_back([&disk, t] {
      for (uint64_t i = 0; i < kRounds; ++i) {
        const char with = static_cast<char>('a' + i % 26);
        EXPECT_TRUE(WriteFilled(disk, 2 * t, with, 2).ok());
        EXPECT_EQ(ReadBack(disk, 2 * t, 2), Filled(with, 2));
        EXPECT_TRUE(disk.Sync().ok());
        EXPECT_EQ(disk.Crashed(PowerCut::kNoneKept, i)->Peek(2 * t * kSectorBytes, kSectorBytes),
                  Filled(with));
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(disk.operations(), 3 * kThreads * kRounds);
  EXPECT_EQ(disk.unsynced(), 0);
}

}  // namespace
}  // namespace quarry::testing
