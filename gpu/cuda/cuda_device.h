// The CUDA device: an NVIDIA card of compute capability 8.0 or later. No CUDA type is seen here.
#pragma once

#include <cstdint>
#include <memory>

#include "absl/status/statusor.h"
#include "gpu/device.h"

namespace quarry {

struct CudaDeviceOptions {
  // Of everything that this process takes of the card: what is allocated, and also CUDA's context,
  // code and libraries, which are measured when the device is made and taken off.
  uint64_t capacity_bytes = 16ull << 30;
  int ordinal = 0;  // as CUDA counts the cards that it may see
};

// Weights keep their dtype. Products round activations to it and sum in fp32 (cuBLASLt); attention
// rounds queries to the dtype of K and V where that has two bytes. MatMul and Attend take working
// memory out of the budget while they run; where there is none, they fail as any operation does:
// the next Upload or Download says so. PlanSparse and AttendSparse, for what the tensor kernels
// take, say so themselves; they use threads of the host.
//
// FailedPrecondition without a driver, a card of that number, code for it or cuBLASLt, or in a
// build without CUDA; ResourceExhausted if CUDA itself takes more than the budget.
absl::StatusOr<std::unique_ptr<Device>> MakeCudaDevice(const CudaDeviceOptions& options);

}  // namespace quarry
