// What the kernel for Hopper is told beside SparseArgs, and what its launcher must know of it.
#pragma once

#include <cuda.h>

#include "gpu/cuda/sparse_args.h"

namespace quarry::cuda {

// Queries, keys and values lie in shared memory in panels: of each of 128 vectors so many
// dimensions, swizzled over their bytes. What a tensor map gives at once is a panel's part of 64
// keys. 96 dimensions are three panels of 32; powers of two may be wider.
template <int kHeadDim>
struct HopperBox {
  static constexpr int kPanelDims = kHeadDim == 96 ? 32 : 64;
  static constexpr int kPanels = kHeadDim / kPanelDims;
  static constexpr int kRowBytes = kPanelDims * 2;
  static constexpr int kPanelBytes = static_cast<int>(kRowTile) * kRowBytes;
};

// Tensor maps of [heads][tokens][head_dim]; of columns there is one head. Without an order
// (sparse.order is null) every head is dense and there is no index.
struct HopperArgs {
  SparseArgs sparse;
  CUtensorMap k, v, column_k, column_v;
};

}  // namespace quarry::cuda
