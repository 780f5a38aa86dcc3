#include "storage/arena.h"

#include <fcntl.h>
#include <linux/memfd.h>
#include <numa.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <map>
#include <optional>
#include <utility>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/strings/str_cat.h"
#include "absl/synchronization/mutex.h"
#include "proto/check.h"
#include "proto/status_macros.h"

#ifndef F_SEAL_FUTURE_WRITE
#define F_SEAL_FUTURE_WRITE 0x0010
#endif
#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23
#endif

namespace quarry {
namespace {

constexpr uint64_t kPageBytes = 4096;
constexpr uint64_t kHugePageBytes = 2ull << 20;

uint64_t RoundUp(uint64_t x, uint64_t unit) { return (x + unit - 1) / unit * unit; }

// Errors of system calls, in one place.
absl::Status SystemError(const char* call, uint64_t bytes) {
  int error = errno;
  std::string message =
      absl::StrCat("arena: ", call, " of ", bytes, " bytes: ", std::strerror(error));
  return error == ENOMEM ? absl::ResourceExhaustedError(message) : absl::InternalError(message);
}

// One memfd, mapped writable here and sealed so that nobody else can map it so.
class Extent {
 public:
  static absl::StatusOr<std::unique_ptr<Extent>> Create(uint64_t bytes, uint64_t page_bytes,
                                                        uint32_t node, bool prefault) {
    auto extent = std::unique_ptr<Extent>(new Extent);
    unsigned flags = MFD_CLOEXEC | MFD_ALLOW_SEALING;
    if (page_bytes == kHugePageBytes) flags |= MFD_HUGETLB | MFD_HUGE_2MB;
    extent->bytes_ = bytes;
    extent->fd_ = memfd_create("quarry-extent", flags);
    if (extent->fd_ < 0) return SystemError("memfd_create", bytes);
    if (ftruncate(extent->fd_, static_cast<off_t>(bytes)) != 0) {
      return SystemError("ftruncate", bytes);
    }
    void* data = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, extent->fd_, 0);
    if (data == MAP_FAILED) return SystemError("mmap", bytes);
    extent->data_ = static_cast<std::byte*>(data);
    QUARRY_RETURN_IF_ERROR(extent->Prepare(node, prefault));
    return extent;
  }
  ~Extent() {
    if (data_ != nullptr) munmap(data_, bytes_);
    if (fd_ >= 0) close(fd_);
  }
  Extent(const Extent&) = delete;
  Extent& operator=(const Extent&) = delete;

  std::byte* data() const { return data_; }
  int fd() const { return fd_; }
  uint64_t bytes() const { return bytes_; }

 private:
  Extent() = default;

  absl::Status Prepare(uint32_t node, bool prefault) {
    if (numa_available() >= 0 && numa_num_configured_nodes() > 1) {
      numa_tonode_memory(data_, bytes_, static_cast<int>(node));  // before the first touch
    }
    madvise(data_, bytes_, MADV_HUGEPAGE);  // only where shmem_enabled allows it
    if (prefault && madvise(data_, bytes_, MADV_POPULATE_WRITE) != 0) {
      if (errno != EINVAL) return SystemError("pre-faulting", bytes_);
      for (uint64_t i = 0; i < bytes_; i += kPageBytes) {  // kernels before 5.14
        reinterpret_cast<volatile char*>(data_)[i] = 0;
      }
    }
    // The mapping above stays writable; every later one can only read.
    if (fcntl(fd_, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_FUTURE_WRITE | F_SEAL_SEAL) !=
        0) {
      return SystemError("sealing", bytes_);
    }
    return absl::OkStatus();
  }

  int fd_ = -1;
  std::byte* data_ = nullptr;
  uint64_t bytes_ = 0;
};

// An extent's slots are all of one size and one tenant.
struct SlottedExtent {
  std::unique_ptr<Extent> memory;
  std::string tenant;
  uint64_t slot_bytes = 0;
  uint64_t page_bytes = 0;
  uint32_t node = 0;
  uint32_t slots = 0;
  std::vector<uint32_t> free;  // slot numbers
};

class MemfdArena final : public Arena {
 public:
  explicit MemfdArena(const ArenaOptions& options) : options_(options) {}

  absl::StatusOr<ArenaSlot> Allocate(std::string_view tenant, uint64_t bytes) override {
    if (bytes == 0) return absl::InvalidArgumentError("arena: a slot of 0 bytes was asked for");
    uint64_t slot_bytes = SlotBytes(bytes);
    absl::MutexLock create(&create_mutex_);  // one extent is made at a time, outside mutex_
    {
      absl::MutexLock lock(&mutex_);
      if (std::optional<ArenaSlot> slot = TakeFree(tenant, slot_bytes, bytes)) return *slot;
    }
    QUARRY_RETURN_IF_ERROR(AddExtent(tenant, slot_bytes));
    absl::MutexLock lock(&mutex_);
    std::optional<ArenaSlot> slot = TakeFree(tenant, slot_bytes, bytes);
    QUARRY_CHECK(slot.has_value());
    return *slot;
  }

  void Free(const ArenaSlot& slot) override {
    std::unique_ptr<Extent> emptied;  // unmapped after the lock
    absl::MutexLock lock(&mutex_);
    auto it = extents_.find(slot.extent);
    QUARRY_CHECK(it != extents_.end());
    SlottedExtent& extent = it->second;
    extent.free.push_back(static_cast<uint32_t>(slot.offset / extent.slot_bytes));
    used_bytes_ -= extent.slot_bytes;
    auto& with_room = with_room_[{extent.tenant, extent.slot_bytes}];
    if (extent.free.size() == 1) with_room.push_back(slot.extent);
    if (extent.free.size() < extent.slots) return;
    std::erase(with_room, slot.extent);
    if (with_room.empty()) with_room_.erase({extent.tenant, extent.slot_bytes});
    extent_bytes_ -= extent.memory->bytes();
    if (extent.page_bytes == kHugePageBytes) huge_bytes_ -= extent.memory->bytes();
    emptied = std::move(extent.memory);
    extents_.erase(it);
  }

  absl::StatusOr<ExtentInfo> ExtentDescriptor(std::string_view tenant,
                                              uint32_t extent) const override {
    absl::MutexLock lock(&mutex_);
    auto it = extents_.find(extent);
    if (it == extents_.end() || it->second.tenant != tenant) {
      return absl::NotFoundError(absl::StrCat("arena: extent ", extent, " is not there"));
    }
    const SlottedExtent& e = it->second;
    return ExtentInfo{extent, e.memory->fd(), e.memory->bytes(), e.page_bytes, e.node, e.tenant};
  }

  ArenaStats Stats() const override {
    absl::MutexLock lock(&mutex_);
    return {options_.capacity_bytes, extent_bytes_, used_bytes_,
            static_cast<uint32_t>(extents_.size()), huge_bytes_};
  }

 private:
  // Whole pages, so that a lease never exposes part of a neighbour; sizes that vary freely are
  // rounded to one of eight classes per doubling, which wastes at most an eighth.
  static uint64_t SlotBytes(uint64_t bytes) {
    uint64_t pages = RoundUp(bytes, kPageBytes);
    uint64_t step = kPageBytes;
    while (step * 16 <= pages) step *= 2;
    return RoundUp(pages, step);
  }

  std::optional<ArenaSlot> TakeFree(std::string_view tenant, uint64_t slot_bytes, uint64_t bytes)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
    auto it = with_room_.find({std::string(tenant), slot_bytes});
    if (it == with_room_.end()) return std::nullopt;
    uint32_t index = it->second.back();
    SlottedExtent& extent = extents_.at(index);
    uint32_t number = extent.free.back();
    extent.free.pop_back();
    if (extent.free.empty()) {
      it->second.pop_back();
      if (it->second.empty()) with_room_.erase(it);
    }
    used_bytes_ += slot_bytes;
    uint64_t offset = number * slot_bytes;
    return ArenaSlot{extent.memory->data() + offset, bytes, index, offset};
  }

  absl::Status AddExtent(std::string_view tenant, uint64_t slot_bytes)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(create_mutex_) {
    uint64_t left;
    {
      absl::MutexLock lock(&mutex_);
      left = options_.capacity_bytes - extent_bytes_;
    }
    if (slot_bytes > left) {
      return absl::ResourceExhaustedError(absl::StrCat("arena: ", slot_bytes, " bytes wanted, ",
                                                       left, " left of ",
                                                       options_.capacity_bytes));
    }
    uint64_t wanted = std::min(left, std::max(options_.extent_bytes, slot_bytes));
    uint32_t slots = static_cast<uint32_t>(wanted / slot_bytes);
    SlottedExtent extent;
    extent.tenant = std::string(tenant);
    extent.slot_bytes = slot_bytes;
    extent.slots = slots;
    QUARRY_RETURN_IF_ERROR(Back(&extent, RoundUp(slots * slot_bytes, kPageBytes)));
    for (uint32_t i = slots; i > 0; --i) extent.free.push_back(i - 1);
    absl::MutexLock lock(&mutex_);
    extent_bytes_ += extent.memory->bytes();
    if (extent.page_bytes == kHugePageBytes) huge_bytes_ += extent.memory->bytes();
    uint32_t index = next_extent_++;
    with_room_[{extent.tenant, slot_bytes}].push_back(index);
    extents_.emplace(index, std::move(extent));
    return absl::OkStatus();
  }

  // Huge pages where the machine gives them, without complaint where it does not.
  absl::Status Back(SlottedExtent* extent, uint64_t bytes) {
    if (options_.huge_pages == ArenaOptions::HugePages::kTry && bytes % kHugePageBytes == 0) {
      auto memory = Extent::Create(bytes, kHugePageBytes, extent->node, options_.prefault);
      if (memory.ok()) {
        extent->memory = *std::move(memory);
        extent->page_bytes = kHugePageBytes;
        return absl::OkStatus();
      }
    }
    QUARRY_ASSIGN_OR_RETURN(
        extent->memory, Extent::Create(bytes, kPageBytes, extent->node, options_.prefault));
    extent->page_bytes = kPageBytes;
    return absl::OkStatus();
  }

  const ArenaOptions options_;
  absl::Mutex create_mutex_ ABSL_ACQUIRED_BEFORE(mutex_);
  mutable absl::Mutex mutex_;
  std::map<uint32_t, SlottedExtent> extents_ ABSL_GUARDED_BY(mutex_);
  std::map<std::pair<std::string, uint64_t>, std::vector<uint32_t>> with_room_
      ABSL_GUARDED_BY(mutex_);
  uint32_t next_extent_ ABSL_GUARDED_BY(mutex_) = 0;  // never reused: clients cache mappings
  uint64_t extent_bytes_ ABSL_GUARDED_BY(mutex_) = 0;
  uint64_t used_bytes_ ABSL_GUARDED_BY(mutex_) = 0;
  uint64_t huge_bytes_ ABSL_GUARDED_BY(mutex_) = 0;
};

}  // namespace

absl::StatusOr<std::unique_ptr<Arena>> Arena::Create(const ArenaOptions& options) {
  if (options.capacity_bytes < kPageBytes) {
    return absl::InvalidArgumentError(
        absl::StrCat("arena.capacity_bytes is ", options.capacity_bytes, ", at least ", kPageBytes,
                     " are needed"));
  }
  if (options.extent_bytes < kPageBytes) {
    return absl::InvalidArgumentError(absl::StrCat(
        "arena.extent_bytes is ", options.extent_bytes, ", at least ", kPageBytes, " are needed"));
  }
  return std::make_unique<MemfdArena>(options);
}

}  // namespace quarry
