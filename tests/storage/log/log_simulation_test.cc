// The log against disks that lose power, fail and lie, by seed: no wrong byte ever; on disks that
// do not lie, nothing that was durable is lost and nothing that was purged comes back.
#include <gtest/gtest.h>

#include <algorithm>
#include <map>
#include <random>
#include <set>

#include "tests/storage/disk/hooked_disk.h"
#include "tests/storage/disk/simulated_disk.h"
#include "tests/storage/log/log_case.h"
#include "tests/support/given_number.h"
#include "tests/support/seed.h"

namespace quarry {
namespace {

using testing::Fault;
using testing::LoggedBatch;
using testing::OwnedBlock;
using testing::ReadVersion;
using testing::SimulatedDisk;

constexpr uint32_t kTenants = 2, kNumbers = 24;
constexpr uint64_t kSegment = 128 << 10;

// What a disk with such faults still owes.
struct Promise {
  bool durable = true, purged = true;
  bool readable = true;  // if not, places of it are not for a while
  bool encrypted = false;
};

class Simulation {
 public:
  Simulation(uint64_t seed, uint32_t segments, std::vector<Fault::Kind> kinds, Promise promise)
      : random_(seed), segments_(segments), kinds_(std::move(kinds)), promise_(promise) {
    disk_ = std::make_unique<SimulatedDisk>(
        testing::SimulatedDiskOptions{.bytes = Layout().bytes(),
                                      .seed = seed,
                                      .torn_bytes = Below(2) == 0 ? 512u : 4096u,
                                      .stall = [] {}});
  }

  // Strikes in the first life.
  void Schedule(Fault fault) { disk_->Schedule(fault); }
  // Of the first life.
  uint64_t operations() const { return operations_; }

  void Run() {
    const uint32_t lives = 2 + Below(3);
    for (uint32_t life = 0; life < lives && !::testing::Test::HasFailure(); ++life) {
      SCOPED_TRACE(absl::StrCat("life ", life));
      Live(life + 1 == lives);
    }
  }
  uint64_t crashes() const { return crashes_; }

 private:
  // What a log may have of a block.
  struct Owed {
    uint32_t durable = 0;  // the latest version that was acknowledged; 0: none
    uint32_t tried = 0;    // the latest that was handed over
    uint32_t purged = 0;   // none up to this may be there
    bool may_be_gone = false;
    uint32_t purges = 0;  // that were tried
  };
  // A block that is read in pieces, as it was when that began.
  struct Held {
    std::unique_ptr<LoggedBlockReader> reader;
    OwnedBlock block;
    Owed owed;
  };
  using Name = std::pair<uint32_t, uint32_t>;

  LogLayout Layout() const {
    return promise_.encrypted ? LogLayout::Encrypted(kSegment, segments_)
                              : LogLayout{kSegment, segments_};
  }
  uint32_t Below(uint64_t n) { return static_cast<uint32_t>(random_() % n); }

  void Live(bool last) {
    // Faults of this life, and for most the end of it.
    for (const Fault::Kind kind : kinds_) {
      for (uint32_t n = Below(4); n > 0; --n) disk_->Schedule({kind, Below(120)});
    }
    if (!last) disk_->Schedule({Fault::kCrash, Below(3) == 0 ? Below(40) : Below(160)});
    SimulatedDisk* const disk = disk_.get();
    BlockLogOptions options;
    options.segment_bytes = kSegment;
    options.max_part_bytes = 16 << 10;
    options.random = [this] { return random_(); };
    options.keep = [this](const ReclaimCandidate& block) {
      uint32_t number;
      std::memcpy(&number, block.id.bytes.data(), sizeof(number));
      owed_[{block.tenant == "tenant-0" ? 0u : 1u, number}].may_be_gone = true;
      return Below(4) != 0;
    };
    if (promise_.encrypted) options.key.environment = testing::SetTestKey('5');
    FailReads();
    auto log = BlockLog::Open(std::make_unique<testing::HookedDisk>(disk, &hooks_), options);
    if (Below(2) == 0) hooks_ = {};
    if (log.ok()) {
      // Blocks of a segment that cannot be read are not found, and those that may have been purged
      // there.
      unreadable_ = (*log)->Stats().condemned_segments > 0;
      CheckAll(**log);
      for (int i = 0; i < 60 && !::testing::Test::HasFailure(); ++i) Step(**log);
      for (Held& held : held_) CheckHeld(held);
      held_.clear();
      // Also what is found without a restart.
      if (disk->struck(Fault::kCrash) == 0) CheckAll(**log);
      log->reset();
    } else {
      EXPECT_TRUE(absl::IsUnavailable(log.status()) || absl::IsResourceExhausted(log.status()) ||
                  (!promise_.durable && absl::IsFailedPrecondition(log.status())))
          << log.status();
    }
    crashes_ += disk->struck(Fault::kCrash);
    if (operations_ == 0) operations_ = disk->operations();
    disk_ = disk->Crashed(random_());
  }

  // For this life, or the start of it: some of the segments, and by coin one of their notes.
  void FailReads() {
    hooks_ = {};
    if (!promise_.readable && Below(2) == 0) {
      const LogLayout layout = Layout();
      std::vector<std::pair<uint64_t, uint64_t>> places;
      for (uint32_t n = 1 + Below(4); n > 0; --n) {
        const uint32_t segment = Below(segments_);
        uint64_t from = 0, to = kSegment;
        if (Below(2) == 0) from = Below(kSegment / kSectorBytes) * kSectorBytes;
        if (Below(3) == 0) to = from + kSectorBytes;
        places.emplace_back(layout.SegmentOffset(segment) + from,
                            layout.SegmentOffset(segment) + to);
        if (Below(2) != 0) continue;
        const uint64_t note = layout.NoteOffset(static_cast<int>(Below(2)), segment);
        places.emplace_back(note, note + kSectorBytes);
      }
      hooks_.fails_read = [places](uint64_t offset, uint64_t bytes) {
        return std::any_of(places.begin(), places.end(), [&](const auto& place) {
          return offset < place.second && offset + bytes > place.first;
        });
      };
    }
  }

  void Step(BlockLog& log) {
    const uint32_t what = Below(20);
    if (what == 0) return Purge(log);
    if (what < 8) return Append(log);
    if (what == 8) return Hold(log);
    if (what < 11 && !held_.empty()) return CheckHeld(held_[Below(held_.size())]);
    if (what == 11 && held_.size() > 3) {
      held_.erase(held_.begin());
      return;
    }
    const OwnedBlock block{Below(kTenants), Below(kNumbers)};
    CheckOne(log, block, /*at_rest=*/false);
  }

  void Append(BlockLog& log) {
    LoggedBatch batch;
    std::vector<OwnedBlock> blocks;
    for (uint32_t n = 1 + Below(4); n > 0; --n) {
      OwnedBlock block{Below(kTenants), Below(kNumbers)};
      block.version = ++version_;
      block.bytes = 8 + Below(Below(3) == 0 ? 60000 : 5000);
      owed_[{block.tenant, block.number}].tried = block.version;
      blocks.push_back(block);
      batch.Add(block);
    }
    const auto statuses = log.Append(batch.blocks());
    for (size_t i = 0; i < blocks.size(); ++i) {
      Owed& owed = owed_[{blocks[i].tenant, blocks[i].number}];
      if (!statuses[i].ok()) {
        EXPECT_TRUE(absl::IsUnavailable(statuses[i]) || absl::IsResourceExhausted(statuses[i]))
            << statuses[i];
        continue;
      }
      owed.durable = blocks[i].version;
      owed.may_be_gone = false;
    }
    // Reclaiming in the middle of the batch may have dropped what came early in it.
    for (const OwnedBlock& block : blocks) {
      Owed& owed = owed_[{block.tenant, block.number}];
      if (!log.Find(block.tenant_name(), block.key().id).has_value() && dropped(log)) {
        owed.may_be_gone = true;
      }
    }
  }
  bool dropped(BlockLog& log) const { return log.Stats().dropped_blocks > 0; }

  void Purge(BlockLog& log) {
    const uint32_t tenant = Below(kTenants);
    std::optional<NamespaceDigest> name_space;
    std::vector<BlockId> ids;
    std::set<uint32_t> numbers;
    const uint32_t kind = Below(3);
    for (uint32_t number = 0; number < kNumbers; ++number) {
      if (kind == 0 || (kind == 1 && number % 2 == 1) || (kind == 2 && Below(8) == 0)) {
        numbers.insert(number);
      }
    }
    if (kind == 1) name_space = OwnedBlock{0, 1}.key().name_space;
    if (kind == 2) {
      numbers.insert(0);
      for (const uint32_t number : numbers) ids.push_back(OwnedBlock{0, number}.key().id);
    }
    const auto purged = log.Purge(absl::StrCat("tenant-", tenant), name_space, ids);
    for (const uint32_t number : numbers) {
      Owed& owed = owed_[{tenant, number}];
      owed.may_be_gone = true;
      ++owed.purges;
      if (purged.ok()) owed.purged = std::max(owed.purged, owed.tried);
      EXPECT_FALSE(
          log.Find(absl::StrCat("tenant-", tenant), OwnedBlock{0, number}.key().id).has_value());
    }
  }

  void Hold(BlockLog& log) {
    Held held;
    held.block = {Below(kTenants), Below(kNumbers)};
    held.owed = owed_[{held.block.tenant, held.block.number}];
    auto reader = log.OpenBlock(held.block.tenant_name(), held.block.key());
    if (!reader.ok()) {
      const absl::Status& status = reader.status();
      EXPECT_TRUE(absl::IsNotFound(status) || absl::IsDataLoss(status) ||
                  absl::IsUnavailable(status) || absl::IsResourceExhausted(status))
          << status;
      return;
    }
    held.reader = *std::move(reader);
    held.block.bytes = held.reader->bytes();
    // The version is known by its digest.
    const auto has = [&](uint32_t version) {
      held.block.version = version;
      return DigestOf(held.block.Make().bytes().first(held.block.bytes)) == held.reader->digest();
    };
    while (!has(held.block.version)) {
      ASSERT_LT(held.block.version, held.owed.tried) << "never written";
      ++held.block.version;
    }
    held_.push_back(std::move(held));
  }

  void CheckHeld(Held& held) {
    SCOPED_TRACE(absl::StrCat("held: tenant ", held.block.tenant, ", block ", held.block.number));
    const uint64_t sectors = RoundUp(held.block.bytes, kSectorBytes) / kSectorBytes;
    std::vector<AlignedBuffer> outs;
    std::vector<PieceToRead> pieces;
    for (uint64_t at = Below(sectors); at < sectors; at += Below(4)) {
      const uint64_t count = std::min<uint64_t>(sectors - at, 1 + Below(3));
      pieces.push_back({at * kSectorBytes, outs.emplace_back(count * kSectorBytes).bytes()});
      at += count;
    }
    const absl::Status read = held.reader->Read(pieces);
    if (read.ok()) {
      const AlignedBuffer want = held.block.Make();
      for (const PieceToRead& piece : pieces) {
        ASSERT_EQ(
            std::memcmp(piece.out.data(), want.bytes().data() + piece.offset, piece.out.size()), 0)
            << "foreign bytes at " << piece.offset;
      }
      return;
    }
    if (absl::IsUnavailable(read) || disk_->struck(Fault::kCrash) > 0) return;
    EXPECT_TRUE(absl::IsNotFound(read) || absl::IsDataLoss(read)) << read;
    const Owed& now = owed_[{held.block.tenant, held.block.number}];
    const bool ended = now.tried > held.owed.tried || now.purges > held.owed.purges;
    EXPECT_TRUE(ended || !promise_.durable || !promise_.readable) << "lost while held: " << read;
    EXPECT_TRUE(absl::IsNotFound(read) || !promise_.durable) << read;
  }

  void CheckAll(BlockLog& log) {
    for (uint32_t tenant = 0; tenant < kTenants; ++tenant) {
      for (uint32_t number = 0; number < kNumbers; ++number) {
        CheckOne(log, {tenant, number}, /*at_rest=*/true);
      }
    }
  }

  void CheckOne(BlockLog& log, const OwnedBlock& block, bool at_rest) {
    SCOPED_TRACE(absl::StrCat("tenant ", block.tenant, ", block ", block.number));
    Owed& owed = owed_[{block.tenant, block.number}];
    const auto version = ReadVersion(log, block);
    if (!version.ok()) {
      // Without power the disk says so, or has said so when the log was opened.
      if (absl::IsUnavailable(version.status()) || disk_->struck(Fault::kCrash) > 0) return;
      EXPECT_TRUE(absl::IsNotFound(version.status()) || absl::IsDataLoss(version.status()))
          << version.status();
      if (absl::IsDataLoss(version.status())) {
        EXPECT_FALSE(promise_.durable) << version.status();
      }
      // Found again at a later start, if its segment is not used anew before.
      if (unreadable_) owed.may_be_gone = true;
      if (promise_.durable) {
        EXPECT_TRUE(owed.may_be_gone || owed.durable == 0) << "lost: version " << owed.durable;
      }
      return;
    }
    ASSERT_NE(*version, ~0u) << "wrong bytes";
    EXPECT_LE(*version, owed.tried) << "never written";
    if (promise_.durable && !owed.may_be_gone && !unreadable_) {
      EXPECT_GE(*version, owed.durable) << "stale";
    }
    if (promise_.purged) {
      EXPECT_GT(*version, owed.purged) << "purged";
    }
    if (at_rest && *version >= owed.durable) owed.may_be_gone = false;
  }

  std::mt19937_64 random_;
  const uint32_t segments_;
  const std::vector<Fault::Kind> kinds_;
  const Promise promise_;
  std::unique_ptr<SimulatedDisk> disk_;
  testing::DiskHooks hooks_;
  std::map<Name, Owed> owed_;
  std::vector<Held> held_;
  uint32_t version_ = 0;
  uint64_t crashes_ = 0, operations_ = 0;
  bool unreadable_ = false;  // some segment, in this life
};

uint64_t Seeds() { return GivenNumber("QUARRY_SIMULATION_SEEDS", 150); }

struct Kind {
  const char* name;
  uint32_t segments;
  std::vector<Fault::Kind> faults;
  Promise promise;
};
class LogSimulationKinds : public ::testing::TestWithParam<Kind> {};

TEST_P(LogSimulationKinds, KeepsItsPromises) {
  uint64_t crashes = 0;
  for (uint64_t i = 0; i < Seeds() && !HasFailure(); ++i) {
    const uint64_t seed = Seed() + i * 7919;
    SCOPED_TRACE(absl::StrCat("seed ", seed));
    Simulation simulation(seed, GetParam().segments, GetParam().faults, GetParam().promise);
    simulation.Run();
    crashes += simulation.crashes();
  }
  EXPECT_GT(crashes, Seeds() / 2) << "power cuts";
}

// One fault of each kind at every operation of a life that is otherwise without.
TEST(LogSimulationTest, AnyOperationMayFail) {
  for (int kind = 0; kind < Fault::kKinds; ++kind) {
    const auto fault = static_cast<Fault::Kind>(kind);
    const bool lies =
        fault == Fault::kLost || fault == Fault::kMisdirected || fault == Fault::kLyingSync;
    const Promise promise{!lies && fault != Fault::kBitFlip, !lies};
    uint64_t operations = 1;
    for (uint64_t at = 0; at < operations && !::testing::Test::HasFailure(); ++at) {
      SCOPED_TRACE(absl::StrCat(std::string(NameOf(fault)), " at ", at, ", seed ", Seed()));
      Simulation simulation(Seed(), 10, {}, promise);
      simulation.Schedule({fault, at});
      simulation.Run();
      operations = std::max(operations, std::min<uint64_t>(simulation.operations(), 400));
    }
  }
}

INSTANTIATE_TEST_SUITE_P(
    Disks, LogSimulationKinds,
    ::testing::Values(Kind{"ThatLosePower", 60, {}, {}}, Kind{"ThatAreSmall", 9, {}, {}},
                      Kind{"ThatFail",
                           60,
                           {Fault::kError, Fault::kShort, Fault::kNoSpace, Fault::kFailedSync},
                           {}},
                      Kind{"ThatAreSmallAndFail",
                           12,
                           {Fault::kError, Fault::kShort, Fault::kNoSpace, Fault::kFailedSync},
                           {}},
                      Kind{"ThatCannotBeReadInPlaces", 20, {}, {true, true, false}},
                      Kind{"ThatAreEncrypted", 12, {}, {true, true, true, true}},
                      Kind{"ThatAreEncryptedAndFail",
                           20,
                           {Fault::kError, Fault::kShort, Fault::kNoSpace, Fault::kFailedSync},
                           {true, true, true, true}},
                      Kind{"ThatFlipBits", 20, {Fault::kBitFlip}, {false, true}},
                      Kind{"ThatLie",
                           20,
                           {Fault::kLost, Fault::kMisdirected, Fault::kLyingSync, Fault::kBitFlip},
                           {false, false}}),
    [](const auto& instance) { return std::string(instance.param.name); });

}  // namespace
}  // namespace quarry
