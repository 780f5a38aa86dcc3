// What devices have in common, and what those do that have nothing better.
#include "gpu/device.h"

#include <algorithm>
#include <cstdlib>
#include <string>

#include "absl/strings/str_cat.h"
#include "gpu/weights/pack_matrix.h"
#include "proto/status_macros.h"

namespace quarry {

absl::StatusOr<HostBuffer> Device::AllocateHost(size_t bytes, std::string_view what) {
  void* const data = std::aligned_alloc(64, std::max<size_t>(64, (bytes + 63) / 64 * 64));
  if (data == nullptr) {
    return absl::ResourceExhaustedError(
        absl::StrCat("host memory: the system has no ", bytes, " bytes for ", std::string(what)));
  }
  return HostBuffer(this, {static_cast<std::byte*>(data), bytes});
}

void Device::ReleaseHost(std::span<std::byte> bytes) { std::free(bytes.data()); }

Device::UploadTicket Device::StartUpload(void* to, std::span<const std::byte> from) {
  (void)Upload(to, from);  // of a device whose uploads cannot fail
  return 0;
}

void Device::WaitFor(UploadTicket) {}

DType Device::WeightDType(DType) const { return DType::kFp32; }

absl::StatusOr<DeviceMatrix> Device::Load(std::span<const HostMatrix> stacked, size_t width,
                                          std::string_view what, WeightForm form) {
  const MatrixLayout layout = LayoutFor(*this, stacked, width, form);
  QUARRY_ASSIGN_OR_RETURN(DeviceBuffer data, Allocate(layout.bytes(), what));
  QUARRY_RETURN_IF_ERROR(UploadMatrix(stacked, layout, what, data.raw(), this, nullptr));
  return DeviceMatrix{std::move(data), layout.dtype, layout.rows, layout.width, layout.form};
}

absl::StatusOr<std::unique_ptr<SparsePlan>> Device::PlanSparse(std::span<const HeadPattern>,
                                                               TokenRange, const DeviceAttention&) {
  return absl::UnimplementedError(absl::StrCat("no sparse prefill on ", std::string(name())));
}

absl::Status Device::AttendSparse(const SparsePlan&, const DeviceAttention&) {
  return absl::UnimplementedError(absl::StrCat("no sparse prefill on ", std::string(name())));
}

}  // namespace quarry
