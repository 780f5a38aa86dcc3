// Stored matrices in the form that a device computes with.
#pragma once

#include <cstddef>
#include <span>
#include <string_view>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "gpu/device.h"
#include "gpu/thread_team.h"
#include "gpu/weights/matrix_layout.h"

namespace quarry {

// Of the matrices one above the other, all of one width, on `device`: plain elements have the dtype
// that the device computes with, fp32 if the parts differ. Codes stand for bf16, or for fp16 where
// all parts are fp16.
MatrixLayout LayoutFor(const Device& device, std::span<const HostMatrix> stacked, size_t width,
                       WeightForm form);

// Rows [lo, hi) of the stacked matrices as plain elements of `layout`.
void PackPlain(std::span<const HostMatrix> stacked, const MatrixLayout& layout, size_t lo,
               size_t hi, std::byte* to, ThreadTeam* team);

// All of them; `to` has layout.bytes(). InvalidArgument names `what`, row and column of a weight
// that is not finite and should become a code.
absl::Status PackMatrix(std::span<const HostMatrix> stacked, const MatrixLayout& layout,
                        std::string_view what, std::byte* to, ThreadTeam* team);

// The same on a device: `to` is its memory.
absl::Status UploadMatrix(std::span<const HostMatrix> stacked, const MatrixLayout& layout,
                          std::string_view what, std::byte* to, Device* device, ThreadTeam* team);

}  // namespace quarry
