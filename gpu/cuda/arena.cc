#include "gpu/cuda/arena.h"

#include <algorithm>
#include <string>

#include "absl/strings/str_cat.h"
#include "proto/status_macros.h"

namespace quarry::cuda {
namespace {

constexpr uint64_t kStepBytes = 64ull << 20;  // few calls of the driver, little mapped for nothing

CUmemAllocationProp OnDevice(int device) {
  CUmemAllocationProp prop = {};
  prop.type = CU_MEM_ALLOCATION_TYPE_PINNED;
  prop.location.type = CU_MEM_LOCATION_TYPE_DEVICE;
  prop.location.id = device;
  return prop;
}

uint64_t RoundUp(uint64_t bytes, uint64_t to) { return (bytes + to - 1) / to * to; }

}  // namespace

absl::StatusOr<std::unique_ptr<Arena>> Arena::Create(const Driver& driver,
                                                     const Options& options) {
  const CUmemAllocationProp prop = OnDevice(options.device);
  size_t page = 0;
  QUARRY_RETURN_IF_ERROR(
      driver.Check(driver.granularity(&page, &prop, CU_MEM_ALLOC_GRANULARITY_RECOMMENDED),
                   "cuMemGetAllocationGranularity"));
  std::unique_ptr<Arena> out(new Arena(driver, options, page));
  const uint64_t bytes = RoundUp(std::max<uint64_t>(options.budget_bytes, 1), page);
  QUARRY_RETURN_IF_ERROR(
      driver.Check(driver.reserve_addresses(&out->base_, bytes, page, 0, 0),
                   absl::StrCat("cuMemAddressReserve of ", bytes, " bytes")));
  out->reserved_ = bytes;
  return out;
}

Arena::~Arena() {
  uint64_t at = 0;
  for (const auto& [handle, bytes] : pieces_) {
    driver_.unmap(base_ + at, bytes);
    driver_.release_memory(handle);
    at += bytes;
  }
  if (reserved_ > 0) driver_.free_addresses(base_, reserved_);
}

absl::Status Arena::MapTo(uint64_t end) {
  if (end <= mapped_) return absl::OkStatus();
  // The limit is a multiple of pages, and no less than `end`.
  const uint64_t until = std::min(std::max(RoundUp(end, page_), mapped_ + kStepBytes),
                                  map_.limit());
  const uint64_t bytes = until - mapped_;
  const CUmemAllocationProp prop = OnDevice(options_.device);
  CUmemGenericAllocationHandle handle = 0;
  QUARRY_RETURN_IF_ERROR(
      driver_.Check(driver_.create_memory(&handle, bytes, &prop, 0), "cuMemCreate"));
  absl::Status status =
      driver_.Check(driver_.map(base_ + mapped_, bytes, 0, handle, 0), "cuMemMap");
  if (status.ok()) {
    CUmemAccessDesc access = {};
    access.location = prop.location;
    access.flags = CU_MEM_ACCESS_FLAGS_PROT_READWRITE;
    status = driver_.Check(driver_.set_access(base_ + mapped_, bytes, &access, 1),
                           "cuMemSetAccess");
    if (!status.ok()) driver_.unmap(base_ + mapped_, bytes);
  }
  if (!status.ok()) {
    driver_.release_memory(handle);
    return status;
  }
  pieces_.emplace_back(handle, bytes);
  mapped_ += bytes;
  return absl::OkStatus();
}

absl::StatusOr<void*> Arena::Allocate(uint64_t bytes, std::string_view what, uint64_t leave_end) {
  QUARRY_ASSIGN_OR_RETURN(const uint64_t offset, map_.Allocate(bytes, what, leave_end));
  return WithPages(offset, bytes, what);
}

absl::StatusOr<void*> Arena::AllocateSpare(uint64_t bytes, uint64_t leave_free,
                                           std::string_view what) {
  const uint64_t unmapped = map_.limit() - std::min(map_.limit(), mapped_);
  QUARRY_ASSIGN_OR_RETURN(
      const uint64_t offset,
      map_.AllocateSpare(bytes, spare_refused_ ? std::max(leave_free, unmapped) : leave_free));
  absl::StatusOr<void*> data = WithPages(offset, bytes, what);
  spare_refused_ |= !data.ok();
  return data;
}

absl::StatusOr<void*> Arena::WithPages(uint64_t offset, uint64_t bytes, std::string_view what) {
  if (const absl::Status mapped = MapTo(offset + bytes); !mapped.ok()) {
    map_.Release(offset, bytes);
    return absl::Status(
        mapped.code(),
        absl::StrCat("device memory: ", bytes, " bytes for ", std::string(what), ", ",
                     map_.used() + map_.overhead(), " in use of a budget of ", map_.budget(),
                     ", but the card gives no more pages behind ", mapped_, " (",
                     mapped.message(), ")"));
  }
  return reinterpret_cast<void*>(base_ + offset);
}

void Arena::Release(void* data, uint64_t bytes) {
  map_.Release(reinterpret_cast<CUdeviceptr>(data) - base_, bytes);
}

}  // namespace quarry::cuda
