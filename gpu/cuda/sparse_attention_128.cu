#include "gpu/cuda/sparse_attention_launch.cuh"

namespace quarry::cuda {

const SparseTensorKernels kSparseTensorKernels128 = SparseHeadDim<128>::kAll;

}  // namespace quarry::cuda
