// A log with a bit of everything on a disk of a few megabytes, and what may be found
// on damaged copies of that disk.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include <gtest/gtest.h>

#include "absl/strings/str_cat.h"
#include "storage/log/frames.h"
#include "storage/log/log_layout.h"
#include "tests/storage/disk/simulated_disk.h"
#include "tests/storage/log/log_case.h"

namespace quarry::testing {

// Its last segment is as after a stop, the others are sealed. It has blocks in one part and in
// several, over two segments too, later ones of an id, and purges by id, by namespace and of all
// that a tenant has.
class SmallLog {
 public:
  static constexpr uint64_t kSegment = kMinSegmentBytes;
  static constexpr uint32_t kSegments = 8;

  explicit SmallLog(bool encrypted)
      : encrypted_(encrypted),
        layout_(encrypted ? LogLayout::Encrypted(kSegment, kSegments)
                          : LogLayout{kSegment, kSegments}) {
    auto disk = std::make_unique<SimulatedDisk>(
        SimulatedDiskOptions{.bytes = layout_.bytes(),
                             .discards_supported = false});  // what was not written stays zeros
    SimulatedDisk* const raw = disk.get();
    auto log = Open(std::move(disk));
    QUARRY_CHECK(log.ok());
    Append(**log, {{0, 1, 1, 3000}});
    Append(**log, {{0, 2, 2, 3000}, {1, 2, 3, 5000}});
    const BlockId id[] = {OwnedBlock{0, 1}.key().id};
    QUARRY_CHECK((*log)->Purge("tenant-0", std::nullopt, id).ok());
    allowed_[{0, 1}].clear();
    Append(**log, {{0, 1, 4, 4000}});
    Append(**log, {{0, 3, 5, 30000}});
    Append(**log, {{1, 4, 6, 2000}});
    QUARRY_CHECK((*log)->Purge("tenant-1", OwnedBlock{1, 4}.key().name_space, {}).ok());
    allowed_[{1, 2}].clear();
    allowed_[{1, 4}].clear();
    Append(**log, {{1, 4, 7, 1000}});
    Append(**log, {{0, 2, 8, 2000}});
    Append(**log, {{2, 6, 10, 1500}});
    QUARRY_CHECK((*log)->Purge("tenant-2", std::nullopt, {}).ok());  // with its key
    allowed_[{2, 6}].clear();
    // The last of all lies in a segment without a footer.
    Append(**log, {{1, 5, 9, 500}});
    const BlockId last[] = {OwnedBlock{1, 5}.key().id};
    QUARRY_CHECK((*log)->Purge("tenant-1", std::nullopt, last).ok());
    allowed_[{1, 5}].clear();
    disk_ = raw->Crashed(PowerCut::kAllKept, 1);
  }

  const LogLayout& layout() const { return layout_; }

  absl::StatusOr<std::unique_ptr<BlockLog>> Open(std::unique_ptr<Disk> disk) const {
    BlockLogOptions options;
    if (encrypted_) options.key.environment = SetTestKey('7');
    options.segment_bytes = kSegment;
    options.random = [n = uint64_t{77}]() mutable { return n = n * 6364136223846793005 + 1; };
    return BlockLog::Open(std::move(disk), options);
  }

  // As after a stop, its last segment without a footer.
  std::unique_ptr<SimulatedDisk> Stopped() const { return disk_->Clone(); }
  // After one more start: all segments have footers.
  std::unique_ptr<SimulatedDisk> Sealed() const {
    auto disk = disk_->Clone();
    SimulatedDisk* const raw = disk.get();
    auto log = Open(std::move(disk));
    QUARRY_CHECK(log.ok());
    return raw->Crashed(PowerCut::kAllKept, 1);
  }

  // Reads every block that the log ever had: wrong bytes, what was never under that name and what
  // was purged fail the test. Returns how many of those that are there on a disk without damage
  // are not.
  int Check(BlockLog& log) const {
    int missing = 0;
    for (const auto& [name, versions] : allowed_) {
      const auto version = ReadVersion(log, {name.first, name.second});
      if (version.ok()) {
        EXPECT_TRUE(versions.contains(*version))
            << "version " << *version << " of block " << name.second << " of tenant " << name.first
            << (versions.empty() ? ", which was purged" : "");
      } else if (!versions.empty()) {
        ++missing;
      }
    }
    return missing;
  }

  // By number of sector: what the log wrote about itself, and blocks' bytes.
  static std::vector<uint64_t> MetadataSectors(const SimulatedDisk& disk) {
    const std::set<uint64_t> payload = Payload(disk);
    std::vector<uint64_t> out;
    for (uint64_t at = 0; at < disk.bytes(); at += kSectorBytes) {
      if (!payload.contains(at / kSectorBytes) && IsWritten(disk, at)) {
        out.push_back(at / kSectorBytes);
      }
    }
    return out;
  }
  static std::vector<uint64_t> PayloadSectors(const SimulatedDisk& disk) {
    const std::set<uint64_t> payload = Payload(disk);
    return {payload.begin(), payload.end()};
  }

 private:
  void Append(BlockLog& log, std::vector<OwnedBlock> blocks) {
    LoggedBatch batch;
    for (const OwnedBlock& block : blocks) {
      batch.Add(block);
      allowed_[{block.tenant, block.number}].insert(block.version);
    }
    for (const absl::Status& status : log.Append(batch.blocks())) QUARRY_CHECK(status.ok());
  }
  static bool IsWritten(const SimulatedDisk& disk, uint64_t at) {
    for (const std::byte b : disk.Peek(at, kSectorBytes)) {
      if (b != std::byte{0}) return true;
    }
    return false;
  }
  static std::set<uint64_t> Payload(const SimulatedDisk& disk) {
    std::set<uint64_t> out;
    for (uint64_t at = LogLayout::kFirstArea; at < disk.bytes(); at += kSectorBytes) {
      const auto sector = disk.Peek(at, kSectorBytes);
      const auto head = PeekFrame(sector);
      if (!head.ok() || head->kind != FrameKind::kPart) continue;
      const auto part = DecodePart(sector, head->place, head->sequence);
      QUARRY_CHECK(part.ok());
      const uint64_t first = at + head->bytes;
      for (uint64_t byte = 0; byte < part->part_bytes; byte += kSectorBytes) {
        out.insert((first + byte) / kSectorBytes);
      }
    }
    return out;
  }

  const bool encrypted_;
  const LogLayout layout_;
  // Versions by tenant and number that may be found; none: it was purged.
  std::map<std::pair<uint32_t, uint32_t>, std::set<uint32_t>> allowed_;
  std::unique_ptr<SimulatedDisk> disk_;
};

}  // namespace quarry::testing
