// Another's disk, of which calls fail where a test says so.
#pragma once

#include <cstdint>
#include <functional>
#include <string>

#include "absl/status/status.h"
#include "storage/disk/disk.h"

namespace quarry::testing {

struct DiskHooks {
  // Whether the call on these bytes fails; null: it does not.
  std::function<bool(uint64_t offset, uint64_t bytes)> fails_read, fails_write;
  std::function<bool()> fails_sync;
  std::function<void(uint64_t bytes)> after_read;
  std::function<void(WritePieces pieces)> before_write;
};

// The disk and the hooks outlive it. As thread-safe as they are.
class HookedDisk : public Disk {
 public:
  HookedDisk(Disk* disk, const DiskHooks* hooks) : disk_(disk), hooks_(hooks) {}

  uint64_t bytes() const override { return disk_->bytes(); }
  const std::string& name() const override { return disk_->name(); }
  absl::Status Read(uint64_t offset, ReadPieces pieces) override {
    if (hooks_->fails_read && hooks_->fails_read(offset, Sum(pieces))) return Failed("read");
    absl::Status status = disk_->Read(offset, pieces);
    if (hooks_->after_read) hooks_->after_read(Sum(pieces));
    return status;
  }
  absl::Status Write(uint64_t offset, WritePieces pieces) override {
    if (hooks_->fails_write && hooks_->fails_write(offset, Sum(pieces))) return Failed("write");
    if (hooks_->before_write) hooks_->before_write(pieces);
    return disk_->Write(offset, pieces);
  }
  absl::Status Sync() override {
    if (hooks_->fails_sync && hooks_->fails_sync()) return Failed("sync");
    return disk_->Sync();
  }
  absl::Status Discard(uint64_t offset, uint64_t bytes) override {
    return disk_->Discard(offset, bytes);
  }

 private:
  static absl::Status Failed(const char* call) {
    return absl::UnavailableError(std::string(call) + ": input/output error");
  }
  template <typename Pieces>
  static uint64_t Sum(Pieces pieces) {
    uint64_t bytes = 0;
    for (const auto& piece : pieces) bytes += piece.size();
    return bytes;
  }

  Disk* const disk_;
  const DiskHooks* const hooks_;
};

}  // namespace quarry::testing
