// Attention of rows whose place is read on the card (DevicePlace): kernels as they are, whose
// arguments a block of threads completes first.
#pragma once

#include "gpu/cuda/attention_args.h"
#include "gpu/device.h"

namespace quarry::cuda {

// Called by all threads of a block, whose grid.z is members, then splits: `args` of its member,
// with what the place says, in shared memory.
__device__ inline const AttentionArgs& Placed(const AttentionArgs& args) {
  __shared__ AttentionArgs placed;
  if (threadIdx.x == 0) {
    const uint32_t member = blockIdx.z / args.splits;
    const DevicePlace place = args.place[member];
    const size_t vectors = size_t{member} * args.rows * args.heads;
    // But for parts, of which there are few.
    placed.q = args.q + vectors * args.head_dim;
    placed.o = args.o + vectors * args.head_dim;
    placed.lse = args.lse + vectors;
    placed.members = args.members;
    placed.heads = args.heads;
    placed.group = args.group;
    placed.head_dim = args.head_dim;
    placed.rows = args.rows;
    placed.first_token = place.first_token;
    placed.window = args.window;
    placed.splits = args.splits;
    placed.part_count = kPlacedParts;
    placed.scale_log2 = args.scale_log2;
#pragma unroll
    for (uint32_t p = 0; p < kPlacedParts; ++p) {
      placed.parts[p] = args.parts[member * kPlacedParts + p];
    }
    AttentionPart& last = placed.parts[kPlacedParts - 1];
    const size_t skip = place.kv_slot * args.vector_bytes;
    last.k += skip;
    last.v += skip;
    last.lo = place.kv_lo;
    last.hi = place.first_token + args.rows;
  }
  __syncthreads();
  return placed;
}

}  // namespace quarry::cuda
