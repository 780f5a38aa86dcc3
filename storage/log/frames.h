// What the log writes about itself, as bytes: storage/FORMAT.md. Encoding makes whole sectors;
// decoding trusts nothing: what is not exactly right is DataLoss.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "proto/types.h"
#include "storage/block_key.h"
#include "storage/disk/aligned_buffer.h"
#include "storage/disk/disk.h"
#include "storage/log/log_layout.h"
#include "storage/log/sealing.h"

namespace quarry {

inline constexpr uint32_t kLogVersion = 3;
inline constexpr uint64_t kMinSegmentBytes = 16 * kSectorBytes;
inline constexpr uint64_t kMaxSegmentBytes = 1ull << 30;
// Of a frame without its payload.
inline constexpr uint64_t kMaxFrameBytes = 128ull << 10;
// Of a block's bytes behind one frame, so that the table of their sectors has a bound.
inline constexpr uint64_t kMaxPartBytes = 8ull << 20;

using DeviceId = std::array<uint8_t, 16>;
using KeyId = std::array<uint8_t, 16>;  // drawn at random with the key

// Where a frame is, which it says itself: a frame that was written elsewhere, or before its segment
// was used anew, is not mistaken for it.
struct FramePlace {
  DeviceId device{};
  uint32_t segment = 0;
  uint64_t generation = 0;  // of the segment: drawn at random whenever it is used anew
  uint64_t offset = 0;      // on the disk
  friend bool operator==(const FramePlace&, const FramePlace&) = default;
};

// The disk's, the same in every copy; written once.
struct Superblock : LogLayout {
  DeviceId device{};
  // Of the key that its keys are wrapped with; where there are slots for them.
  std::array<uint8_t, 16> key_check{};
  friend bool operator==(const Superblock&, const Superblock&) = default;
};

// How a part is encrypted: storage/log/part_cipher.h.
struct PartSeal {
  SealTag tag{};
  KeyId key{};                     // of the tenant; zeros: it is not encrypted
  std::array<uint8_t, 16> salt{};  // of the start that wrote it
  bool sealed() const { return key != KeyId{}; }
};

// A part of a block's bytes, which follow the frame in whole sectors.
struct PartFrame {
  std::string tenant;
  BlockKey key;
  // Of the whole block and of this part. Encrypted with the bytes, like key.full_key; of a sealed
  // frame that is decoded all three are nothing yet.
  ByteDigest block_digest, digest;
  uint64_t block_bytes = 0;
  uint64_t part_offset = 0;  // in the block; a multiple of kSectorBytes
  uint64_t part_bytes = 0;
  // The sequence of the block's first frame, the same for all its parts; another one where it is
  // moved to.
  uint64_t born = 0;
  PartSeal seal;
  // Of each sector of the part, the last one with the zeros behind the end: by these any sector is
  // checked by itself. CRC32C, or the tags of what is sealed: one of both is empty.
  std::vector<uint32_t> sums;
  std::vector<SealTag> tags;
};

// A block with this id that was born before is gone.
struct PurgedBlock {
  BlockId id;
  uint64_t born = 0;
};

// Blocks are gone: these; or, if there are none, those of the namespace that were born before
// `born`; or all of the tenant that were. Every purge is written twice, in frames of their own.
struct PurgeFrame {
  std::string tenant;
  bool has_name_space = false;
  NamespaceDigest name_space;       // also of the blocks
  std::vector<PurgedBlock> blocks;  // at most kMaxBlocks
  uint64_t born = 0;                // the latest of them
  uint8_t copy = 0;                 // 0 or 1, which follows it
  // The tenant's keys are gone with it.
  bool destroys_keys = false;

  static constexpr size_t kMaxBlocks = 2048;
  // Of both copies in one segment of so many bytes.
  static constexpr size_t MostBlocks(uint64_t segment_bytes) {
    return std::min<size_t>(kMaxBlocks, segment_bytes / 8 / sizeof(PurgedBlock));
  }
};

// The frames of a segment with sequences [first, first + count) and all bytes that follow them were
// on the disk before this was written.
struct CommitFrame {
  uint64_t first = 0;
  uint32_t count = 0;
};

enum class FrameKind : uint8_t {
  kSuperblock,
  kSegment,
  kPart,
  kPurge,
  kCommit,
  kFooter,
  kNote,
  kKey
};

// What every frame begins with.
struct FrameHead {
  FrameKind kind = FrameKind::kSegment;
  uint32_t version = 0;
  uint64_t bytes = 0;  // in whole sectors, without payload
  FramePlace place;
  uint64_t sequence = 0;
};

AlignedBuffer EncodeSuperblock(const Superblock& superblock, uint64_t offset);
AlignedBuffer EncodeSegmentStart(const FramePlace& place, uint64_t sequence);
AlignedBuffer EncodePart(const FramePlace& place, uint64_t sequence, const PartFrame& part);
AlignedBuffer EncodePurge(const FramePlace& place, uint64_t sequence, const PurgeFrame& purge);
AlignedBuffer EncodeCommit(const FramePlace& place, uint64_t sequence, const CommitFrame& commit);
// Whether a log's parts are encrypted.
enum class Sealing : uint8_t { kPlain, kSealed };
// Bytes that the frame of a part of so many bytes takes, with the table of its sectors.
uint64_t PartFrameBytes(std::string_view tenant, const BlockKey& key, uint64_t part_bytes,
                        Sealing sealing);
// At most, those of all parts of a block of so many bytes, which have `least` to `most` bytes each
// but one.
uint64_t AllPartFrameBytes(std::string_view tenant, const BlockKey& key, uint64_t block_bytes,
                           uint64_t least, uint64_t most, Sealing sealing);
// Of each sector of `bytes`, whose last one has zeros behind the end.
std::vector<uint32_t> SectorSums(std::span<const std::byte> bytes);
// Where a part's frame has its tag, and what is encrypted of it: both digests and the full key.
inline constexpr size_t kPartTagOffset = 64;
size_t PartSecretOffset(const PartFrame& part);
size_t PartSecretBytes(const PartFrame& part);
// Of the table of its sectors, which follows what is encrypted.
size_t PartTableOffset(const PartFrame& part);
size_t PartTableBytes(const PartFrame& part);
// From those bytes. `part->key.full_key` has its size. DataLoss: the only part of a block has
// another digest than the block.
absl::Status DecodePartSecret(std::span<const std::byte> secret, PartFrame* part);
// Whether a block of `block_bytes` can have such a part, in one segment.
bool IsPart(uint64_t part_offset, uint64_t part_bytes, uint64_t block_bytes);

// The head of the frame that begins here, by its first sector, of whatever version; its checksum is
// not looked at. DataLoss: there is none. Of more sectors, read head.bytes of them.
absl::StatusOr<FrameHead> PeekFrame(std::span<const std::byte> sector);
// The whole frame. DataLoss: its checksum is wrong, or it is not of this version, kind or place.
// FailedPrecondition: a superblock of another version.
absl::StatusOr<Superblock> DecodeSuperblock(std::span<const std::byte> frame, uint64_t offset);
absl::StatusOr<FrameHead> DecodeSegmentStart(std::span<const std::byte> frame);
absl::StatusOr<PartFrame> DecodePart(std::span<const std::byte> frame, const FramePlace& place,
                                     uint64_t sequence);
absl::StatusOr<PurgeFrame> DecodePurge(std::span<const std::byte> frame, const FramePlace& place,
                                       uint64_t sequence);
absl::StatusOr<CommitFrame> DecodeCommit(std::span<const std::byte> frame, const FramePlace& place,
                                         uint64_t sequence);

}  // namespace quarry
