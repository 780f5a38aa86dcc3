// Blocks whose bytes say whose they are, and how they are logged.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "proto/byte_digest.h"
#include "proto/check.h"
#include "storage/disk/aligned_buffer.h"
#include "storage/log/block_log.h"
#include "storage/slot_size.h"

namespace quarry::testing {

// Version `version` of block `number`; every eight of its bytes name both and their own place.
struct OwnedBlock {
  uint32_t tenant = 0, number = 0, version = 0;
  uint64_t bytes = 0;

  std::string tenant_name() const { return absl::StrCat("tenant-", tenant); }
  BlockKey key() const {
    BlockKey key;
    std::memcpy(key.id.bytes.data(), &number, sizeof(number));
    key.id.bytes[31] = 1;
    key.name_space.bytes[0] = static_cast<uint8_t>(number % 2);
    key.full_key = absl::StrCat("block ", number);
    return key;
  }
  uint64_t WordAt(uint64_t offset) const {
    return uint64_t{tenant} << 60 | uint64_t{number} << 44 | uint64_t{version} << 24 | offset / 8;
  }
  // Whole sectors, zeros behind the end.
  AlignedBuffer Make() const {
    AlignedBuffer out(RoundUp(bytes, kSectorBytes));
    for (uint64_t at = 0; at < bytes; at += 8) {
      const uint64_t word = WordAt(at);
      std::memcpy(out.bytes().data() + at, &word, std::min<uint64_t>(8, bytes - at));
    }
    return out;
  }
};

// The version that these bytes are of, all of them; ~0: they are another's, or mixed.
inline uint32_t VersionOf(const OwnedBlock& block, std::span<const std::byte> bytes) {
  uint64_t first = 0;
  std::memcpy(&first, bytes.data(), std::min<size_t>(8, bytes.size()));
  OwnedBlock owner = block;
  if (bytes.size() < 8) return ~0u;
  owner.version = static_cast<uint32_t>(first >> 24 & 0xfffff);
  owner.bytes = bytes.size();
  const AlignedBuffer want = owner.Make();
  return std::memcmp(want.bytes().data(), bytes.data(), bytes.size()) == 0 ? owner.version : ~0u;
}

// Blocks as Append takes them, with all that they refer to.
class LoggedBatch {
 public:
  void Add(const OwnedBlock& block) {
    Entry& entry = *entries_.emplace_back(std::make_unique<Entry>());
    entry.tenant = block.tenant_name();
    entry.key = block.key();
    entry.bytes = block.Make();
    const std::span<const std::byte> bytes =
        std::span<const std::byte>(entry.bytes.bytes()).first(block.bytes);
    blocks_.push_back({entry.tenant, &entry.key, DigestOf(bytes), bytes, nullptr});
  }
  std::span<const BlockToLog> blocks() const { return blocks_; }
  BlockToLog& at(size_t i) { return blocks_[i]; }

 private:
  struct Entry {
    std::string tenant;
    BlockKey key;
    AlignedBuffer bytes;
  };
  std::vector<std::unique_ptr<Entry>> entries_;
  std::vector<BlockToLog> blocks_;
};

// An environment variable with a key of this digit alone.
inline std::string SetTestKey(char digit) {
  const std::string name = "QUARRY_TEST_DISK_KEY";
  setenv(name.c_str(), std::string(64, digit).c_str(), 1);
  return name;
}

inline absl::Status AppendOne(BlockLog& log, const OwnedBlock& block) {
  LoggedBatch batch;
  batch.Add(block);
  return log.Append(batch.blocks())[0];
}

// What the log has of the block, by its version; NotFound and errors as they come, ~0 as above.
inline absl::StatusOr<uint32_t> ReadVersion(BlockLog& log, const OwnedBlock& block) {
  const auto info = log.Find(block.tenant_name(), block.key().id);
  if (!info.has_value()) return absl::NotFoundError("not in the log");
  AlignedBuffer memory(RoundUp(info->bytes, kSectorBytes));
  const auto out = memory.bytes().first(info->bytes);
  const absl::StatusOr<ByteDigest> read = log.Read(block.tenant_name(), block.key(), out);
  if (!read.ok()) return read.status();
  QUARRY_CHECK(*read == DigestOf(out));
  return VersionOf(block, out);
}

}  // namespace quarry::testing
