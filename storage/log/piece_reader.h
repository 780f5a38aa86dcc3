// Reads pieces of one block of a log: LoggedBlockReader.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <utility>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "storage/log/block_log.h"
#include "storage/log/read_block.h"

namespace quarry {

// What a block's frames say, and what any of its sectors has to be.
struct BlockSums {
  LoggedBlock block;  // where it was when they were read
  WrittenAs written;
  std::vector<std::vector<uint32_t>> of_parts;  // PartFrame::sums
};

// Reads the frames of all parts. DataLoss, Unavailable; FailedPrecondition: it is encrypted, as one
// message a part, of which no piece can be checked.
absl::StatusOr<BlockSums> ReadSums(Disk* disk, const LoggedBlock& block);
// All pieces from where the block was; what is read is right if the block is still there then.
// DataLoss: a sector does not have its sum. Unavailable: the disk.
absl::Status ReadSummed(Disk* disk, const BlockSums& sums, std::span<const PieceToRead> pieces);

// What a reader asks of its log.
class HeldBlocks {
 public:
  virtual ~HeldBlocks() = default;
  // The block as the index has it; nothing: it has none of this id any more.
  virtual std::optional<LoggedBlock> Now(TenantName tenant, const BlockId& id) const = 0;
  // It is not what was written.
  virtual void FoundBroken(const LoggedBlock& block, const absl::Status& why) = 0;
  virtual void CountPieces(uint64_t bytes, const absl::Status& read) = 0;
  virtual void Release(TenantName tenant, const BlockId& id) = 0;
};

// Thread-safe; holds the block until it ends.
class PieceReader final : public LoggedBlockReader {
 public:
  PieceReader(HeldBlocks* log, Disk* disk, BlockSums sums)
      : log_(log),
        disk_(disk),
        tenant_(sums.block.tenant),
        id_(sums.block.id),
        bytes_(sums.block.bytes),
        digest_(sums.written.digest),
        sums_(std::make_shared<const BlockSums>(std::move(sums))) {}
  ~PieceReader() override { log_->Release(tenant_, id_); }

  uint64_t bytes() const override { return bytes_; }
  const ByteDigest& digest() const override { return digest_; }
  absl::Status Read(std::span<const PieceToRead> pieces) override;

 private:
  std::shared_ptr<const BlockSums> Sums() const {
    absl::ReaderMutexLock lock(&mutex_);
    return sums_;
  }
  // Of where the block is now.
  absl::Status Follow(const LoggedBlock& now);

  HeldBlocks* const log_;
  Disk* const disk_;
  const TenantName tenant_;
  const BlockId id_;
  const uint64_t bytes_;
  const ByteDigest digest_;
  mutable absl::Mutex mutex_;  // never held while the disk is waited for
  std::shared_ptr<const BlockSums> sums_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace quarry
