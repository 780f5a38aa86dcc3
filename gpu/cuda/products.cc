#include "gpu/cuda/products.h"

#include <dlfcn.h>

#include <algorithm>
#include <bit>
#include <string>

#include "absl/strings/str_cat.h"
#include "proto/status_macros.h"

namespace quarry::cuda {
namespace {

constexpr char kLibrary[] = "libcublasLt.so.13";

absl::Status Check(cublasStatus_t status, std::string_view what) {
  if (status == CUBLAS_STATUS_SUCCESS) return absl::OkStatus();
  const std::string message =
      absl::StrCat("cuBLASLt: ", std::string(what), ": status ", static_cast<int>(status));
  return status == CUBLAS_STATUS_ALLOC_FAILED ? absl::ResourceExhaustedError(message)
                                              : absl::InternalError(message);
}

std::string ShapeOf(const Product& p) {
  return absl::StrCat("[", p.rows, "][", p.in, "] * [", p.out, "][", p.in, "]^T of ",
                      std::string(DTypeName(p.dtype)));
}

cudaDataType_t TypeOf(DType dtype) {
  return dtype == DType::kBf16 ? CUDA_R_16BF : dtype == DType::kFp16 ? CUDA_R_16F : CUDA_R_32F;
}

// The largest power of two, up to 256, that divides the address.
uint32_t AlignmentOf(const void* p) {
  return static_cast<uint32_t>(
      uint64_t{1} << std::min(8, std::countr_zero(reinterpret_cast<uintptr_t>(p))));
}

}  // namespace

absl::StatusOr<CublasLt> CublasLt::Load() {
  // Never closed: the library keeps state of the process's CUDA contexts.
  void* const library = dlopen(kLibrary, RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) {
    return absl::FailedPreconditionError(
        absl::StrCat("CUDA devices need ", kLibrary, " on the loader's paths: ", dlerror()));
  }
  CublasLt lt;
  std::string missing;
  const auto find = [&]<typename F>(const char* name, F* out) {
    *out = reinterpret_cast<F>(dlsym(library, name));
    if (*out == nullptr) missing = name;
  };
  find("cublasLtCreate", &lt.create);
  find("cublasLtDestroy", &lt.destroy);
  find("cublasLtMatmul", &lt.matmul);
  find("cublasLtMatmulAlgoGetHeuristic", &lt.heuristic);
  find("cublasLtMatmulDescCreate", &lt.create_operation);
  find("cublasLtMatmulDescDestroy", &lt.destroy_operation);
  find("cublasLtMatmulDescSetAttribute", &lt.set_operation);
  find("cublasLtMatrixLayoutCreate", &lt.create_layout);
  find("cublasLtMatrixLayoutDestroy", &lt.destroy_layout);
  find("cublasLtMatmulPreferenceCreate", &lt.create_preference);
  find("cublasLtMatmulPreferenceDestroy", &lt.destroy_preference);
  find("cublasLtMatmulPreferenceSetAttribute", &lt.set_preference);
  if (missing.empty()) return lt;
  return absl::FailedPreconditionError(absl::StrCat(kLibrary, " has no ", missing));
}

absl::StatusOr<std::unique_ptr<Products>> Products::Create() {
  QUARRY_ASSIGN_OR_RETURN(const CublasLt lt, CublasLt::Load());
  std::unique_ptr<Products> out(new Products(lt));
  QUARRY_RETURN_IF_ERROR(Check(lt.create(&out->handle_), "cublasLtCreate"));
  return out;
}

Products::~Products() {
  for (const auto& [key, plan] : plans_) Drop(plan);
  if (handle_ != nullptr) lt_.destroy(handle_);
}

void Products::Drop(const Plan& plan) {
  if (plan.operation != nullptr) lt_.destroy_operation(plan.operation);
  for (const cublasLtMatrixLayout_t layout : {plan.w, plan.x, plan.y}) {
    if (layout != nullptr) lt_.destroy_layout(layout);
  }
}

Products::Key Products::KeyOf(const Product& p) {
  return {p.dtype,          p.rows,           p.out,           p.in, p.y_stride,
          AlignmentOf(p.x), AlignmentOf(p.w), AlignmentOf(p.y)};
}

bool Products::IsNew(const Product& product) const { return !plans_.contains(KeyOf(product)); }

// In the library's column-major terms: y^T = w * x^T, where w and x lie there transposed.
absl::Status Products::Describe(const Product& p, Plan* plan) {
  QUARRY_RETURN_IF_ERROR(Check(
      lt_.create_operation(&plan->operation, CUBLAS_COMPUTE_32F, CUDA_R_32F), "operation"));
  const cublasOperation_t transposed = CUBLAS_OP_T;
  QUARRY_RETURN_IF_ERROR(Check(lt_.set_operation(plan->operation, CUBLASLT_MATMUL_DESC_TRANSA,
                                                 &transposed, sizeof(transposed)),
                               "transposition"));
  const auto layout = [&](cublasLtMatrixLayout_t* out, cudaDataType_t type, size_t down,
                          size_t across, size_t stride) {
    return Check(lt_.create_layout(out, type, down, across, static_cast<int64_t>(stride)),
                 "layout");
  };
  QUARRY_RETURN_IF_ERROR(layout(&plan->w, TypeOf(p.dtype), p.in, p.out, p.in));
  QUARRY_RETURN_IF_ERROR(layout(&plan->x, TypeOf(p.dtype), p.in, p.rows, p.in));
  return layout(&plan->y, CUDA_R_32F, p.out, p.rows, p.y_stride);
}

absl::Status Products::Choose(const Product& p, const Workspace& workspace, Plan* plan) {
  struct Preference {
    explicit Preference(const CublasLt& lt) : lt(lt) {}
    ~Preference() {
      if (get != nullptr) lt.destroy_preference(get);
    }
    const CublasLt& lt;
    cublasLtMatmulPreference_t get = nullptr;
  } preference(lt_);
  QUARRY_RETURN_IF_ERROR(Check(lt_.create_preference(&preference.get), "preference"));
  const auto set = [&](cublasLtMatmulPreferenceAttributes_t attribute, auto value) {
    return Check(lt_.set_preference(preference.get, attribute, &value, sizeof(value)),
                 "preference");
  };
  QUARRY_RETURN_IF_ERROR(
      set(CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, uint64_t{workspace.bytes}));
  QUARRY_RETURN_IF_ERROR(set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, AlignmentOf(p.w)));
  QUARRY_RETURN_IF_ERROR(set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, AlignmentOf(p.x)));
  QUARRY_RETURN_IF_ERROR(set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, AlignmentOf(p.y)));
  QUARRY_RETURN_IF_ERROR(set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, AlignmentOf(p.y)));
  cublasLtMatmulHeuristicResult_t result = {};
  int found = 0;
  QUARRY_RETURN_IF_ERROR(
      Check(lt_.heuristic(handle_, plan->operation, plan->w, plan->x, plan->y, plan->y,
                          preference.get, 1, &result, &found),
            absl::StrCat("a way to compute ", ShapeOf(p))));
  if (found == 0) {
    return absl::InternalError(absl::StrCat("cuBLASLt: no way to compute ", ShapeOf(p)));
  }
  plan->algorithm = result.algo;
  return absl::OkStatus();
}

absl::StatusOr<const Products::Plan*> Products::Find(const Product& product,
                                                     const Workspace& workspace) {
  const Key key = KeyOf(product);
  if (const auto it = plans_.find(key); it != plans_.end()) return &it->second;
  if (plans_.size() >= kMaxPlans) {
    for (const auto& [old, plan] : plans_) Drop(plan);
    plans_.clear();
  }
  Plan plan;
  absl::Status status = Describe(product, &plan);
  if (status.ok()) status = Choose(product, workspace, &plan);
  if (!status.ok()) {
    Drop(plan);
    return status;
  }
  return &plans_.emplace(key, plan).first->second;
}

absl::Status Products::Run(const Product& p, const Workspace& workspace, cudaStream_t stream) {
  QUARRY_ASSIGN_OR_RETURN(const Plan* const plan, Find(p, workspace));
  const float alpha = 1.0f, beta = p.output == Device::Output::kAccumulate ? 1.0f : 0.0f;
  return Check(lt_.matmul(handle_, plan->operation, &alpha, p.w, plan->w, p.x, plan->x, &beta,
                          p.y, plan->y, p.y, plan->y, &plan->algorithm, workspace.data,
                          workspace.bytes, stream),
               ShapeOf(p));
}

}  // namespace quarry::cuda
