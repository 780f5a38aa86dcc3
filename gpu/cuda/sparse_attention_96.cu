#include "gpu/cuda/sparse_attention_launch.cuh"

namespace quarry::cuda {

const SparseTensorKernels kSparseTensorKernels96 = SparseHeadDim<96>::kAll;

}  // namespace quarry::cuda
