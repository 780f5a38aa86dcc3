// Matrix products by cuBLASLt.
#pragma once

#include <cublasLt.h>

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <tuple>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "gpu/device.h"
#include "proto/types.h"

namespace quarry::cuda {

// The library's functions, found when a device is made: it is 500 MB that a program without a
// device has no use for, and a machine without it can still run the rest.
struct CublasLt {
  decltype(&cublasLtCreate) create = nullptr;
  decltype(&cublasLtDestroy) destroy = nullptr;
  decltype(&cublasLtMatmul) matmul = nullptr;
  decltype(&cublasLtMatmulAlgoGetHeuristic) heuristic = nullptr;
  decltype(&cublasLtMatmulDescCreate) create_operation = nullptr;
  decltype(&cublasLtMatmulDescDestroy) destroy_operation = nullptr;
  decltype(&cublasLtMatmulDescSetAttribute) set_operation = nullptr;
  decltype(&cublasLtMatrixLayoutCreate) create_layout = nullptr;
  decltype(&cublasLtMatrixLayoutDestroy) destroy_layout = nullptr;
  decltype(&cublasLtMatmulPreferenceCreate) create_preference = nullptr;
  decltype(&cublasLtMatmulPreferenceDestroy) destroy_preference = nullptr;
  decltype(&cublasLtMatmulPreferenceSetAttribute) set_preference = nullptr;

  // FailedPrecondition if libcublasLt.so.13 is nowhere on the loader's paths.
  static absl::StatusOr<CublasLt> Load();
};

// y [rows][out] = x [rows][in] * w [out][in]^T, or added to y. x and w have one dtype; sums and y
// are fp32, and fp32 products are no TF32. Rows of y are y_stride elements apart.
struct Product {
  const void* x;
  const void* w;
  float* y;
  DType dtype;
  size_t rows, out, in, y_stride;
  Device::Output output;
};

// The library's choice for a shape, kept. Used by one thread.
class Products {
 public:
  static absl::StatusOr<std::unique_ptr<Products>> Create();
  ~Products();

  // Whether Run would meet this shape for the first time: then code may be loaded to the device.
  bool IsNew(const Product& product) const;
  // `workspace` is the same at every call, and at least 16 bytes aligned; it may be empty.
  struct Workspace {
    void* data = nullptr;
    size_t bytes = 0;
  };
  absl::Status Run(const Product& product, const Workspace& workspace, cudaStream_t stream);

 private:
  struct Plan {
    cublasLtMatmulDesc_t operation = nullptr;
    cublasLtMatrixLayout_t w = nullptr, x = nullptr, y = nullptr;
    cublasLtMatmulAlgo_t algorithm = {};
  };
  // dtype, rows, out, in, y_stride, and the alignments of x, w and y
  using Key = std::tuple<DType, size_t, size_t, size_t, size_t, uint32_t, uint32_t, uint32_t>;
  // Prompts come in any length: beyond this the plans are made anew.
  static constexpr size_t kMaxPlans = 1024;

  explicit Products(const CublasLt& lt) : lt_(lt) {}
  static Key KeyOf(const Product& product);
  absl::StatusOr<const Plan*> Find(const Product& product, const Workspace& workspace);
  absl::Status Describe(const Product& product, Plan* plan);
  absl::Status Choose(const Product& product, const Workspace& workspace, Plan* plan);
  void Drop(const Plan& plan);

  const CublasLt lt_;
  cublasLtHandle_t handle_ = nullptr;
  std::map<Key, Plan> plans_;
};

}  // namespace quarry::cuda
