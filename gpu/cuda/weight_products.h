// Products with weights in whatever form.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <memory>
#include <utility>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "gpu/cuda/arena.h"
#include "gpu/cuda/products.h"
#include "gpu/device.h"

namespace quarry::cuda {

// Plain weights are multiplied by cuBLASLt, and so are codes, widened a piece at a time into
// bounded memory, but for a few rows: those are multiplied by the codes as they lie. Working memory
// is allocated from the device for the time of a product. Used by one thread, on one stream.
class WeightProducts {
 public:
  // `arena` is the one behind `device`. Both and the stream outlive it.
  static absl::StatusOr<std::unique_ptr<WeightProducts>> Create(Device* device, Arena* arena,
                                                                std::unique_ptr<Products> products,
                                                                cudaStream_t stream);

  // As Device::MatMul; rows > 0 and w.rows > 0.
  absl::Status Multiply(const float* x, const DeviceMatrix& w, float* y, size_t rows,
                        Device::Output output);

 private:
  WeightProducts(Device* device, Arena* arena, std::unique_ptr<Products> products,
                 cudaStream_t stream)
      : device_(device), arena_(arena), stream_(stream), products_(std::move(products)) {}
  absl::Status MultiplyFew(const float* x, const DeviceMatrix& w, float* y, size_t rows,
                           Device::Output output);
  absl::Status MultiplyCoded(const Product& all, const DeviceMatrix& w);
  absl::Status Run(const Product& product);

  Device* const device_;
  Arena* const arena_;
  const cudaStream_t stream_;
  const std::unique_ptr<Products> products_;
  DeviceBuffer workspace_;  // of products_, which run one after the other
};

}  // namespace quarry::cuda
