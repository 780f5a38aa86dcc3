// The device memory of a budget: one range of addresses, pages behind it as it fills.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string_view>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "gpu/cuda/arena_map.h"
#include "gpu/cuda/driver.h"

namespace quarry::cuda {

// Addresses for the whole budget are reserved at once and cost nothing; physical pages are mapped,
// in steps of at least 64 MiB, where what is handed out first reaches them, and stay until the
// end. So buffers never move, and what is mapped plus the overhead never exceeds the budget. Used
// by one thread, with the device's context current.
class Arena {
 public:
  struct Options {
    uint64_t budget_bytes = 0;
    uint64_t overhead_bytes = 0;  // of the budget
    int device = 0;
  };
  static absl::StatusOr<std::unique_ptr<Arena>> Create(const Driver& driver,
                                                       const Options& options);
  ~Arena();  // of what nothing on the device uses any more

  // ResourceExhausted as ArenaMap's; or that the card itself has no more pages, for which spare
  // memory does not ask a second time.
  absl::StatusOr<void*> Allocate(uint64_t bytes, std::string_view what, uint64_t leave_end = 0);
  absl::StatusOr<void*> AllocateSpare(uint64_t bytes, uint64_t leave_free, std::string_view what);
  void Release(void* data, uint64_t bytes);
  // What is mapped already stays.
  void SetOverhead(uint64_t bytes) { map_.SetOverhead(bytes); }

  const ArenaMap& map() const { return map_; }
  uint64_t mapped_bytes() const { return mapped_; }

 private:
  Arena(const Driver& driver, const Options& options, uint64_t page)
      : driver_(driver),
        options_(options),
        page_(page),
        map_(options.budget_bytes, options.overhead_bytes, page) {}
  // Pages for [0, end).
  absl::Status MapTo(uint64_t end);
  // The address of a piece of the map, which is released if there are no pages for it.
  absl::StatusOr<void*> WithPages(uint64_t offset, uint64_t bytes, std::string_view what);

  const Driver driver_;
  const Options options_;
  const uint64_t page_;  // bytes
  ArenaMap map_;
  uint64_t reserved_ = 0;  // bytes of addresses
  uint64_t mapped_ = 0;
  bool spare_refused_ = false;  // pages for spare memory
  CUdeviceptr base_ = 0;
  std::vector<std::pair<CUmemGenericAllocationHandle, uint64_t>> pieces_;  // mapped, with bytes
};

}  // namespace quarry::cuda
