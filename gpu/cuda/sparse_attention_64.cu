#include "gpu/cuda/sparse_attention_launch.cuh"

namespace quarry::cuda {

const SparseTensorKernels kSparseTensorKernels64 = SparseHeadDim<64>::kAll;

}  // namespace quarry::cuda
