// RAM arena: memfd extents, each of one (tenant, NUMA node, page size), cut into equal slots.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <string_view>

#include "absl/status/statusor.h"
#include "proto/types.h"

namespace quarry {

struct ArenaOptions {
  uint64_t capacity_bytes = 4ull << 30;  // of all tenants together
  uint64_t extent_bytes = 64ull << 20;   // rounded up to hold at least one slot
  enum class HugePages { kNever, kTry } huge_pages = HugePages::kTry;
  bool prefault = true;                  // at the extent's creation, never on a decode step
};

// Memory of one slot. Bytes stay mapped as long as the arena lives.
struct ArenaSlot {
  std::byte* data = nullptr;
  uint64_t bytes = 0;      // as asked; the slot may be larger
  uint32_t extent = 0;     // index for ExtentDescriptor()
  uint64_t offset = 0;     // within the extent
};

struct ExtentInfo {
  uint32_t index = 0;
  int fd = -1;             // sealed: shrink, grow, seal, future-write; owned by the arena
  uint64_t bytes = 0;
  uint64_t page_bytes = 0;
  uint32_t numa_node = 0;
  std::string tenant;
};

struct ArenaStats {
  uint64_t capacity_bytes = 0, extent_bytes = 0, used_bytes = 0;
  uint32_t extents = 0;
  uint64_t huge_page_bytes = 0;
};

// Thread-safe. Slots of one size share extents; an extent whose slots are all free goes back.
class Arena {
 public:
  static absl::StatusOr<std::unique_ptr<Arena>> Create(const ArenaOptions& options);
  virtual ~Arena() = default;

  // ResourceExhausted names the bytes wanted and the bytes left.
  virtual absl::StatusOr<ArenaSlot> Allocate(std::string_view tenant, uint64_t bytes) = 0;
  virtual void Free(const ArenaSlot& slot) = 0;
  // NotFound for an unknown extent, and for one of another tenant.
  virtual absl::StatusOr<ExtentInfo> ExtentDescriptor(std::string_view tenant,
                                                      uint32_t extent) const = 0;
  virtual ArenaStats Stats() const = 0;
};

}  // namespace quarry
